"""What each option of memory and precision does to memory and time, on the same updates of the same model.

    python -m benchmarks.toolbox                     a model of 101 million parameters
    python -m benchmarks.toolbox --quick             one of 16 million
    python -m benchmarks.toolbox --only lora,nf4     some of the options; `plain` is always there, to compare with
    python -m benchmarks.toolbox --json              the same as JSON

An option is a few keys of a recipe (`OPTIONS`). For each, a process of its own runs the SFT stage from the same saved
model over the same text. Of its updates it prints

    peak MB          the most memory that was resident at any moment (VmHWM of /proc) up to the last step, and what of
                     that came on top of the imported libraries; pages of the model's file count while they are mapped
    seconds a step   the median, without the first two steps, in which memory is taken and code is compiled
    compiling        seconds spent in that, all steps together
    checkpoint MB    the size of the newest checkpoint
    loss             of the last step: how much of the learning the option keeps

Options take turns, `--repeats` times; printed are medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ADAPTER = {"rank": 16, "alpha": 32}
RATE = {"learning_rate": 1e-3}  # adapters want more than full training
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "adamw_8bit": {"sft": {"optimiser": "adamw_8bit"}},
    "compile": {"model": {"compile": True}},
    "lora": {"model": {"adapter": ADAPTER}, "sft": RATE},
    "dora": {"model": {"adapter": ADAPTER | {"kind": "dora"}}, "sft": RATE},
    "nf4": {"model": {"adapter": ADAPTER, "quantise": "nf4"}, "sft": RATE},
    "nf4_dora": {"model": {"adapter": ADAPTER | {"kind": "dora"}, "quantise": "nf4"}, "sft": RATE},
    "nf4_8bit": {"model": {"adapter": ADAPTER, "quantise": "nf4"}, "sft": RATE | {"optimiser": "adamw_8bit"}},
    "activation_checkpointing": {"model": {"activation_checkpointing": True}},
    "bfloat16": {"model": {"precision": "bfloat16"}},
    "passes_of_128": {"sft": {"micro_batch_tokens": 128}},
    "nf4_checkpointing": {
        "model": {"adapter": ADAPTER, "quantise": "nf4", "activation_checkpointing": True},
        "sft": RATE,
    },
}
SHAPES = {
    "full": {"hidden_size": 1024, "layers": 8, "heads": 16, "vocab_size": 2048, "max_positions": 256},
    "quick": {"hidden_size": 512, "layers": 5, "heads": 8, "vocab_size": 2048, "max_positions": 256},
}
WARM_UP = 2
BATCH, PASS_TOKENS = 8, 512
WORDS = "the cat sat on a mat and saw one small dog run to its old red house in our green town by night".split()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.toolbox", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a smaller model: a few minutes")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--only", help="options to measure, with commas between them")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each option (default: 3)")
    parser.add_argument("--steps", type=int, default=8, help="updates of each run, at least 3 (default: 8)")
    parser.add_argument("--run", choices=OPTIONS, help=argparse.SUPPRESS)  # one option in this process
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    if chosen.run is not None:
        print(json.dumps(measured(chosen.run, chosen.folder, chosen.steps)))
        return 0
    names = list(OPTIONS) if chosen.only is None else ["plain", *(n for n in chosen.only.split(",") if n != "plain")]
    unknown = [name for name in names if name not in OPTIONS]
    if unknown:
        parser.error(f"no such option: {', '.join(unknown)}; there are {', '.join(OPTIONS)}")
    with tempfile.TemporaryDirectory(prefix="accord-toolbox-") as temporary:
        prepare(Path(temporary), "quick" if chosen.quick else "full")
        runs = [run_apart(name, Path(temporary), chosen.steps) for _ in range(chosen.repeats) for name in names]
    rows = [summary(name, [run for run in runs if run["option"] == name]) for name in names]
    print(json.dumps(rows, indent=2) if chosen.json else table(rows))
    return 0


def run_apart(name: str, folder: Path, steps: int) -> dict[str, Any]:
    """One run of an option, in a fresh process."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.toolbox",
        "--run",
        name,
        "--folder",
        str(folder),
        "--steps",
        str(steps),
    ]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(output.splitlines()[-1])


