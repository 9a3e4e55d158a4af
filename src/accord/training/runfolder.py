"""The folder of one run: what was asked, what it ran on, what it measured, in files that survive a kill at any byte.

config.yaml    the resolved configuration, to be read by people
run.json       configuration, seed, data fingerprints, and every start with its time, command and environment
metrics.jsonl  one line a step
samples.jsonl  completions over time
guards.jsonl   what the guards said, a line each time one changed its level
summary.json   written last: the run is finished
.lock          held while a process works here
"""

from __future__ import annotations

import fcntl
import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from io import FileIO
from pathlib import Path
from typing import IO, Any

import yaml

from accord.atomic import make_folder, sync, write_json, write_text
from accord.errors import CheckpointError, TrainingError
from accord.guards import GUARD_LOG
from accord.training.environment import environment, environment_changes

__all__ = ["RunFolder", "read_fingerprints", "read_summary", "recorded_settings"]

CONFIG = "config.yaml"
RUN = "run.json"
METRICS = "metrics.jsonl"
SAMPLES = "samples.jsonl"
SUMMARY = "summary.json"
CHECKPOINTS = "checkpoints"
LOCK = ".lock"
# Where a run is kept, and who watches it, does not make it another run.
NOT_IDENTITY = frozenset({"out", "guards"})
DIFFERENCES_SHOWN = 10


class RunFolder:
    """Use as `with RunFolder.open(...) as run:`; then `run.truncate_after(step)` once, before the first append.

    path   the folder
    notes  sentences to show the user: what changed since the last start that can change the last bits of the result
    """

    def __init__(self, path: Path, lock: IO[str], notes: tuple[str, ...]) -> None:
        self.path = path
        self.notes = notes
        self._lock = lock
        self._logs: dict[str, FileIO] = {}

    @classmethod
    def open(
        cls, path: Path, *, resolved_config: Mapping[str, Any], fingerprints: Mapping[str, str], device: str = "cpu"
    ) -> RunFolder:
        """Take the folder for this process, as a new run or as the continuation of the same one.

        Args:
            resolved_config: every setting, as JSON values.
            fingerprints: data file -> hash of its content. The two together, without `out`, say which run this is.
            device: where its models are, for the record of this start.
        Raises: CheckpointError when another process works in the folder, or it holds another run (naming what differs).
        """
        try:
            make_folder(path)
            lock = _take_lock(path)
        except OSError as error:
            raise CheckpointError(
                f"cannot use {path} as a run folder: {error.strerror}. Use another one with --set out=..."
            ) from error
        try:
            config = json.loads(json.dumps(resolved_config))
            return cls(path, lock, _start(path, config, dict(fingerprints), environment(device)))
        except BaseException:
            lock.close()
            raise

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *_: object) -> None:
        for file in (*self._logs.values(), self._lock):
            file.close()

    @property
    def checkpoints(self) -> Path:
        return self.path / CHECKPOINTS

    @property
    def finished(self) -> dict[str, Any] | None:
        """The summary when the run is finished, else None."""
        return read_summary(self.path)

    def truncate_after(self, step: int) -> None:
        """Drop logged lines after `step`, and a torn last line, so that the logs continue as if never interrupted.

        `step` is that of the checkpoint training continues from, 0 when it starts from scratch. Opens the logs.
        """
        for name in (METRICS, SAMPLES, GUARD_LOG):
            # Unbuffered: a line is with the system when `append` returns, and a full disk shows there, not on closing.
            file = self._logs[name] = open(self.path / name, "ab", buffering=0)
            file.truncate(_length_up_to(self.path / name, step))
        self.sync()
        sync(self.path)

    def append_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """One line for this step. NaN and infinities, which JSON has not, are a ValueError."""
        self._append(METRICS, [{"step": step, **metrics}])

    def append_samples(self, step: int, samples: Iterable[Mapping[str, Any]]) -> None:
        """One line for each sample: `step` and whatever JSON values describe it."""
        self._append(SAMPLES, [{"step": step, **sample} for sample in samples])

    def append_verdicts(self, verdicts: Iterable[Mapping[str, Any]]) -> None:
        """One line for each verdict of a guard, with its `step`."""
        self._append(GUARD_LOG, [dict(verdict) for verdict in verdicts])

    def sync(self) -> None:
        """Make the logs durable. Call before saving a checkpoint: a log may be ahead of it, never behind."""
        for name, file in self._logs.items():
            with _explained(self.path / name):
                os.fsync(file.fileno())

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Write summary.json: everything else is done and durable, and the run counts as finished."""
        self.sync()
        write_json(self.path / SUMMARY, dict(summary))

    def _append(self, name: str, rows: list[dict[str, Any]]) -> None:
        # ASCII: completions can hold characters that some readers take for line ends, and halves of surrogate pairs.
        left = "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows).encode("ascii")
        with _explained(self.path / name):
            while left:
                left = left[self._logs[name].write(left) :]


def read_summary(path: Path) -> dict[str, Any] | None:
    """What a finished run left in `path`; None when it is not finished.

    Raises: CheckpointError for a file that is damaged.
    """
    file = path / SUMMARY
    if not file.exists():
        return None
    try:
        summary = json.loads(file.read_bytes())
        if not isinstance(summary, dict):
            raise ValueError("it is no JSON object")
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{file} is damaged ({error}). Delete it: the same command then writes it again, from the last checkpoint."
        ) from error
    return summary


def read_fingerprints(path: Path) -> dict[str, str]:
    """What the run in `path` was made from (data and starting weights -> content hash); empty without a run there.

    Raises: CheckpointError for a record that is damaged.
    """
    return dict(_read_run(path)["data"]) if (path / RUN).exists() else {}


def recorded_settings(path: Path) -> dict[str, Any]:
    """The settings the run in `path` was begun with; empty without a run there.

    Raises: CheckpointError for a record that is damaged.
    """
    return dict(_read_run(path)["config"]) if (path / RUN).exists() else {}


def _take_lock(path: Path) -> IO[str]:
    """Hold the folder's lock. The system gives it back when the process ends, however it ends."""
    lock = open(path / LOCK, "a+")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        owner = lock.read().strip() or "unknown"
        lock.close()
        raise CheckpointError(
            f"{path} is in use by process {owner}. Wait for it, stop it, or use another folder with --set out=..."
        ) from None
    lock.truncate(0)
    lock.write(f"{os.getpid()}\n")
    lock.flush()
    return lock


