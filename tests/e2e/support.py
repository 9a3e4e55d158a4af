"""A tiny recipe for whole runs, and a process that starts the `accord` command quickly and kills it when asked.

Importing torch and transformers takes longer than a tiny stage does. The zygote imports them once and forks a child for
every command; it kills the child itself, so that a signal never reaches a process that has just ended.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from accord.records import Message, Turn

__all__ = ["RECIPE", "Asking", "Zygote", "outcome", "survives_kills", "write_pairs", "write_recipe"]

RECIPE: dict[str, Any] = {
    "seed": 3,
    "threads": 1,
    "model": {"scratch": {"hidden_size": 32, "layers": 2, "heads": 2, "vocab_size": 300, "max_positions": 64}},
    "data": {"holdout": 0.2, "max_tokens": 64},
    "sft": {
        "batch_size": 4,
        "epochs": 2,
        "max_steps": 12,
        "checkpoint_every": 2,
        "eval_every": 3,
        "learning_rate": 3e-3,
    },
    "reward": {
        "batch_size": 4,
        "epochs": 2,
        "max_steps": 12,
        "checkpoint_every": 2,
        "eval_every": 3,
        "learning_rate": 3e-3,
        "heads": 2,
        "length_decorrelation": 1.0,
    },
    "ppo": {
        "prompts_per_step": 4,
        "samples_per_prompt": 2,
        "episodes": 72,
        "max_new_tokens": 8,
        "update_epochs": 2,
        "minibatches": 2,
        "checkpoint_every": 2,
        "samples_every": 2,
        "learning_rate": 3e-3,
        "kl_controller": "adaptive",
        "target_kl": 1.0,
        "kl_horizon": 50,
    },
    "rloo": {
        "prompts_per_step": 4,
        "samples_per_prompt": 3,
        "episodes": 108,
        "max_new_tokens": 8,
        "update_epochs": 2,
        "minibatches": 2,
        "checkpoint_every": 2,
        "samples_every": 2,
        "learning_rate": 3e-3,
    },
}


def write_pairs(path: Path, count: int = 40) -> Path:
    """Comparisons that a word tells apart: `yes` is always preferred to `no`."""
    rows = [{"prompt": f"ask {i}", "chosen": f"yes {i % 7}", "rejected": f"no {i % 5}"} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_recipe(folder: Path) -> Path:
    """`RECIPE` with its data, as files in `folder`."""
    pairs = write_pairs(folder / "pairs.jsonl")
    recipe = RECIPE | {"data": RECIPE["data"] | {"preferences": str(pairs)}}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return path


def outcome(stage: Path) -> dict[str, Any]:
    """All that a finished stage leaves and that must not depend on interruptions: clock times and memory do."""
    metrics = [json.loads(line) for line in (stage / "metrics.jsonl").read_text().splitlines()]
    return {
        "weights": hashlib.sha256((stage / "model" / "model.safetensors").read_bytes()).hexdigest(),
        "metrics": [
            {name: value for name, value in row.items() if not name.startswith(("time/", "system/"))} for row in metrics
        ],
        "samples": (stage / "samples.jsonl").read_text(),
        "guards": (stage / "guards.jsonl").read_text(),
        "headline": json.loads((stage / "summary.json").read_text())["headline"],
    }


class Asking:
    """An environment that asks back, with a random number in it, and pays at random."""

    def reset(self, prompt: Any, random: Any) -> Any:
        return [*prompt, Message("user", f"and {random.integers(9)}")]

    def step(self, messages: Any, random: Any) -> Turn:
        return Turn((Message("user", f"why {random.integers(9)}"),), float(random.random()), random.random() < 0.3)


class Zygote:
    """Starts commands in forked children. Use as a context manager."""

    def __enter__(self) -> Zygote:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)
        self._process.stdout.close()

    def run(self, *arguments: str, after: float | None = None, number: int = signal.SIGKILL) -> tuple[int, str, float]:
        """(exit code, output, seconds) of `accord ARGUMENTS`, sent signal `number` `after` seconds if it still runs.

        The exit code of a child that a signal ended is minus the signal's number, as subprocess has it.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps([arguments, after, number]) + "\n")
        self._process.stdin.flush()
        code, output, seconds = json.loads(self._process.stdout.readline())
        return code, output, seconds


def survives_kills(
    name: str,
    kills: int,
    *,
    seconds: float,
    start: Callable[[int], Path],
    run: Callable[[Path, float | None], tuple[int, str, float]],
    left: Callable[[Path], Any],
    expected: Any,
) -> None:
    """Kill a command at least `kills` times at random moments, and see that what is `left` in the end is `expected`.

    Each folder `start` makes is killed up to twice, then runs to its end. First kills lie in equal parts of the whole
    duration `seconds`, one a folder; second ones anywhere in what is left of it.
    """
    draw = random.Random(f"kills of {name}")
    done = folders = 0
    while done < kills:
        root = start(folders)
        first = seconds * (folders % 4 + draw.random()) / 4
        for moment in (first, (seconds - first) * draw.random(), None):
            code, output, _ = run(root, moment)
            assert code == (-signal.SIGKILL if code else 0), output
            done += code != 0
        assert left(root) == expected
        folders += 1
        assert folders <= 3 * kills, "the commands end before they are killed"


def _child(arguments: list[str], log: Path) -> None:
    from accord.cli.main import main

    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    code: Any = 1
    try:
        code = main(arguments)
    except SystemExit as error:
        code = error.code
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _serve() -> None:
    import tempfile

    import torch

    # Before any tensor work: threads of a pool would not exist in the children, which would wait for them forever.
    torch.set_num_threads(1)
    import peft  # noqa: F401  (accord imports it only where there is an adapter)

    import accord.demos.quickstart  # noqa: F401  (everything else a command could need)

    log = Path(tempfile.mkdtemp()) / "log"
    for line in sys.stdin:
        arguments, after, number = json.loads(line)
        started = time.monotonic()
        child = os.fork()
        if child == 0:
            _child(arguments, log)
        finished, status = 0, 0
        while after is not None and not finished and time.monotonic() - started < after:
            time.sleep(0.001)
            finished, status = os.waitpid(child, os.WNOHANG)
        if not finished:
            if after is not None:
                os.kill(child, number)
            _, status = os.waitpid(child, 0)
        seconds = time.monotonic() - started
        output = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
        print(json.dumps([os.waitstatus_to_exitcode(status), output, seconds]), flush=True)


if __name__ == "__main__":
    _serve()
