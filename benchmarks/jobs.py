"""Independent runs of a benchmark, each in a process of its own with one thread, some at a time."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

__all__ = ["run_jobs"]


def run_jobs(module: str, jobs: Sequence[Sequence[str]], processes: int) -> None:
    """Run `python -m module *job` for each job; the first that fails ends everything with its output."""
    with ThreadPoolExecutor(processes) as pool:
        for job, done in zip(jobs, pool.map(lambda job: _run(module, job), jobs), strict=True):
            print(f"{' '.join(job)}: {'done' if done.returncode == 0 else 'failed'}", file=sys.stderr, flush=True)
            if done.returncode:
                pool.shutdown(cancel_futures=True)
                sys.exit(f"{done.stdout[-1000:]}{done.stderr[-3000:]}")


def _run(module: str, job: Sequence[str]) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-m", module, *job], env=environment, capture_output=True, text=True)