def summary(name: str, runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Medians of an option's runs."""
    return {"option": name, "runs": len(runs)} | {
        key: statistics.median(run[key] for run in runs) for key in runs[0] if key != "option"
    }


def recipe_of(folder: Path, name: str, out: Path, steps: int, size: str | None = None) -> Any:
    """The SFT stage with an option; `size` builds the base model instead of loading it."""
    from accord.config import recipe_from

    option = OPTIONS[name]
    model = {"scratch": SHAPES[size]} if size else {"path": str(folder / "base" / "base" / "model")}
    size_of = {"max_steps": steps, "epochs": steps, "batch_size": BATCH, "micro_batch_tokens": PASS_TOKENS}
    rate = {"schedule": "constant", "warmup_fraction": 0.0, "learning_rate": 1e-4}
    rare = {"eval_every": steps, "checkpoint_every": steps}
    return recipe_from(
        {
            "model": model | option.get("model", {}),
            "data": {"sft": str(folder / "text.jsonl"), "holdout": 0.0, "max_tokens": 128},
            "sft": size_of | rate | rare | option.get("sft", {}),
            "threads": 1,
            "out": str(out),
        }
    )


def prepare(folder: Path, size: str) -> None:
    """Text of many lengths, and the base model: made in a process of its own, so that nothing of it is measured."""
    lines = []
    for i in range(BATCH * 4):
        words = [WORDS[(i * 7 + k * k + 3 * k) % len(WORDS)] for k in range(16 + (i * 13) % 48)]
        lines.append({"prompt": " ".join(words[:12]), "completion": " ".join(words[12:])})
    (folder / "text.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    call = f"import benchmarks.toolbox as b, pathlib; b.build(pathlib.Path({str(folder)!r}), {size!r})"
    subprocess.run([sys.executable, "-c", call], check=True, stdout=sys.stderr)


def build(folder: Path, size: str) -> None:
    from accord.methods.context import Context, base_folder
    from accord.methods.corpus import read_corpus

    recipe = recipe_of(folder, "plain", folder / "base", 1, size)
    base_folder(Context(recipe, read_corpus(recipe.data), console()))


def measured(name: str, folder: Path, steps: int) -> dict[str, Any]:
    """Run the option in this process and read its log."""
    import peft  # noqa: F401  (imported by Accord only where there is an adapter: it must not count as an adapter's)

    import accord.pipeline  # noqa: F401  (everything a stage needs)
    from accord.methods.corpus import read_corpus
    from accord.pipeline import run_stages

    libraries = peak_mb()
    with tempfile.TemporaryDirectory(prefix=f"{name}-", dir=folder) as out:
        recipe = recipe_of(folder, name, Path(out) / "run", steps)
        run_stages(recipe, read_corpus(recipe.data), ["sft"], console())
        stage = Path(out) / "run" / "sft"
        rows = [json.loads(line) for line in (stage / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        newest = sorted((stage / "checkpoints").iterdir())[-1]
        checkpoint = sum(file.stat().st_size for file in newest.iterdir())
    return {
        "option": name,
        "peak_mb": rows[-1]["system/peak_memory_mb"],
        "above_libraries_mb": rows[-1]["system/peak_memory_mb"] - libraries,
        "step_seconds": statistics.median(row["time/step_seconds"] for row in rows[WARM_UP:]),
        "compile_seconds": sum(row.get("time/compile_seconds", 0.0) for row in rows),
        "checkpoint_mb": checkpoint / 1e6,
        "loss": rows[-1]["train/loss"],
    }


def console() -> Any:
    from rich.console import Console

    return Console(stderr=True)


def peak_mb() -> float:
    """The most memory this process ever had, as the stages log it."""
    from accord.training.environment import peak_memory_mb

    return peak_memory_mb()


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown, each number beside its ratio to `plain`."""
    plain = rows[0]
    lines = [
        "| option | peak MB | above the libraries | seconds a step | compiling | checkpoint MB | loss |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        above, step = "above_libraries_mb", "step_seconds"
        lines.append(
            f"| {row['option']} | {row['peak_mb']:,.0f} | {row[above]:,.0f} ({row[above] / plain[above]:.2f}x) "
            f"| {row[step]:.2f} ({row[step] / plain[step]:.2f}x) | {row['compile_seconds']:.0f} "
            f"| {row['checkpoint_mb']:,.0f} | {row['loss']:.3f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
