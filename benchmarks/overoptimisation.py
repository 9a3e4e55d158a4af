"""Over-optimisation of reward models, reproduced: gold and proxy against the square root of KL.

The quickstart's task has a gold standard: what the simulated people truly value. Reward models of three sizes learn
from three amounts of those people's comparisons. Each is then optimised in two ways, from one SFT model: by choosing
the best of n (n up to 64), and by PPO without a price on KL. The published laws are fitted to the gold gains:

    best of n:               d (alpha - beta d)          d = sqrt(KL), KL = ln n - (n - 1) / n (an upper bound)
    reinforcement learning:  d (alpha - beta ln d)       d = sqrt(KL), KL measured in the rollout (k1)

At one size and amount of data the remedies are compared with plain PPO: a price on KL, an ensemble of four heads
combined by mean, worst case, or less its variance, and PPO-ptx.

Intervals are 95%: best of n resamples prompts; PPO resamples blocks of five neighbouring rollouts of all seeds, because
neighbours share a policy. Source of the laws: Gao, Schulman and Hilton 2022, arXiv:2210.10760.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from accord.atomic import write_json, write_text
from accord.measures.selection import best_of_n_kl_bound, best_of_n_values
from accord.report.svg import Draw, Series
from benchmarks.figure import Panel, write_figure
from benchmarks.jobs import run_jobs
from benchmarks.scaling import Fit, fit, gain_at, resampled_fits

MODULE = "benchmarks.overoptimisation"
GOLD = "accord.demos.quickstart:gold_utility"
# name -> (width, blocks, heads); the last is the policy's own.
SIZES: dict[str, tuple[int, int, int]] = {"small": (32, 1, 2), "medium": (64, 2, 4), "large": (128, 4, 4)}
AMOUNTS = (500, 2000, 8000)
# The remedies are tried where plain PPO over-optimises: (size, comparisons).
REMEDIED = ("large", 2000)
REMEDIES: dict[str, dict[str, Any]] = {
    "KL price 0.1": {"kl_coef": 0.1},
    "ensemble, mean": {"combine": "mean"},
    "ensemble, worst": {"combine": "worst"},
    "ensemble, less variance": {"combine": "uncertainty"},
    "ptx 1": {"ptx_coef": 1.0},
}
PRICES = [name for name, options in REMEDIES.items() if "combine" not in options]
ENSEMBLES = [name for name, options in REMEDIES.items() if "combine" in options]
DISTANCE = "\u221aKL to the SFT model (\u221anats)"
HEADS = 4
BLOCK = 5
FEWEST_BLOCKS = 5  # fewer say nothing about how much they vary

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Scale:
    """How much is done."""

    comparisons: int
    amounts: tuple[int, ...]
    demonstrations: int
    prompts: int
    n: int
    episodes: int
    seeds: tuple[int, ...]


FULL = Scale(8000, AMOUNTS, 5000, 300, 64, 4096, (0, 1, 2))
QUICK = Scale(400, (100, 200, 400), 600, 40, 16, 640, (0,))


@dataclass(frozen=True, slots=True)
class Run:
    """One optimisation against one reward model: points in order of distance, (N,) each, pooled over seeds by caller.

    distances in sqrt(nats); gold and proxy as gains over the SFT model.
    """

    distances: Floats
    gold: Floats
    proxy: Floats


def main() -> None:
    parser = argparse.ArgumentParser(prog=f"python -m {MODULE}", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs, the table and the figure")
    parser.add_argument("--seeds", type=int, nargs="*", help="seeds (default: 0 1 2)")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="runs at a time, one thread each")
    parser.add_argument("--quick", action="store_true", help="a fraction of the data, samples and episodes: minutes")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON lines instead of the table")
    parser.add_argument("--job", nargs="*", help=argparse.SUPPRESS)
    args = parser.parse_args()
    scale = QUICK if args.quick else FULL
    if args.job:
        kind, *rest = args.job
        JOBS[kind](args.out, scale, *rest)
        return
    seeds = tuple(args.seeds) if args.seeds else scale.seeds
    shared = ["--out", str(args.out), *(["--quick"] if args.quick else []), "--job"]
    for jobs in _phases(scale, seeds):
        run_jobs(MODULE, [[*shared, *job] for job in jobs], args.processes)
    rows = _rows(args.out, scale, seeds)
    write_json(args.out / "overoptimisation.json", {"scale": asdict(scale), "seeds": seeds, "rows": rows})
    write_figure(args.out / "overoptimisation.svg", _panels(args.out, scale, seeds))
    table = _table(rows)
    write_text(args.out / "overoptimisation.md", table + "\n")
    print("\n".join(map(json.dumps, rows)) if args.json else table)


def _phases(scale: Scale, seeds: Sequence[int]) -> list[list[list[str]]]:
    """What is run, each phase after the one before it."""
    models = [(size, amount) for size in SIZES for amount in scale.amounts]
    remedied = (REMEDIED[0], scale.amounts[AMOUNTS.index(REMEDIED[1])])
    return [
        [["policy", str(seed)] for seed in seeds],
        [["trunk", str(seed), size] for seed in seeds for size in SIZES if size != "large"],
        [["reward", str(seed), size, str(amount), "1"] for seed in seeds for size, amount in models]
        + [["reward", str(seed), remedied[0], str(remedied[1]), str(HEADS)] for seed in seeds],
        [["bestofn", str(seed)] for seed in seeds]
        + [["ppo", str(seed), size, str(amount), "plain"] for seed in seeds for size, amount in models]
        + [["ppo", str(seed), remedied[0], str(remedied[1]), name] for seed in seeds for name in REMEDIES],
    ]


# --- one job ---------------------------------------------------------------------------------------------------------


def _root(out: Path, seed: str | int) -> Path:
    return (out / f"seed-{seed}").absolute()


def _tree(folder: Path, seed: str, **sections: Any) -> dict[str, Any]:
    from accord.demos.quickstart import SETTINGS

    shared = {key: SETTINGS[key] for key in ("threads", "model", "data")}
    return {**shared, "seed": int(seed), "out": str(folder), **sections}


def _policy(out: Path, scale: Scale, seed: str) -> None:
    """The SFT model, and its answers compared by the simulated people."""
    from dataclasses import replace

    from rich.console import Console

    from accord.config import recipe_from
    from accord.demos import quickstart
    from accord.methods.context import Context
    from accord.pipeline import STAGES

    tree = _tree(_root(out, seed) / "policy", seed, sft=quickstart.SETTINGS["sft"])
    corpus = quickstart.task_corpus(int(seed))
    corpus = replace(corpus, sft=replace(corpus.sft, groups=corpus.sft.groups[: scale.demonstrations]))
    context = Context(recipe_from(tree, source=MODULE), corpus, Console())
    STAGES["sft"](context)
    quickstart.run_annotators(context, compared=scale.comparisons)


def _trunk(out: Path, scale: Scale, seed: str, size: str) -> None:
    """A smaller language model of the same vocabulary, taught by the same demonstrations: what a small reward model
    starts from."""
    from dataclasses import replace

    from rich.console import Console

    from accord.config import recipe_from
    from accord.demos import quickstart
    from accord.methods.context import Context
    from accord.models.load import ModelShape, build_model, load_policy, save_model
    from accord.pipeline import STAGES
    from accord.randomness import torch_seed

    folder = _root(out, seed) / f"trunk-{size}"
    base, tokenizer = load_policy(_root(out, seed) / "policy" / "sft" / "model")
    width, blocks, heads = SIZES[size]
    model = build_model(
        ModelShape(width, blocks, heads, base.config.max_position_embeddings),
        vocab_size=base.config.vocab_size, pad_id=tokenizer.pad_token_id, eos_id=tokenizer.eos_token_id,
        seed=torch_seed(int(seed), "trunk", size),
    )  # fmt: skip
    save_model(model, tokenizer, folder / "base")
    tree = _tree(folder, seed, sft=quickstart.SETTINGS["sft"]) | {"model": {"path": str(folder / "base")}}
    corpus = quickstart.task_corpus(int(seed))
    corpus = replace(corpus, sft=replace(corpus.sft, groups=corpus.sft.groups[: scale.demonstrations]))
    STAGES["sft"](Context(recipe_from(tree, source=MODULE), corpus, Console()))


def _reward(out: Path, scale: Scale, seed: str, size: str, amount: str, heads: str) -> None:
    from dataclasses import replace

    from rich.console import Console

    from accord.config import recipe_from
    from accord.data.read import read_groups
    from accord.demos import quickstart
    from accord.methods.context import Context
    from accord.methods.corpus import Part
    from accord.pipeline import STAGES

    root = _root(out, seed)
    start = root / ("policy" if size == "large" else f"trunk-{size}") / "sft" / "model"
    section = {**quickstart.SETTINGS["reward"], "init": str(start), "heads": int(heads)}
    tree = _tree(_reward_folder(out, seed, size, amount, heads), seed, reward=section)
    compared = read_groups(root / "policy" / "annotate" / "comparisons.jsonl").groups[: int(amount)]
    corpus = replace(quickstart.task_corpus(int(seed)), preferences=Part.of(compared, "comparisons"))
    STAGES["reward"](Context(recipe_from(tree, source=MODULE), corpus, Console()))


def _reward_folder(out: Path, seed: str | int, size: str, amount: str | int, heads: str | int) -> Path:
    return _root(out, seed) / f"reward-{size}-{amount}{'' if int(heads) == 1 else f'-{heads}-heads'}"


def _best_of_n(out: Path, scale: Scale, seed: str) -> None:
    """Sample once, let the gold standard and every reward model judge the same answers; (P, n) arrays in one file."""
    from rich.console import Console

    from accord.config import BestOfNConfig, recipe_from
    from accord.demos import quickstart
    from accord.methods.candidates import Drawing, draw
    from accord.methods.context import Context, LoadedPolicy
    from accord.methods.judges import function_scorer, model_scorer
    from accord.models.load import load_reward_model
    from accord.rewards.scorers import values_of
    from accord.rollout.native import NativeSampler
    from accord.rollout.sampling import Sampling

    path = _root(out, seed) / "bestofn.npz"
    if path.exists():
        return
    corpus = quickstart.task_corpus(int(seed))
    context = Context(recipe_from(_tree(_root(out, seed), seed), source=MODULE), corpus, Console())
    policy = LoadedPolicy.from_folder(_root(out, seed) / "policy" / "sft" / "model", "auto")
    gold = function_scorer(context, "gold_function", GOLD)
    assert gold is not None
    groups = corpus.prompts.groups[: scale.prompts]
    prompts = _tokens(policy, groups)
    sampling = Sampling(quickstart.MAX_NEW_TOKENS, stop_ids=policy.template.stop_ids)
    drawing = Drawing(NativeSampler(policy.model, pad_id=policy.pad_id), policy.template, gold, None)
    drawn = draw(drawing, prompts, scale.n, sampling, BestOfNConfig.model_validate({}), ("bestofn", int(seed)))
    judged = {"gold": drawn.scores}
    flat = [request for row in drawn.requests for request in row]
    for size in SIZES:
        for amount in scale.amounts:
            folder = _reward_folder(out, seed, size, amount, 1) / "reward" / "model"
            model, tokenizer = load_reward_model(folder)
            scorer = model_scorer(context, model, tokenizer, 8192, folder)
            judged[f"{size}-{amount}"] = np.array(values_of(scorer, flat)).reshape(drawn.scores.shape)
    partial = path.with_name("partial.npz")
    np.savez(partial, allow_pickle=False, **judged)
    partial.replace(path)


def _tokens(policy: Any, groups: Sequence[Any]) -> list[Any]:
    from accord.records import TokenGroup

    return [(g, TokenGroup(policy.template.prompt_ids(g.prompt), (), g.prompt_id)) for g in groups]


def _ppo(out: Path, scale: Scale, seed: str, size: str, amount: str, remedy: str) -> None:
    from rich.console import Console

    from accord.config import recipe_from
    from accord.demos import quickstart
    from accord.methods.context import Context
    from accord.pipeline import STAGES

    options = dict(REMEDIES.get(remedy, {}))
    combine = options.pop("combine", None)
    reward = _reward_folder(out, seed, size, amount, HEADS if combine else 1) / "reward" / "model"
    judge: dict[str, Any] = {"reward_model": str(reward)}
    if combine:
        judge = {"scorers": {"ensemble": {"model": str(reward), "combine": combine}}}
    section = {
        **quickstart.SETTINGS["ppo"], **judge, "kl_coef": 0.0, "gold_function": GOLD, "episodes": scale.episodes,
        "init": str(_root(out, seed) / "policy" / "sft" / "model"), "checkpoint_every": 1000,
        # Reward models of other sizes are no start for a value model of the policy's size: all start alike.
        "value_init": "policy", **options,
    }  # fmt: skip
    tree = _tree(_ppo_folder(out, seed, size, amount, remedy), seed, ppo=section)
    STAGES["ppo"](Context(recipe_from(tree, source=MODULE), quickstart.task_corpus(int(seed)), Console()))


def _ppo_folder(out: Path, seed: str | int, size: str, amount: str | int, remedy: str) -> Path:
    name = remedy.replace(",", "").replace(" ", "-")
    return _root(out, seed) / f"ppo-{size}-{amount}-{name}"


JOBS = {"policy": _policy, "trunk": _trunk, "reward": _reward, "bestofn": _best_of_n, "ppo": _ppo}


# --- what came of it -------------------------------------------------------------------------------------------------


def _best_of_n_curves(out: Path, seeds: Sequence[int], model: str) -> tuple[Floats, Floats]:
    """(P, n) gold and proxy of the best of 1..n by this reward model, prompts of all seeds together."""
    gold, proxy = [], []
    for seed in seeds:
        with np.load(_root(out, seed) / "bestofn.npz") as judged:
            gold.append(best_of_n_values(judged[model], judged["gold"]))
            proxy.append(best_of_n_values(judged[model], judged[model]))
    return np.concatenate(gold), np.concatenate(proxy)


def _best_of_n_run(gold: Floats, proxy: Floats) -> Run:
    distances = np.array([sqrt(best_of_n_kl_bound(n)) for n in range(1, gold.shape[1] + 1)])
    means = gold.mean(0), proxy.mean(0)
    return Run(distances, means[0] - means[0][0], means[1] - means[1][0])


def _ppo_run(out: Path, seed: int, size: str, amount: int, remedy: str, model: str) -> Run:
    """Every rollout of a PPO run: gains over the SFT model's mean, which best-of-n's first column knows well."""
    path = _ppo_folder(out, seed, size, amount, remedy) / "ppo" / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    with np.load(_root(out, seed) / "bestofn.npz") as judged:
        gold_start = float(judged["gold"].mean())
    kl = np.array([max(0.0, row["rollout/kl_per_sequence_nats"]) for row in rows])
    gold = np.array([row["rollout/gold_utility/mean"] for row in rows]) - gold_start
    proxy = np.array([row["rollout/score/mean"] for row in rows])
    return Run(np.sqrt(kl), gold, proxy - proxy[0])


def _pooled(runs: Sequence[Run]) -> Run:
    return Run(*(np.concatenate([getattr(run, name) for run in runs]) for name in ("distances", "gold", "proxy")))


def _fit_best_of_n(gold: Floats, seed: int) -> Fit:
    distances = np.array([sqrt(best_of_n_kl_bound(n)) for n in range(1, gold.shape[1] + 1)])

    def gains(rows: Floats) -> Floats:
        mean = rows.mean(0)
        return mean - mean[0]

    def draw(random: np.random.Generator) -> tuple[Floats, Floats]:
        return distances, gains(gold[random.integers(0, len(gold), len(gold))])

    return resampled_fits(fit("best of n", distances, gains(gold)), draw, seed=seed)


def _fit_ppo(runs: Sequence[Run], seed: int) -> Fit:
    blocks = [
        (run.distances[i : i + BLOCK], run.gold[i : i + BLOCK])
        for run in runs
        for i in range(0, len(run.distances), BLOCK)
    ]

    def joined(chosen: Sequence[tuple[Floats, Floats]]) -> tuple[Floats, Floats]:
        return np.concatenate([d for d, _ in chosen]), np.concatenate([y for _, y in chosen])

    def draw(random: np.random.Generator) -> tuple[Floats, Floats]:
        return joined([blocks[i] for i in random.integers(0, len(blocks), len(blocks))])

    found = fit("reinforcement learning", *joined(blocks))
    return resampled_fits(found, draw, seed=seed) if len(blocks) >= FEWEST_BLOCKS else found


def _rows(out: Path, scale: Scale, seeds: Sequence[int]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for size in SIZES:
        for amount in scale.amounts:
            accuracy = _accuracy(out, seeds, size, amount)
            gold, proxy = _best_of_n_curves(out, seeds, f"{size}-{amount}")
            run = _best_of_n_run(gold, proxy)
            rows.append(_row("best of n", size, amount, "plain", accuracy, [run], _fit_best_of_n(gold, 0)))
            runs = [_ppo_run(out, seed, size, amount, "plain", f"{size}-{amount}") for seed in seeds]
            rows.append(_row("PPO", size, amount, "plain", accuracy, runs, _fit_ppo(runs, 0)))
    size, amount = REMEDIED[0], scale.amounts[AMOUNTS.index(REMEDIED[1])]
    for name in REMEDIES:
        runs = [_ppo_run(out, seed, size, amount, name, f"{size}-{amount}") for seed in seeds]
        rows.append(_row("PPO", size, amount, name, None, runs, _fit_ppo(runs, 0)))
    return rows


def _accuracy(out: Path, seeds: Sequence[int], size: str, amount: int) -> float:
    """Mean over the seeds of the reward model's agreement with the people on held-out comparisons."""
    found = []
    for seed in seeds:
        summary = json.loads((_reward_folder(out, seed, size, amount, 1) / "reward" / "summary.json").read_bytes())
        found += [row["value"] for row in summary["headline"] if row["name"] == "eval/accuracy"]
    return sum(found) / len(found)


