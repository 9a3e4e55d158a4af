"""How time and memory grow: an update with its rows, its vocabulary and its model, reading with the size of the file.

    python -m benchmarks.scaling_cost                 all curves, up to ten million rows; an hour or more, alone
    python -m benchmarks.scaling_cost --quick         a few small points of each
    python -m benchmarks.scaling_cost --curves check load     these; all else in the file is kept
    python -m benchmarks.scaling_cost --up-to 1000000         no point beyond

Every point is a process of its own with one thread, so that its peak memory is its own. Time is the median of UPDATES
updates after WARM_UP, or of one reading; memory is the peak less what the process held before. The exponent of a curve
is the slope of its logarithms; where the cost of a step from one point to the next grows faster than linearly, by more
than NOISE in the exponent, that is said.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from accord.atomic import write_json
from accord.report.svg import Series
from accord.training.environment import resident_peak_mb
from benchmarks.command import Command, count, new_file, read_json
from benchmarks.figure import Panel, write_figure

__all__ = ["CURVES", "Curve", "Point", "exponent", "main", "steep"]

Work = Literal["update", "check", "load", "tokens"]

ROOT = Path(__file__).resolve().parents[1]
RESULTS, FIGURE = ROOT / "benchmarks" / "results" / "scaling_cost.json", ROOT / "docs" / "performance-scaling.svg"
WARM_UP, UPDATES = 2, 5
NOISE = 0.15


@dataclass(frozen=True, slots=True)
class Curve:
    """What is varied, over which values, and what an update is otherwise.

    prompt, answer, completions, groups   of a step; a row has prompt + answer tokens
    hidden                                of the model; layers and heads follow
    """

    title: str
    label: str
    work: Work
    values: tuple[int, ...]
    quick: tuple[int, ...]
    vary: str = "rows"
    prompt: int = 64
    answer: int = 64
    completions: int = 1
    groups: int = 8
    vocabulary: int = 4096
    hidden: int = 256
    layout: Literal["plain", "shared"] = "plain"

    def points(self, quick: bool) -> tuple[int, ...]:
        return self.quick if quick else self.values


_ANSWERS = (1, 2, 4, 8, 16)
_ROWS = (10_000, 100_000, 1_000_000, 10_000_000)
CURVES: dict[str, Curve] = {
    "sequence": Curve(
        "tokens in a row", "answer tokens", "update", (64, 128, 256, 512, 1024, 2048), (16, 32), "answer", groups=4
    ),
    "completions-shared": Curve(
        "completions a prompt of 192, prompt once", "completions", "update", _ANSWERS, (1, 2), "completions",
        prompt=192, answer=32, groups=2, layout="shared",
    ),
    "completions-plain": Curve(
        "completions a prompt of 192, prompt each time", "completions", "update", _ANSWERS, (1, 2), "completions",
        prompt=192, answer=32, groups=2,
    ),
    "vocabulary": Curve(
        "vocabulary", "tokens in the vocabulary", "update", (1024, 4096, 16384, 65536), (256, 512), "vocabulary"
    ),
    "batch": Curve("rows of 128 an update", "rows", "update", (4, 8, 16, 32, 64, 128), (2, 4), "groups"),
    "model": Curve("model", "hidden size", "update", (128, 256, 512, 768), (32, 64), "hidden"),
    "check": Curve("accord data check", "rows", "check", _ROWS, (500, 1000)),
    "load": Curve("loading comparisons", "rows", "load", _ROWS, (500, 1000)),
    "tokens": Curve("tokens made and stored", "rows", "tokens", (1000, 10_000, 100_000), (100, 200)),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Point:
    """One measurement; `megabytes` beyond what the process held before."""

    curve: str
    value: int
    seconds: float
    megabytes: float


def exponent(values: Sequence[float], costs: Sequence[float]) -> float:
    """The least-squares slope of log cost against log value. (N,) each, N >= 2. Costs of 0 count as the least there is.

    Tested by: tests/unit/test_benchmark_scaling_cost.py
    """
    least = min((cost for cost in costs if cost > 0), default=1.0)
    return float(np.polyfit(np.log(values), np.log([max(cost, least) for cost in costs]), 1)[0])


def steep(values: Sequence[float], costs: Sequence[float]) -> list[tuple[float, float, float]]:
    """(from, to, exponent) of the steps from point to point in which the cost grows faster than linearly."""
    steps = [(values[i], values[i + 1], exponent(values[i : i + 2], costs[i : i + 2])) for i in range(len(values) - 1)]
    return [step for step in steps if step[2] > 1 + NOISE]


# --- one point, in a process of its own -------------------------------------------------------------------------------


def _measure(name: str, value: int, quick: bool) -> Point:
    curve = CURVES[name]
    if curve.work == "update":
        settings = asdict(curve) | {curve.vary: value}
        return Point(name, value, *_update(settings, 1 if quick else UPDATES))
    with tempfile.TemporaryDirectory(dir=os.environ.get("ACCORD_CACHE")) as folder:
        os.environ["ACCORD_CACHE"] = folder
        path = _write_rows(Path(folder) / "pairs.jsonl", value)
        return Point(name, value, *_reading(curve.work, path))


def _update(settings: dict[str, Any], updates: int) -> tuple[float, float]:
    """Seconds of an SFT update and megabytes beyond the model at rest."""
    import torch

    from accord.config import SFTConfig
    from accord.methods.offline import OfflineTrainer
    from accord.methods.sft import SFTObjective
    from accord.models.load import ModelShape, build_model
    from accord.training.environment import peak_memory_mb

    torch.set_num_threads(1)
    hidden = settings["hidden"]
    shape = ModelShape(hidden, 5, 4, settings["prompt"] + settings["answer"], intermediate_size=hidden * 8 // 3)
    model = build_model(shape, vocab_size=settings["vocabulary"], pad_id=0, eos_id=1, seed=0)
    steps = WARM_UP + updates
    section = SFTConfig.model_validate({"batch_size": settings["groups"], "max_steps": steps, "eval_every": 10**6})
    trainer = OfflineTrainer(
        "sft", model, _groups(settings, steps), section, section, SFTObjective(),
        layout=settings["layout"], pad_id=0, seed=0, evaluate=dict,
    )  # fmt: skip
    before, seconds = peak_memory_mb(), []
    for step in range(1, steps + 1):
        started = time.perf_counter()
        trainer.step(step)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[WARM_UP:]), max(0.0, peak_memory_mb() - before)


def _groups(settings: dict[str, Any], steps: int) -> list[Any]:
    from accord.randomness import generator
    from accord.records import TokenCompletion, TokenGroup

    random = generator("scaling cost")

    def ids(count: int) -> tuple[int, ...]:
        return tuple(random.integers(2, settings["vocabulary"], count).tolist())

    mask = (True,) * settings["answer"]
    return [
        TokenGroup(
            ids(settings["prompt"]),
            tuple(TokenCompletion(ids(len(mask)), mask) for _ in range(settings["completions"])),
        )
        for _ in range(settings["groups"] * steps)
    ]


def _write_rows(path: Path, rows: int) -> Path:
    """Comparisons of about 500 characters, all different."""
    filler = "What people write is longer than this, and not as regular. " * 2
    with path.open("w", encoding="utf-8") as file:
        for i in range(rows):
            row = f"Question {i}. {filler}", f"{filler}It is {i % 997}.", f"{filler}It may be {i % 991}."
            file.write('{"prompt": "%s", "chosen": "%s", "rejected": "%s"}\n' % row)  # noqa: UP031
    return path


def _reading(work: Work, path: Path) -> tuple[float, float]:
    from accord.data.convert import as_kind
    from accord.data.read import read_groups, scan

    if work == "tokens":
        from accord.data.templates import Template
        from accord.models.scratch_tokenizer import train_tokenizer

        template = Template.of(train_tokenizer([path.open().readline()], vocab_size=300))
    for _ in scan(_write_rows(path.with_name("few.jsonl"), 9)):
        pass  # what reading imports is no part of it
    before, started = resident_peak_mb(), time.perf_counter()
    if work == "check":
        for _ in scan(path):
            pass
    else:
        from accord.methods.corpus import split_holdout

        train, _ = split_holdout(as_kind(read_groups(path).groups, "ranked").groups, 0.05)
        if work == "tokens":
            from accord.data.token_store import store_tokens

            limits: dict[str, Any] = {"max_tokens": 1024, "max_prompt_tokens": None, "loss_on": "assistant"}
            started = time.perf_counter()
            store_tokens(train, template, path.parent / "tokens", **limits)
    seconds = time.perf_counter() - started
    return seconds, resident_peak_mb() - before


# --- all points ------------------------------------------------------------------------------------------------------


def _apart(name: str, value: int, quick: bool) -> Point:
    command = [sys.executable, "-m", "benchmarks.scaling_cost", "--point", name, str(value), *["--quick"] * quick]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{name} {value}: {done.stdout[-1000:]}{done.stderr[-3000:]}")
    return Point(**json.loads(done.stdout.splitlines()[-1]))


def _account(name: str, points: Sequence[Point]) -> list[str]:
    """The exponents of a curve in words, and where it is steeper than linear."""
    values = [float(point.value) for point in points]
    lines = []
    for what, costs in (("time", [p.seconds for p in points]), ("memory", [p.megabytes for p in points])):
        lines.append(f"{name}: {what} grows as n^{exponent(values, costs):.2f}")
        lines += [
            f"  faster than linearly from {first:g} to {last:g}: n^{slope:.2f}"
            for first, last, slope in steep(values, costs)
        ]
    return lines


def _panels(name: str, points: Sequence[Point]) -> list[Panel]:
    curve = CURVES[name]
    xs = tuple(math.log2(point.value) for point in points)
    seconds = tuple(math.log2(point.seconds) for point in points)
    linear = Series("linear", xs, tuple(seconds[0] + x - xs[0] for x in xs), 1)
    memory = tuple(point.megabytes for point in points)
    label = f"log2 of {curve.label}"
    return [
        Panel(f"{curve.title}: time", (Series("measured", xs, seconds), linear), label, "log2 of seconds"),
        Panel(f"{curve.title}: memory", (Series("measured", xs, memory),), label, "MB beyond rest"),
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Command("scaling_cost", __doc__)
    parser.add_argument("--quick", action="store_true", help="a few small points of each curve, no figure")
    parser.add_argument("--curves", nargs="+", choices=CURVES, default=list(CURVES), metavar="CURVE")
    parser.add_argument("--up-to", type=count(), metavar="VALUE", help="leave out the points beyond, in every curve")
    parser.add_argument("--out", type=new_file, help=f"the JSON file that is written ({RESULTS.name}, or -quick)")
    parser.add_argument("--figure", type=new_file, help=f"the figure (full form: {FIGURE.relative_to(ROOT)})")
    parser.add_argument("--point", nargs=2, metavar=("CURVE", "VALUE"), help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.point:
        print(json.dumps(asdict(_measure(args.point[0], int(args.point[1]), args.quick))))
        return 0
    out = args.out or (RESULTS.with_stem(f"{RESULTS.stem}-quick") if args.quick else RESULTS)
    try:
        points = _kept(out)
    except ValueError as error:
        parser.error(str(error))
    every = {name: CURVES[name].points(args.quick) for name in args.curves}
    chosen = {name: [v for v in values if args.up_to is None or v <= args.up_to] for name, values in every.items()}
    if not any(chosen.values()):
        parser.error(
            f"no point of {', '.join(chosen)} is at most {args.up_to}: the least is {min(map(min, every.values()))}"
        )
    for name, values in chosen.items():
        if not values:
            print(f"{name}: no point is at most {args.up_to}", file=sys.stderr)
        for value in values:
            points[name, value] = _apart(name, value, args.quick)
            write_json(out, [asdict(point) for point in _sorted(points)])
        of_curve = [point for point in _sorted(points) if point.curve == name]
        if values and len(of_curve) > 1:
            print("\n".join(_account(name, of_curve)), flush=True)
    figure = args.figure or (None if args.quick else FIGURE)
    if figure is not None:
        by_curve = {name: [point for point in _sorted(points) if point.curve == name] for name in CURVES}
        write_figure(figure, [panel for name, found in by_curve.items() if found for panel in _panels(name, found)])
    return 0


def _kept(path: Path) -> dict[tuple[str, int], Point]:
    """The points that lie in a file, by curve and value. Raises: ValueError when it is none of ours."""
    try:
        points = [Point(**row) for row in read_json(path)] if path.exists() else []
    except TypeError:
        points = None
    if points is None or any(point.curve not in CURVES for point in points):
        raise ValueError(f"{path} does not hold the points of these curves: name another file with --out")
    return {(point.curve, point.value): point for point in points}


def _sorted(points: Mapping[tuple[str, int], Point]) -> list[Point]:
    """In the order of the curves, and on each from small to large."""
    order = list(CURVES)
    return sorted(points.values(), key=lambda point: (order.index(point.curve), point.value))


if __name__ == "__main__":
    sys.exit(main())
