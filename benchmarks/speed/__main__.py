"""Times Accord and its peers at the same work, one process a run, taking turns; prints a table and writes JSON.

    python -m benchmarks.speed                       everything (about an hour on two processors)
    python -m benchmarks.speed --work dpo            the works whose name begins so, or the one that is called so
    python -m benchmarks.speed --quick               two turns each instead of five
    python -m benchmarks.speed --allocator as-is     both sides without the allocator settings that both have otherwise
    python -m benchmarks.speed --figure FILE         draw results that lie in --out into this SVG; nothing is run
    python -m benchmarks.speed --page FILE           write them into this page of the documentation; nothing is run
    python -m benchmarks.speed --page FILE --later FILE     with works that were measured since, into another --out

The peer is TRL, for PPO an older one in an environment of its own (--ppo-python), and for sampling transformers'
`generate`. Both sides start from the same weights, make the same updates of the same batches, in float32 with the same
AdamW and threads, and have the same allocator settings, for those are anyone's. The first update of a run is not timed,
of the others the mean counts; where both sides sample, an update is a whole iteration, in PPO with 16 updates inside,
and with 32k words the only one. A ratio is of two runs side by side; of five turns the median, the lowest and the
highest are given. Peak memory is what was resident at most, libraries included. `once` is what comes before the first
update: reference log-probabilities, checks, and on TRL's side tokenising. In the works `-compiled` it is the first call
of the sampler, which compiles, nothing being known from other runs.

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
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

from accord.atomic import write_json
from accord.training.environment import environment
from benchmarks.command import Command, count, new_file, page_file, read_json, refuse
from benchmarks.speed.figure import write_bars
from benchmarks.speed.results import merged, row_of, table, write_page
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


def main(arguments: Sequence[str] | None = None) -> None:
    parser = Command("speed", __doc__)
    parser.add_argument("--work", default="", help="the work called so, or else those whose name begins so")
    parser.add_argument("--turns", type=count(), default=5, help="runs of each side")
    parser.add_argument("--quick", action="store_true", help="two turns instead of five")
    parser.add_argument("--allocator", choices=("kept", "as-is"), default="kept", help="kept: freed memory stays")
    parser.add_argument("--threads", type=count(), default=os.cpu_count(), help="threads of each run")
    parser.add_argument("--ppo-python", type=Path, default=PPO_PYTHON, help="an interpreter that has TRL 1.12, for PPO")
    parser.add_argument("--out", type=new_file, default=LATEST, help="the results, as JSON")
    parser.add_argument("--figure", type=new_file, help="draw what lies in --out, and run nothing")
    parser.add_argument("--page", type=page_file, help="write what lies in --out into this page, and run nothing")
    parser.add_argument("--later", type=Path, action="append", default=[], metavar="FILE",
                        help="results that take the place of the same works' in --out; may be repeated")  # fmt: skip
    parser.add_argument("--one", nargs=4, metavar=("WORK", "SIDE", "FOLDER", "APART"), help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    setup = Setup(args.threads, args.allocator, args.ppo_python)
    if args.one:
        name, side, folder, apart = args.one
        print(json.dumps(asdict(_one(WORKS[name], side, Path(folder), apart == "apart", setup))))
    elif args.figure or args.page:
        _publish(args.out, args.later, args.figure, args.page)
    elif args.later:
        parser.error("--later goes with --page or --figure")
    else:
        _measure(_chosen(args.work), 2 if args.quick else args.turns, setup, args.out)


def _chosen(work: str) -> list[str]:
    names = [work] if work in WORKS else [name for name in WORKS if name.startswith(work)]
    if not names:
        _refuse(f"no work begins with {work!r}; there are {', '.join(WORKS)}")
    return names


def _refuse(reason: str) -> NoReturn:
    refuse("benchmarks.speed", reason)


def _peers_are_there(names: Sequence[str], setup: Setup) -> None:
    """Refuse works whose peer is not installed, before anything is run."""
    with_trl = [WORKS[name].kind for name in names if WORKS[name].peer == "trl"]
    if "ppo" in with_trl and not _has_trl(setup.ppo_python):
        _refuse(
            f"TRL 1.12, the last with PPO, needs an environment of its own, and {setup.ppo_python} is none: "
            "`make bench` makes it; or name another interpreter with --ppo-python, or other works with --work"
        )
    if any(kind != "ppo" for kind in with_trl) and find_spec("trl") is None:
        _refuse(
            f"TRL, the peer, is not installed for {sys.executable}: `make bench` does that, or "
            "pip install -e '.[bench]'; --work sampling needs none"
        )


def _has_trl(python: Path) -> bool:
    look = "import sys; from importlib.util import find_spec; sys.exit(find_spec('trl') is None)"
    try:
        return subprocess.run([python, "-c", look], capture_output=True).returncode == 0
    except OSError:
        return False


def _measure(names: Sequence[str], turns: int, setup: Setup, out: Path) -> None:
    _peers_are_there(names, setup)
    date = f"{datetime.now(UTC):%Y-%m-%d}"
    machine = {**environment(), "threads": setup.threads, "allocator": setup.allocator, "date": date}
    rows: list[dict[str, Any]] = []
    for rows in _turns(names, turns, setup):
        write_json(out, {"machine": machine, "rows": rows})  # after every turn: an hour is long
    print(table(rows))


def _publish(results: Path, later: Sequence[Path], figure: Path | None, page: Path | None) -> None:
    if not results.exists():
        _refuse(f"there are no results in {results}: run `make bench` first, or name others with --out")
    try:
        found, *others = (_results(path) for path in (results, *later))
        if page is not None:
            write_page(page, found, others)
    except ValueError as error:
        _refuse(str(error))
    if figure is not None:
        write_bars(figure, merged(found, others)["rows"])


def _results(path: Path) -> dict[str, Any]:
    """What a run of ours wrote there. Raises: ValueError when it is something else."""
    found = read_json(path)
    rows = found.get("rows") if isinstance(found, dict) and "machine" in found else None
    if not rows or not all(isinstance(row, dict) and row.get("work") in WORKS for row in rows):
        raise ValueError(f"{path} does not hold results of these works: name another file")
    return found


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
    ours, peers = {"sampling": "accord_sampler"}, {"ppo": "trl_ppo", "sampling": "generate_side"}
    module = ours.get(work.kind, "accord_online") if side == "accord" else peers.get(work.kind, "trl_online")
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
    if WORKS[name].compiled:
        environment["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"  # each run compiles anew: `once` is what that costs
    done = subprocess.run([*command, *options], env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{name}, {side} failed:\n{done.stdout[-1000:]}{done.stderr[-4000:]}")
    return Timing(**json.loads(done.stdout.splitlines()[-1]))


if __name__ == "__main__":
    main()