def _row(
    method: str, size: str, amount: int, remedy: str, accuracy: float | None, runs: Sequence[Run], fitted: Fit
) -> dict[str, Any]:
    """Gold at its best and at the end (means over seeds; PPO's are means over three rollouts), and the fitted law."""
    smooth = [_smooth(run.gold) if method == "PPO" else run.gold for run in runs]
    return {
        "method": method, "size": size, "comparisons": amount, "remedy": remedy, "accuracy": accuracy,
        "gold_peak": float(np.mean([s.max() for s in smooth])), "gold_end": float(np.mean([s[-1] for s in smooth])),
        "proxy_end": float(np.mean([run.proxy[-1] for run in runs])),
        "distance_end": float(np.mean([run.distances[-1] for run in runs])),
        "fit": {**asdict(fitted), "peak": fitted.peak},
    }  # fmt: skip


def _smooth(values: Floats, window: int = 3) -> Floats:
    """Mean of each value and those before it, at most `window` of them."""
    return np.array([values[max(0, i - window + 1) : i + 1].mean() for i in range(len(values))])


def _panels(out: Path, scale: Scale, seeds: Sequence[int]) -> list[Panel]:
    amount, size = scale.amounts[AMOUNTS.index(REMEDIED[1])], REMEDIED[0]
    by_size = [(f"{name}", name, amount) for name in SIZES]
    by_amount = [(f"{count:,}", size, count) for count in scale.amounts]
    panels = []
    for title, cases in ((f"size, {amount:,} comparisons", by_size), (f"comparisons, {size} model", by_amount)):
        bon = [_best_of_n_run(*_best_of_n_curves(out, seeds, f"{s}-{a}")) for _, s, a in cases]
        ppo = [_pooled([_ppo_run(out, k, s, a, "plain", f"{s}-{a}") for k in seeds]) for _, s, a in cases]
        names = [name for name, _, _ in cases]
        panels.append(_panel(f"Best of n by {title}", names, bon, lines=True))
        panels.append(_panel(f"PPO by {title}", names, ppo, lines=False))
    plain = ppo[list(scale.amounts).index(amount)]
    for title, names in (("a price on KL, and ptx", PRICES), ("ensembles of four heads", ENSEMBLES)):
        runs = [_pooled([_ppo_run(out, k, size, amount, name, f"{size}-{amount}") for k in seeds]) for name in names]
        short = [name.removeprefix("ensemble, ") for name in names]
        panels.append(_panel(f"PPO, plain and with {title}", ["plain", *short], [plain, *runs], lines=False))
    chosen = _best_of_n_run(*_best_of_n_curves(out, seeds, f"{size}-{amount}"))
    shown: list[tuple[str, Run, Draw]] = [("Best of n", chosen, "line"), ("PPO", plain, "points")]
    for method, run, how in shown:
        kinds = (("gold", run.gold), ("proxy (the reward model)", run.proxy))
        series = tuple(
            Series(name, tuple(run.distances), tuple(gains), colour=colour, draw=how)
            for colour, (name, gains) in enumerate(kinds)
        )
        panels.append(Panel(f"{method}: what was wanted, and what was optimised", series, DISTANCE, "gain over SFT"))
    return panels