def _start(path: Path, config: dict[str, Any], fingerprints: dict[str, str], now: dict[str, Any]) -> tuple[str, ...]:
    """Record this start in run.json and give the notes. config.yaml is for people: nothing reads it back."""
    start = {"time": datetime.now(UTC).isoformat(timespec="seconds"), "command": sys.argv, "environment": now}
    changes: list[str] = []
    run = _earlier(path, config, fingerprints)
    if run is not None:
        changes = environment_changes(run["starts"][-1]["environment"], now)
        write_json(path / RUN, {**run, "starts": [*run["starts"], start]})
    else:
        record = {"seed": config.get("seed"), "data": fingerprints, "config": config, "starts": [start]}
        write_json(path / RUN, record)
    if not (path / CONFIG).exists():
        write_text(path / CONFIG, yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
    if not changes:
        return ()
    return (f"the result can differ in its last bits from an uninterrupted run, because of {'; '.join(changes)}",)


def _earlier(path: Path, config: dict[str, Any], fingerprints: dict[str, str]) -> dict[str, Any] | None:
    """The record of the run this start continues; None for a new one.

    A start that failed before its first step, on a mistyped path say, must not keep its folder from the mended one.
    """
    if not (path / RUN).exists():
        if (path / CONFIG).exists():
            raise CheckpointError(f"{path} holds a {CONFIG} of something else. Use another folder with --set out=...")
        return None
    run = _read_run(path)
    differences = _differences(_identity(run["config"], run["data"]), _identity(config, fingerprints))
    if not differences:
        return run
    logged = (path / METRICS).exists() and (path / METRICS).stat().st_size
    if logged or (path / CHECKPOINTS).exists() or (path / SUMMARY).exists():
        raise CheckpointError(
            f"{path} already holds a run that differs from this one:\n" + "\n".join(differences) + "\n"
            f"Use another folder with --set out=..., or delete {path} to start over."
        )
    (path / CONFIG).unlink(missing_ok=True)
    return None


def _read_run(path: Path) -> dict[str, Any]:
    try:
        run = json.loads((path / RUN).read_bytes())
        if not run["starts"] or not isinstance(run["data"], dict) or not isinstance(run["config"], dict):
            raise ValueError("a part is missing")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path / RUN} is not readable as the record of a run ({error}). Use another folder with --set out=..., or "
            f"delete {path} to start over."
        ) from error
    return run


def _identity(config: Mapping[str, Any], fingerprints: Mapping[str, str]) -> dict[str, Any]:
    settings = _flat({key: value for key, value in config.items() if key not in NOT_IDENTITY})
    return settings | {f"content of {name}": fingerprint for name, fingerprint in fingerprints.items()}


def _flat(value: Any, key: str = "") -> dict[str, Any]:
    """Dotted keys and their values. A mapping with nothing in it sets nothing."""
    if not isinstance(value, dict) or not value:
        return {key: None if value == {} else value}
    return {name: leaf for k, v in value.items() for name, leaf in _flat(v, f"{key}.{k}" if key else k).items()}


def _differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """A line for each key with another value. None is a key that is not set: an optional key that a newer version
    knows makes no other run of a folder of an older one."""

    def shown(value: Any) -> str:
        return "(not set)" if value is None else f"{value!s:.60}"

    lines = [
        f"  {key}: {shown(old.get(key))} there, {shown(new.get(key))} now"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]
    if len(lines) > DIFFERENCES_SHOWN:
        lines[DIFFERENCES_SHOWN:] = [f"  ... and {len(lines) - DIFFERENCES_SHOWN} more"]
    return lines


def _length_up_to(path: Path, step: int) -> int:
    """Bytes in the whole, readable lines at the start of a log that belong to steps up to `step`."""
    length = 0
    with open(path, "rb") as file:
        for line in file:
            try:
                if not line.endswith(b"\n") or json.loads(line)["step"] > step:
                    break
            except (ValueError, KeyError, TypeError):
                break
            length += len(line)
    return length


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise TrainingError(
            f"cannot write {path}: {error.strerror}. Make room or mend the disk, then run the same command again."
        ) from error
