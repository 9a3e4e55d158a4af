"""Times Accord and TRL at the same work, one process a run, taking turns; prints a table and writes JSON.

    python -m benchmarks.speed                       everything (about an hour on two processors)
    python -m benchmarks.speed --work dpo            the works whose name begins so
    python -m benchmarks.speed --quick               two turns each instead of five
    python -m benchmarks.speed --allocator as-is     both sides without the allocator settings that both have otherwise

Both sides start from the same weights, make the same updates of the same batches, in float32 with the same AdamW and
threads, and have the same allocator settings, for those are anyone's. A run makes 8 updates, of which the mean of the
last 6 counts; a ratio is of two runs side by side; of five turns the median, the lowest and the highest are given. Peak
memory is what was resident at most, libraries included. `same_learning`: the losses of all updates agree to 1e-4.
`once` is what comes before the first update: reference log-probabilities, checks, and on TRL's side tokenising.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean, median
from typing import Any

from accord.atomic import write_json
from accord.training.environment import environment
from benchmarks.speed.work import WARM_UP, WORKS, Timing, Work, groups_of, prepare

SIDES = ("accord", "trl")
AGREE = 1e-4  # of losses, absolute, or as a share of those above 1
LATEST = Path(__file__).parents[1] / "results" / "latest.json"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--work", default="", help="only works whose name begins so")
    parser.add_argument("--turns", type=int, default=5, help="runs of each side")
    parser.add_argument("--quick", action="store_true", help="two turns instead of five")
    parser.add_argument("--allocator", choices=("kept", "as-is"), default="kept", help="kept: freed memory stays")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads of each run")
    parser.add_argument("--out", type=Path, default=LATEST, help="the results, as JSON")
    parser.add_argument("--one", nargs=3, metavar=("WORK", "SIDE", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(
            json.dumps(asdict(_one(WORKS[args.one[0]], args.one[1], Path(args.one[2]), args.threads, args.allocator)))
        )
        return
    names = [name for name in WORKS if name.startswith(args.work)]
    if not names:
        sys.exit(f"no work begins with {args.work!r}; there are {', '.join(WORKS)}")
    timings = _all(names, 2 if args.quick else args.turns, args.threads, args.allocator)
    rows = [_row(name, WORKS[name], timings[name]) for name in names]
    machine = {
        **environment(),
        "threads": args.threads,
        "allocator": args.allocator,
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(args.out, {"machine": machine, "rows": rows})
    print(table(rows))


# --- runs ------------------------------------------------------------------------------------------------------------


def _one(work: Work, side: str, folder: Path, threads: int, allocator: str) -> Timing:
    """One run, in this process."""
    if allocator == "kept":
        from accord.training.allocator import keep_freed_memory

        keep_freed_memory()
    import torch

    torch.set_num_threads(threads)
    if side == "accord":
        from benchmarks.speed.accord_side import run
    else:
        from benchmarks.speed.trl_side import run
    return run(work, folder)


def _all(names: Sequence[str], turns: int, threads: int, allocator: str) -> dict[str, dict[str, list[Timing]]]:
    """All runs, by work and side, the sides taking turns, and who begins too."""
    timings: dict[str, dict[str, list[Timing]]] = {name: {side: [] for side in SIDES} for name in names}
    with tempfile.TemporaryDirectory(prefix="accord-speed-") as temporary:
        for name in names:
            prepare(WORKS[name], Path(temporary) / name)
        for turn in range(turns):
            for name in names:
                for side in SIDES if turn % 2 == 0 else SIDES[::-1]:
                    started = time.monotonic()
                    timings[name][side].append(_in_process(name, side, Path(temporary) / name, threads, allocator))
                    took = time.monotonic() - started
                    print(f"turn {turn + 1} of {turns}: {name}, {side}: {took:.0f} s", file=sys.stderr, flush=True)
    return timings


def _in_process(name: str, side: str, folder: Path, threads: int, allocator: str) -> Timing:
    command = [sys.executable, "-m", "benchmarks.speed", "--one", name, side, str(folder)]
    options = ["--threads", str(threads), "--allocator", allocator]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    done = subprocess.run([*command, *options], env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{name}, {side} failed:\n{done.stdout[-1000:]}{done.stderr[-4000:]}")
    return Timing(**json.loads(done.stdout.splitlines()[-1]))


# --- what came of it -------------------------------------------------------------------------------------------------


def _row(name: str, work: Work, timings: Mapping[str, Sequence[Timing]]) -> dict[str, Any]:
    amount = work.amount([group for step in groups_of(work)[WARM_UP:] for group in step]) / len(
        groups_of(work)[WARM_UP:]
    )
    seconds = {side: [_update(timing) for timing in timings[side]] for side in SIDES}
    ratios = sorted(peer / own for own, peer in zip(seconds["accord"], seconds["trl"], strict=True))
    peak, once, rest = (
        {side: median(getattr(timing, field) for timing in timings[side]) for side in SIDES}
        for field in ("peak_mb", "once", "at_rest_mb")
    )
    own, peer = timings["accord"][0], timings["trl"][0]
    apart = max(abs(a - b) / max(1.0, abs(a)) for a, b in zip(own.losses, peer.losses, strict=True))
    return {
        "work": name,
        "model": work.model,
        "vocabulary": work.vocabulary,
        "unit": work.unit,
        "accord": amount / median(seconds["accord"]),
        "peer": amount / median(seconds["trl"]),
        "ratio": median(ratios),
        "ratio_low": ratios[0],
        "ratio_high": ratios[-1],
        "memory_ratio": peak["accord"] / peak["trl"],
        "same_learning": apart <= AGREE,
        "losses_apart": apart,
        "accord_mb": peak["accord"],
        "peer_mb": peak["trl"],
        "accord_at_rest_mb": rest["accord"],
        "peer_at_rest_mb": rest["trl"],
        "accord_once_seconds": once["accord"],
        "peer_once_seconds": once["trl"],
        "turns": len(ratios),
        "peer_version": f"trl {peer.version}",
        "accord_version": own.version,
    }


def _update(timing: Timing) -> float:
    """Seconds of an update, mean over those that are timed: where lengths are mixed, no two are alike."""
    return fmean(timing.seconds[WARM_UP:])


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = ["| work | model, vocabulary | unit | Accord | TRL | speed | memory | once, s | same losses |",
             "|---|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for row in rows:
        speed = f"{row['ratio']:.2f}x ({row['ratio_low']:.2f} to {row['ratio_high']:.2f})"
        memory = f"{row['memory_ratio']:.2f}x ({row['accord_mb']:,.0f} / {row['peer_mb']:,.0f} MB)"
        once = f"{row['accord_once_seconds']:.1f} / {row['peer_once_seconds']:.1f}"
        agree = "yes" if row["same_learning"] else f"no ({row['losses_apart']:.1e})"
        lines.append(
            f"| {row['work']} | {row['model']}, {row['vocabulary']:,} | {row['unit']} | {row['accord']:,.1f} "
            f"| {row['peer']:,.1f} | {speed} | {memory} | {once} | {agree} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
