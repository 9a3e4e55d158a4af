"""What each option of memory and precision does to memory and time, on the same updates of the same model.

    python -m benchmarks.toolbox                     a model of 101 million parameters; about 20 minutes, alone
    python -m benchmarks.toolbox --quick             one of 16 million throughout
    python -m benchmarks.toolbox --only lora,nf4     some of the options; `plain` is always there, to compare with
    python -m benchmarks.toolbox --page FILE         write what lies in --out into this page; nothing is run

An option is a few keys of a recipe (`OPTIONS`). For each, a process of its own runs the SFT stage from the same saved
model over the same text. Of its updates are given

    peak MB          the most memory that was resident at any moment (VmHWM of /proc) up to the last step, less what the
                     imported libraries held; pages of the model's file count while they are mapped
    seconds a step   the median, without the first two steps, in which memory is taken and code is compiled
    compiling        seconds spent in that, all steps together
    checkpoint MB    the size of the newest checkpoint
    loss             of the last step: how much of the learning the option keeps

Options take turns, `--repeats` times; given are medians, and what they are beside `plain`'s of the same model. Three
options run once: `compile`, which takes minutes, and those of 16 bits, whose products most CPUs have no instruction
for: a step of the larger model would take minutes, so they run three steps of the smaller one. Results are written
after every run. What PPO's roles share is measured by `benchmarks.roles`, values on the policy's trunk by
`benchmarks.speed --work ppo-one-trunk`; `model.offload` needs a GPU and is not measured.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from accord.atomic import write_json
from benchmarks.command import Command, count, new_file, page_file, read_json, refuse, write_between

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "toolbox.json"


@dataclass(frozen=True, slots=True)
class Option:
    """Keys of a recipe, by section, and how a page calls them. `once`: one run instead of several; `slow`: that run has
    as few steps as can be timed, of the smaller model."""

    title: str
    model: dict[str, Any] = field(default_factory=dict)
    sft: dict[str, Any] = field(default_factory=dict)
    once: bool = False
    slow: bool = False


LORA, DORA = ({"adapter": {"rank": 16, "alpha": 32, "kind": kind}} for kind in ("lora", "dora"))
NF4 = LORA | {"quantise": "nf4"}
RATE = {"learning_rate": 1e-3}  # adapters want more than full training
OPTIONS: dict[str, Option] = {
    "plain": Option("nothing: all weights, float32"),
    "accumulation": Option("`micro_batch_tokens: 128` instead of 512", sft={"micro_batch_tokens": 128}),
    "activation_checkpointing": Option("`model.activation_checkpointing`", {"activation_checkpointing": True}),
    "adamw_8bit": Option("`optimiser: adamw_8bit`", sft={"optimiser": "adamw_8bit"}),
    "compile": Option("`model.compile`", {"compile": True}, once=True),
    "lora": Option("`model.adapter: {rank: 16}`, LoRA", LORA, RATE),
    "dora": Option("`model.adapter: {kind: dora, rank: 16}`", DORA, RATE),
    "nf4": Option("LoRA with `model.quantise: nf4`", NF4, RATE),
    "nf4_dora": Option("DoRA with `model.quantise: nf4`", DORA | {"quantise": "nf4"}, RATE),
    "nf4_8bit": Option("LoRA with `nf4` and `adamw_8bit`", NF4, RATE | {"optimiser": "adamw_8bit"}),
    "nf4_checkpointing": Option(
        "LoRA with `nf4` and `activation_checkpointing`", NF4 | {"activation_checkpointing": True}, RATE
    ),
    "bfloat16": Option("`model.precision: bfloat16`", {"precision": "bfloat16"}, once=True, slow=True),
    "float16": Option("`model.precision: float16`", {"precision": "float16"}, once=True, slow=True),
}
SHAPES = {
    "101M": {"hidden_size": 1024, "layers": 8, "heads": 16, "vocab_size": 2048, "max_positions": 256},
    "16M": {"hidden_size": 512, "layers": 5, "heads": 8, "vocab_size": 2048, "max_positions": 256},
}
LARGE, SMALL = SHAPES
WARM_UP = 2
STEPS, REPEATS = 6, 3
BATCH, PASS_TOKENS = 8, 512
WORDS = "the cat sat on a mat and saw one small dog run to its old red house in our green town by night".split()


@dataclass(frozen=True, slots=True)
class Job:
    """What an option is measured by: `runs` of so many steps of a model."""

    option: str
    model: str
    steps: int
    runs: int


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Command("toolbox", __doc__)
    parser.add_argument("--quick", action="store_true", help="the smaller model throughout")
    parser.add_argument("--only", help="options to measure, with commas between them")
    parser.add_argument("--repeats", type=count(), default=REPEATS, help=f"runs of each option (default: {REPEATS})")
    parser.add_argument(
        "--steps", type=count(WARM_UP + 1), default=STEPS, help=f"updates of each run (default: {STEPS})"
    )
    parser.add_argument("--threads", type=count(), default=os.cpu_count(), help="threads of each run (default: all)")
    parser.add_argument("--out", type=new_file, help=f"the results ({RESULTS.name}, -quick, or -some with --only)")
    parser.add_argument("--page", type=page_file, help="write what lies in --out into this page, and run nothing")
    parser.add_argument("--run", nargs=3, metavar=("OPTION", "MODEL", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.run is not None:  # one run, in this process
        option, model, folder = args.run
        print(json.dumps(measured(option, Path(folder) / model, args.steps, args.threads)))
        return 0
    kind = "-some" * (args.only is not None) + "-quick" * args.quick
    out = args.out or RESULTS.with_stem(RESULTS.stem + kind)
    if args.page is not None:
        publish(out, args.page)
        return 0
    names = list(OPTIONS) if args.only is None else args.only.split(",")
    unknown = [name for name in names if name not in OPTIONS]
    if unknown:
        parser.error(f"no such option: {', '.join(unknown)}; there are {', '.join(OPTIONS)}")
    rows: list[dict[str, Any]] = []
    machine = machine_of(args.threads)
    for rows in measure(jobs(names, args.quick, args.steps, args.repeats), args.threads):
        write_json(out, {"machine": machine, "rows": rows})  # after every run: a stop keeps what there is
    print(f"{table(rows)}\n\nnumbers: {out}")
    return 0


def machine_of(threads: int) -> dict[str, Any]:
    from accord.training.environment import environment

    return {**environment(), "threads": threads, "date": f"{datetime.now(UTC):%Y-%m-%d}"}


def jobs(names: Sequence[str], quick: bool, steps: int, repeats: int) -> list[Job]:
    """What is run for these options: each once, and before it `plain` with every model that one of them has."""
    found = [
        Job(
            name,
            SMALL if quick or OPTIONS[name].slow else LARGE,
            WARM_UP + 1 if OPTIONS[name].slow else steps,
            1 if OPTIONS[name].once else repeats,
        )
        for name in dict.fromkeys(names)
        if name != "plain"
    ]
    models = [model for model in SHAPES if model in {job.model for job in found}] or [SMALL if quick else LARGE]
    # As many steps as what is compared with it, for the last losses are, too.
    most = {model: max((job.steps for job in found if job.model == model), default=steps) for model in models}
    plain = [Job("plain", model, most[model], repeats) for model in models]
    return [job for own in plain for job in (own, *(job for job in found if job.model == own.model))]


def measure(todo: Sequence[Job], threads: int) -> Iterator[list[dict[str, Any]]]:
    """After every run the rows of all runs so far, the options taking turns."""
    runs: dict[Job, list[dict[str, Any]]] = {job: [] for job in todo}
    with tempfile.TemporaryDirectory(prefix="accord-toolbox-") as folder:
        for model in {job.model: None for job in todo}:
            prepare(Path(folder) / model, model)
        turns = [(turn, job) for turn in range(max(job.runs for job in todo)) for job in todo if turn < job.runs]
        for number, (turn, job) in enumerate(turns, 1):
            started = time.monotonic()
            runs[job].append(run_apart(job, Path(folder), threads))
            took = time.monotonic() - started
            what = f"{job.option}, {job.model}, run {turn + 1} of {job.runs}"
            print(f"{number}/{len(turns)}: {what}: {took:.0f} s", file=sys.stderr, flush=True)
            yield [summary(job, done) for job, done in runs.items() if done]


def run_apart(job: Job, folder: Path, threads: int) -> dict[str, Any]:
    """One run of an option, in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.toolbox", "--run", job.option, job.model, str(folder)]
    command += ["--steps", str(job.steps), "--threads", str(threads)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{job.option}, {job.model}: {done.stdout[-1000:]}{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def summary(job: Job, runs: Sequence[dict[str, float]]) -> dict[str, Any]:
    """Medians of an option's runs so far."""
    medians = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
    return {**asdict(job), "runs": len(runs), **medians}


def recipe_of(folder: Path, name: str, out: Path, steps: int, threads: int = 1, scratch: str | None = None) -> Any:
    """The SFT stage with an option; `scratch` builds the base model of this size instead of loading it."""
    from accord.config import recipe_from

    option = OPTIONS[name]
    model = {"scratch": SHAPES[scratch]} if scratch else {"path": str(folder / "base" / "base" / "model")}
    size_of = {"max_steps": steps, "epochs": steps, "batch_size": BATCH, "micro_batch_tokens": PASS_TOKENS}
    rate = {"schedule": "constant", "warmup_fraction": 0.0, "learning_rate": 1e-4}
    rare = {"eval_every": steps, "checkpoint_every": steps}
    return recipe_from(
        {
            "model": model | option.model,
            "data": {"sft": str(folder / "text.jsonl"), "holdout": 0.0, "max_tokens": 128},
            "sft": size_of | rate | rare | option.sft,
            "threads": threads,
            "out": str(out),
        }
    )


def prepare(folder: Path, model: str) -> None:
    """Text of many lengths, and the base model: made in a process of its own, so that nothing of it is measured."""
    folder.mkdir()
    lines = []
    for i in range(BATCH * 4):
        words = [WORDS[(i * 7 + k * k + 3 * k) % len(WORDS)] for k in range(16 + (i * 13) % 48)]
        lines.append({"prompt": " ".join(words[:12]), "completion": " ".join(words[12:])})
    (folder / "text.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    call = f"import benchmarks.toolbox as b, pathlib; b.build(pathlib.Path({str(folder)!r}), {model!r})"
    subprocess.run([sys.executable, "-c", call], check=True, stdout=sys.stderr)


def build(folder: Path, model: str) -> None:
    from accord.methods.context import Context, base_folder
    from accord.methods.corpus import read_corpus

    recipe = recipe_of(folder, "plain", folder / "base", 1, scratch=model)
    base_folder(Context(recipe, read_corpus(recipe.data), console()))


def measured(name: str, folder: Path, steps: int, threads: int) -> dict[str, float]:
    """Run the option in this process and read its log."""
    import peft  # noqa: F401  (imported by Accord only where there is an adapter: it must not count as an adapter's)

    import accord.pipeline  # noqa: F401  (everything a stage needs)
    from accord.methods.corpus import read_corpus
    from accord.pipeline import run_stages

    libraries = peak_mb()
    with tempfile.TemporaryDirectory(prefix=f"{name}-", dir=folder) as out:
        recipe = recipe_of(folder, name, Path(out) / "run", steps, threads)
        run_stages(recipe, read_corpus(recipe.data), ["sft"], console())
        stage = Path(out) / "run" / "sft"
        rows = [json.loads(line) for line in (stage / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        newest = sorted((stage / "checkpoints").iterdir())[-1]
        checkpoint = sum(file.stat().st_size for file in newest.iterdir())
    return {
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
    """Markdown, each number beside its ratio to `plain` with the same model."""
    lines = [
        "| option | model | runs x updates | peak MB above the libraries | seconds a step | compiling, s "
        "| checkpoint MB | loss of the last update |",
        "|---" * 8 + "|",
    ]
    for row in rows:
        plain = next(other for other in rows if (other["option"], other["model"]) == ("plain", row["model"]))
        memory, seconds = (f"({row[key] / plain[key]:.2f}x)" for key in ("above_libraries_mb", "step_seconds"))
        lines.append(
            f"| {OPTIONS[row['option']].title} | {row['model']} | {row['runs']} x {row['steps']} "
            f"| {row['above_libraries_mb']:,.0f} {memory} | {row['step_seconds']:.2f} {seconds} "
            f"| {row['compile_seconds']:.0f} | {row['checkpoint_mb']:,.0f} | {row['loss']:.3f} |"
        )
    return "\n".join(lines)


def publish(results: Path, page: Path) -> None:
    """Write the table into a page, between its marks `toolbox`; what is no full run is refused."""
    try:
        found = read_json(results)
        rows = found["rows"]
        done = {(row["option"], row["model"], row["steps"]): row["runs"] for row in rows}
        full = jobs(list(OPTIONS), False, STEPS, REPEATS)
        missing = sorted(job.option for job in full if done.get((job.option, job.model, job.steps), 0) < job.runs)
        if missing:
            raise ValueError(f"{results} lacks {', '.join(missing)}: a page shows a full run")
        machine = found["machine"]
        head = (
            f"Measured on {machine['date']}: {machine['cpu']}, {machine['threads']} threads, "
            f"{machine['memory_bytes'] / 1e9:,.0f} GB, torch {machine['torch']}."
        )
        write_between(page, "toolbox", f"{head}\n\n{table(rows)}")
    except (KeyError, TypeError):
        refuse("benchmarks.toolbox", f"{results} does not hold results of this benchmark: name another with --out")
    except ValueError as error:
        refuse("benchmarks.toolbox", str(error))


if __name__ == "__main__":
    sys.exit(main())
