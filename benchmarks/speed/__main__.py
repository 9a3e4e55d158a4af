"""Times Accord and its peers at the same work, one process a run, taking turns; prints a table and writes JSON.

    python -m benchmarks.speed                       everything (about an hour on two processors)
    python -m benchmarks.speed --work dpo            the works whose name begins so, or the one that is called so
    python -m benchmarks.speed --quick               two turns each instead of five
    python -m benchmarks.speed --allocator as-is     both sides without the allocator settings that both have otherwise
    python -m benchmarks.speed --figure FILE         draw results that lie in --out into this SVG; nothing is run
    python -m benchmarks.speed --page FILE           write them into this page of the documentation; nothing is run

The peer is TRL, for PPO an older one in an environment of its own (--ppo-python), and for sampling transformers'
`generate`. Both sides start from the same weights, make the same updates of the same batches, in float32 with the same
AdamW and threads, and have the same allocator settings, for those are anyone's. The first update of a run is not timed,
of the others the mean counts; where both sides sample, an update is a whole iteration, in PPO with 16 updates inside,
and with 32k words the only one. A ratio is of two runs side by side; of five turns the median, the lowest and the
highest are given. Peak memory is what was resident at most, libraries included. `once` is what comes before the first
update: reference log-probabilities, checks, and on TRL's side tokenising.

`same_learning`: the losses of all updates agree to 1e-4. Where both sides sample for themselves the losses say nothing.
There a run apart, not timed, gives both the same completions, and after each update the mean log-probability of these
under both policies must agree to 1e-4. Sampling: both write the same tokens when they always take the likeliest.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

from accord.atomic import write_json
from accord.training.environment import environment
from benchmarks.speed.figure import write_bars
from benchmarks.speed.results import row_of, table, write_page
from benchmarks.speed.work import WORKS, Timing, Work, prepare

SIDES = ("accord", "peer")
ROOT = Path(__file__).parents[2]
LATEST = ROOT / "benchmarks" / "results" / "latest.json"
PPO_PYTHON = ROOT / ".venv-ppo" / "bin" / "python"


@dataclass(frozen=True, slots=True)
class Setup:
    """What all runs have in common."""

    threads: int
    allocator: str
    ppo_python: Path

    def python(self, work: Work, side: str) -> str:
        """The interpreter that has the side's library."""
        return str(self.ppo_python) if work.kind == "ppo" and side == "peer" else sys.executable


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--work", default="", help="the work called so, or else those whose name begins so")
    parser.add_argument("--turns", type=_count, default=5, help="runs of each side")
    parser.add_argument("--quick", action="store_true", help="two turns instead of five")
    parser.add_argument("--allocator", choices=("kept", "as-is"), default="kept", help="kept: freed memory stays")
    parser.add_argument("--threads", type=_count, default=os.cpu_count(), help="threads of each run")
    parser.add_argument("--ppo-python", type=Path, default=PPO_PYTHON, help="an interpreter that has TRL 1.12, for PPO")
    parser.add_argument("--out", type=Path, default=LATEST, help="the results, as JSON")
    parser.add_argument("--figure", type=Path, help="draw what lies in --out, and run nothing")
    parser.add_argument("--page", type=Path, help="write what lies in --out into this page, and run nothing")
    parser.add_argument("--one", nargs=4, metavar=("WORK", "SIDE", "FOLDER", "APART"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    setup = Setup(args.threads, args.allocator, args.ppo_python)
    if args.one:
        name, side, folder, apart = args.one
        print(json.dumps(asdict(_one(WORKS[name], side, Path(folder), apart == "apart", setup))))
    elif args.figure or args.page:
        _publish(args.out, args.figure, args.page)
    else:
        _measure(_chosen(args.work), 2 if args.quick else args.turns, setup, args)


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected a whole number of at least 1")
    return int(text)


def _chosen(work: str) -> list[str]:
    names = [work] if work in WORKS else [name for name in WORKS if name.startswith(work)]
    if not names:
        _refuse(f"no work begins with {work!r}; there are {', '.join(WORKS)}")
    return names


def _refuse(reason: str) -> NoReturn:
    print(f"benchmarks.speed: {reason}", file=sys.stderr)
    sys.exit(2)


def _measure(names: Sequence[str], turns: int, setup: Setup, args: argparse.Namespace) -> None:
    if any(WORKS[name].kind == "ppo" for name in names) and not setup.ppo_python.exists():
        _refuse(
            f"TRL 1.12, the last with PPO, needs an environment of its own, and {setup.ppo_python} is not there: "
            "`make bench` makes it; or name another interpreter with --ppo-python, or other works with --work"
        )
    date = f"{datetime.now(UTC):%Y-%m-%d}"
    machine = {**environment(), "threads": setup.threads, "allocator": setup.allocator, "date": date}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for rows in _turns(names, turns, setup):
        write_json(args.out, {"machine": machine, "rows": rows})  # after every turn: an hour is long
    print(table(rows))


def _publish(results: Path, figure: Path | None, page: Path | None) -> None:
    if not results.exists():
        _refuse(f"there are no results in {results}: run `make bench` first, or name others with --out")
    found = json.loads(results.read_text(encoding="utf-8"))
    if figure is not None:
        write_bars(figure, found["rows"])
    if page is not None:
        try:
            write_page(page, found)
        except ValueError as error:
            _refuse(str(error))


# --- runs ------------------------------------------------------------------------------------------------------------


def _one(work: Work, side: str, folder: Path, apart: bool, setup: Setup) -> Timing:
    """One run, in this process: timed, or the one apart by which learning is compared."""
    if setup.allocator == "kept":
        from accord.training.allocator import keep_freed_memory

        keep_freed_memory()
    import torch

    torch.set_num_threads(setup.threads)
    if work.by_losses:
        module = "accord_side" if side == "accord" else "trl_side"
        return import_module(f"benchmarks.speed.{module}").run(work, folder)
    peers = {"ppo": "trl_ppo", "sampling": "generate_side"}
    module = "accord_online" if side == "accord" else peers.get(work.kind, "trl_online")
    return import_module(f"benchmarks.speed.{module}").run(work, folder, apart)


def _turns(names: Sequence[str], turns: int, setup: Setup) -> Iterator[list[dict[str, Any]]]:
    """After every turn a row for each work, from all runs so far, the sides taking turns, and who begins too."""
    timings: dict[str, dict[str, list[Timing]]] = {name: {side: [] for side in SIDES} for name in names}
    apart: dict[str, list[Timing]] = {}
    with tempfile.TemporaryDirectory(prefix="accord-speed-") as temporary:
        folders = {name: Path(temporary) / name for name in names}
        for name in names:
            prepare(WORKS[name], folders[name])
            if not WORKS[name].by_losses:
                apart[name] = [_in_process(name, side, folders[name], "apart", setup) for side in SIDES]
        for turn in range(turns):
            for name in names:
                for side in SIDES if turn % 2 == 0 else SIDES[::-1]:
                    started = time.monotonic()
                    timings[name][side].append(_in_process(name, side, folders[name], "timed", setup))
                    took = time.monotonic() - started
                    print(f"turn {turn + 1} of {turns}: {name}, {side}: {took:.0f} s", file=sys.stderr, flush=True)
            yield [row_of(name, WORKS[name], *timings[name].values(), apart=apart.get(name, ())) for name in names]


def _in_process(name: str, side: str, folder: Path, apart: str, setup: Setup) -> Timing:
    command = [setup.python(WORKS[name], side), "-m", "benchmarks.speed", "--one", name, side, str(folder), apart]
    options = ["--threads", str(setup.threads), "--allocator", setup.allocator]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(setup.threads),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    done = subprocess.run([*command, *options], env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{name}, {side} failed:\n{done.stdout[-1000:]}{done.stderr[-4000:]}")
    return Timing(**json.loads(done.stdout.splitlines()[-1]))


if __name__ == "__main__":
    main()