def _panel(title: str, names: Sequence[str], runs: Sequence[Run], *, lines: bool) -> Panel:
    """Gold gains of several runs; for PPO the points, with the fitted law as a line."""
    series: list[Series] = []
    for colour, (name, run) in enumerate(zip(names, runs, strict=True)):
        if lines:
            series.append(Series(name, tuple(run.distances), tuple(run.gold), colour=colour))
            continue
        series.append(Series("", tuple(run.distances), tuple(run.gold), colour=colour, draw="points"))
        grid = np.linspace(0.05, run.distances.max(), 40)
        law = gain_at(fit("reinforcement learning", run.distances, run.gold), grid)
        series.append(Series(name, tuple(grid), tuple(law), colour=colour))
    return Panel(title, tuple(series), DISTANCE, "gold gain over SFT")


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = ["| optimised by | model | comparisons | remedy | accuracy | gold gain: best | at the end | proxy gain "
             "| \u221aKL at the end | alpha | beta | R\u00b2 |", "|" + "---|" * 12]  # fmt: skip
    for row in rows:
        found = row["fit"]
        accuracy = "" if row["accuracy"] is None else f"{row['accuracy']:.1%}"
        lines.append(
            f"| {row['method']} | {row['size']} | {row['comparisons']:,} | {row['remedy']} | {accuracy} "
            f"| {row['gold_peak']:+.2f} | {row['gold_end']:+.2f} | {row['proxy_end']:+.2f} | {row['distance_end']:.2f} "
            f"| {_interval(found['alpha'], found['alpha_interval'])} "
            f"| {_interval(found['beta'], found['beta_interval'])} | {found['r_squared']:.2f} |"
        )
    return "\n".join(lines)


def _interval(value: float, interval: Sequence[float] | None) -> str:
    return f"{value:.2f}" + (f" ({interval[0]:.2f} to {interval[1]:.2f})" if interval else "")


if __name__ == "__main__":
    main()
