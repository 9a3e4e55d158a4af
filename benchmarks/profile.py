"""Where an iteration's time goes: SFT, DPO and PPO at two sizes by `accord profile`, and a table for the docs.

    python -m benchmarks.profile                     all of them (minutes at 5M, longer at 15M; alone on the machine)
    python -m benchmarks.profile --model 15M --work dpo
    python -m benchmarks.profile --quick             two iterations of each instead of five

    sft    16 answers of mixed lengths, 8 to 512 tokens with their prompts
    dpo    16 pairs, prompts of 192 tokens and answers of 32
    ppo    32 prompts of 32 tokens, answers of up to 48, four models of one size, 4 passes of 4 updates

The models are those of `benchmarks.speed`: Llama-like, random weights, a vocabulary of 4,096 entries. Prints each
profile, then the table, and writes benchmarks/results/profile.json.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from accord.atomic import write_json
from accord.config import Recipe, recipe_from
from accord.methods.corpus import Corpus, Part
from accord.profiling.account import PHASES, StageProfile
from accord.profiling.run import profile_stages, show
from accord.records import Completion, Group, Message, TokenGroup
from accord.training.allocator import keep_freed_memory
from accord.training.environment import environment
from benchmarks.command import Command, count, new_file
from benchmarks.speed.work import END, Work, groups_of, prepare

WORKS = ("sft", "dpo", "ppo")
MODELS = ("5M", "15M")
GROUPS = 320
LATEST = Path(__file__).parent / "results" / "profile.json"
SECTIONS: dict[str, dict[str, Any]] = {
    "sft": {"batch_size": 16},
    "dpo": {"batch_size": 16},
    "ppo": {
        "prompts_per_step": 32,
        "samples_per_prompt": 1,
        "max_new_tokens": 48,
        "update_epochs": 4,
        "minibatches": 4,
    },
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = Command("profile", __doc__)
    parser.add_argument("--work", choices=WORKS, action="append", help="this one only; may be repeated")
    parser.add_argument("--model", choices=MODELS, action="append", help="this size only; may be repeated")
    parser.add_argument("--quick", action="store_true", help="two iterations instead of five")
    parser.add_argument("--threads", type=count(), default=os.cpu_count(), help="threads (default: all)")
    parser.add_argument("--out", type=new_file, help=f"the numbers, as JSON ({LATEST.name}, or -quick)")
    args = parser.parse_args(arguments)
    keep_freed_memory()
    console = Console(width=140)
    rows: list[tuple[str, StageProfile]] = []
    for model in args.model or MODELS:
        for work in args.work or WORKS:
            with tempfile.TemporaryDirectory(prefix="accord-profile-") as folder:
                prepare(Work("reward", 1, 1, 2, 2, model=model), Path(folder))
                found = profile_stages(
                    recipe_of(work, Path(folder), args.threads), corpus_of(work), [work], console,
                    out=Path(folder) / "profile", steps=2 if args.quick else 5, warm_up=1 if args.quick else 2,
                )  # fmt: skip
            console.print(f"\n[bold]{work}, {model}[/]")
            show(found, console)
            rows.append((model, found.stages[0]))
    print(f"\n{table(rows)}")
    out = args.out or (LATEST.with_stem(f"{LATEST.stem}-quick") if args.quick else LATEST)
    write_json(
        out,
        {"environment": environment(), "rows": [{"model": model, **asdict(profile)} for model, profile in rows]},
    )
    print(f"\nnumbers: {out}")


def recipe_of(work: str, folder: Path, threads: int | None) -> Recipe:
    """The recipe of one work, on the models that `prepare` wrote to `folder`."""
    section = dict(SECTIONS[work])
    if work == "ppo":
        section["reward_model"] = str(folder / "reward")
    return recipe_from(
        {
            "model": {"path": str(folder / "policy"), "template": "raw"},
            "data": {"holdout": 0.05, "max_tokens": 1024},
            "threads": threads,
            "out": str(folder / "run"),
            work: section,
        }
    )


def corpus_of(work: str) -> Corpus:
    """Words by Zipf's law, as `benchmarks.speed` has them; lengths are in tokens, an answer's end included."""
    wanted = {
        "sft": Work("sft", GROUPS, None, None, updates=1),
        "dpo": Work("dpo", GROUPS, 192, 32, 2, updates=1),
        "ppo": Work("dpo", GROUPS, 32, 2, 2, updates=1),
    }
    (groups,) = groups_of(wanted[work])
    if work == "sft":
        return Corpus(sft=Part.of([_group(group, ({},)) for group in groups], "words"))
    if work == "dpo":
        return Corpus(preferences=Part.of([_group(group, ({"rank": 0}, {"rank": 1})) for group in groups], "words"))
    return Corpus(prompts=Part.of([_group(group, ()) for group in groups], "words"))


def _group(tokens: TokenGroup, known: Sequence[dict[str, int]]) -> Group:
    """The tokens as text, with as many completions as something is known of."""
    completions = tuple(
        Completion((Message("assistant", _text(completion.ids)),), **facts)
        for completion, facts in zip(tokens.completions, known, strict=False)
    )
    return Group((Message("user", _text(tokens.prompt_ids)),), completions)


def _text(ids: Sequence[int]) -> str:
    return " ".join(f"w{i}" for i in ids if i != END)


def table(rows: Sequence[tuple[str, StageProfile]]) -> str:
    """A row a work and size: seconds, the bound, the update's part of the peak, and each phase's share of the seconds,
    with the part of the peak it reaches where it is arithmetic."""
    names = [name for name in PHASES if any(row.phase == name for _, profile in rows for row in profile.rows)]
    head = ["work", "model", "an iteration", "bound", "updates of peak", *names]
    lines = [head, ["---"] * len(head)]
    for model, profile in rows:
        by_name = {row.phase: row for row in profile.rows}
        cells = [
            f"{row.share:.1%}" + (f" ({row.of_peak:.0%})" if row.useful else "") if row is not None else ""
            for row in (by_name.get(name) for name in names)
        ]
        bound = f"{profile.total.bound:.2f} s, {profile.total.bound / profile.total.seconds:.0%}"
        update = f"{profile.update.of_peak:.0%}"
        lines.append([profile.stage, model, f"{profile.seconds:.2f} s", bound, update, *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    main()
