"""The memory of PPO's four roles (policy, reference, value model, reward model) against that of one model.

    python -m benchmarks.roles            a model of 103 million parameters
    python -m benchmarks.roles --quick    one of 20 million
    python -m benchmarks.roles --json     the same as JSON

`one_model` loads one frozen model and samples from it: no gradient, no optimiser. The layouts run a whole PPO stage of
one step, which loads all roles, samples, scores, updates, writes a checkpoint and saves the model; so the optimiser's
moments of everything that is trained are counted. All is float32 on the CPU, each measured in a process of its own: the
most memory that was resident at any moment (VmHWM of /proc), and what of that came on top of the imported libraries.

    separate   all weights of policy and value model are trained; reference and reward model are models of their own
    hydra      the top quarter of the blocks is trained (`model.trainable_blocks`); what is below exists once
    lora       one frozen trunk, with adapters for policy, value model and reward model (`model.adapter`)

The batch is small on purpose, so that weights dominate; activations come on top and are the same in all layouts. The
time is of one step on this machine, too short to compare layouts by.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

LAYOUTS: dict[str, dict[str, Any]] = {
    "separate": {},
    "hydra": {"trainable_blocks": 2},
    "lora": {"adapter": {"rank": 16, "alpha": 32}},
}
ROWS = ("one_model", *LAYOUTS)
SHAPES = {
    "full": {"hidden_size": 1024, "layers": 8, "heads": 16, "vocab_size": 2048, "max_positions": 64},
    "quick": {"hidden_size": 512, "layers": 6, "heads": 8, "vocab_size": 2048, "max_positions": 64},
}
TARGET = 1.3  # times one model's memory, for `lora`
TOKENS = 32  # in a forward pass


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.roles", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a smaller model: about a minute")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--only", choices=ROWS, help="measure one row, in this process", default=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help="where models are written (default: a temporary folder)")
    chosen = parser.parse_args(arguments)
    if "only" in chosen:
        print(json.dumps(measured(chosen.only, chosen.folder)))
        return 0
    with tempfile.TemporaryDirectory(prefix="accord-roles-") as temporary:
        rows = all_rows(chosen.folder or Path(temporary), "quick" if chosen.quick else "full")
    result = {
        "peak_mb": {row["layout"]: row["peak_mb"] for row in rows},
        "target": {"layout": "lora", "at_most_times_one_model": TARGET, "met": rows[-1]["times_one_model"] <= TARGET},
        "rows": rows,
    }
    print(json.dumps(result, indent=2) if chosen.json else table(result))
    return 0


def all_rows(folder: Path, size: str) -> list[dict[str, Any]]:
    """Make what the stages start from, then measure each layout in a fresh process."""
    prepare(folder, size)
    rows: list[dict[str, Any]] = []
    for name in ROWS:
        command = [sys.executable, "-m", "benchmarks.roles", "--only", name, "--folder", str(folder)]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        row = json.loads(output.splitlines()[-1])
        one = rows[0] if rows else row
        rows.append(
            row
            | {
                "times_one_model": row["peak_mb"] / one["peak_mb"],
                "times_one_model_above_libraries": row["above_libraries_mb"] / one["above_libraries_mb"],
            }
        )
    return rows


def recipe_of(folder: Path, layout: str, size: str | None = None) -> Any:
    """One PPO step from a base model, with a reward model from the same. `size` builds the base instead of loading."""
    from accord.config import recipe_from

    few = {"max_steps": 1, "batch_size": 2, "micro_batch_tokens": TOKENS, "normalise_on": "none"}
    model = {"scratch": SHAPES[size]} if size else {"path": str(folder / "base" / "model")}
    ppo = {
        "episodes": 4, "prompts_per_step": 2, "samples_per_prompt": 2, "max_new_tokens": 8, "update_epochs": 1,
        "minibatches": 1, "micro_batch_tokens": TOKENS,
    }  # fmt: skip
    return recipe_from(
        {
            "model": model | LAYOUTS.get(layout, {}),
            "data": {"preferences": str(folder / "pairs.jsonl"), "holdout": 0.0, "max_tokens": 24},
            "reward": few,
            "ppo": ppo,
            "threads": 1,
            "out": str(folder / layout if size is None else folder),
        }
    )


def prepare(folder: Path, size: str) -> None:
    """The base model, and the reward model of each layout: in processes of their own, so that nothing of it is left in
    the memory that is measured."""
    folder.mkdir(parents=True, exist_ok=True)
    pairs = [{"prompt": f"ask {i}", "chosen": f"yes {i}", "rejected": f"no {i}"} for i in range(8)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")
    for layout in ("base", *LAYOUTS):
        call = (
            f"import benchmarks.roles as b, pathlib; b.prepare_one(pathlib.Path({str(folder)!r}), {layout!r}, {size!r})"
        )
        subprocess.run([sys.executable, "-c", call], check=True)


def prepare_one(folder: Path, layout: str, size: str) -> None:
    if layout != "base":
        run(folder, layout, "reward")
        return
    from accord.methods.context import Context, base_folder
    from accord.methods.corpus import read_corpus

    recipe = recipe_of(folder, layout, size)
    base_folder(Context(recipe, read_corpus(recipe.data), console()))


def run(folder: Path, layout: str, stage: str) -> dict[str, Any]:
    from accord.methods.corpus import read_corpus
    from accord.pipeline import run_stages

    recipe = recipe_of(folder, layout)
    return run_stages(recipe, read_corpus(recipe.data), [stage], console())[stage]


def console() -> Any:
    from rich.console import Console

    return Console(stderr=True)


def measured(name: str, folder: Path) -> dict[str, Any]:
    """Peak memory of this process after doing what the row says, and what the libraries alone needed."""
    import peft  # noqa: F401  (imported by Accord only where there is an adapter: it must not count as an adapter's)

    import accord.pipeline  # noqa: F401  (everything a stage needs)

    libraries, started = peak_mb(), time.monotonic()
    if name == "one_model":
        sample(folder)
    else:
        run(folder, name, "ppo")
    peak = peak_mb()
    return {
        "layout": name,
        "peak_mb": peak,
        "above_libraries_mb": peak - libraries,
        "libraries_mb": libraries,
        "seconds": time.monotonic() - started,
    }


def sample(folder: Path) -> None:
    """Load the base model, frozen, and sample what a PPO step samples."""
    import torch

    from accord.methods.context import LoadedPolicy
    from accord.rollout.native import NativeSampler, PromptTokens
    from accord.rollout.sampling import Sampling

    torch.set_num_threads(1)
    policy = LoadedPolicy.from_folder(folder / "base" / "model", "auto")
    policy.model.requires_grad_(False)
    prompts = [PromptTokens(tuple(policy.template.tokenizer.encode(f"ask {i}")), i) for i in range(2)]
    sampler = NativeSampler(policy.model, pad_id=policy.pad_id)
    sampler.generate(prompts, 2, Sampling(8, 1.0, stop_ids=policy.template.stop_ids), ("roles",))


def peak_mb() -> float:
    """VmHWM of this process in 10^6 bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) * 1024 / 1e6


def table(result: dict[str, Any]) -> str:
    lines = [f"{'':10} {'peak MB':>9} {'times':>6} {'above libraries MB':>19} {'times':>6} {'seconds':>8}"]
    lines += [
        f"{row['layout']:10} {row['peak_mb']:9,.0f} {row['times_one_model']:6.2f} {row['above_libraries_mb']:19,.0f} "
        f"{row['times_one_model_above_libraries']:6.2f} {row['seconds']:8.1f}"
        for row in result["rows"]
    ]
    verdict = "met" if result["target"]["met"] else "missed"
    return "\n".join([*lines, f"target: lora at most {TARGET} times one model's peak: {verdict}"])


if __name__ == "__main__":
    sys.exit(main())
