"""Checkpoints: everything a run needs to continue, on disk, without pickle, and never half-written.

    checkpoints/step-00000100/
      <component>.safetensors   one file per component: model, optimizer, ...
      state.json                numbers, text and positions
      manifest.json             size and sha256 of each file, and of itself; written last

A checkpoint is built in `.tmp-...`, made durable, and renamed; only then are older ones removed. Loading believes
nothing: it takes the newest checkpoint whose files are exactly those of its manifest, and sets damaged ones aside.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from accord.atomic import make_folder, sync, write_text
from accord.errors import AccordError, ConfigError, TrainingError

__all__ = ["Loaded", "Snapshot", "load_before", "load_latest", "save_checkpoint"]

MANIFEST = "manifest.json"
STATE = "state.json"
TEMPORARY = ".tmp-"
SPACE_FACTOR = 1.2


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All that survives a restart.

    step     optimizer steps done
    tensors  component -> name -> tensor; each component becomes one file. Tied tensors may appear under each name.
    values   whatever JSON can hold exactly: finite floats, ints, text, None, lists, dicts with text keys
    """

    step: int
    tensors: dict[str, dict[str, Tensor]]
    values: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Loaded:
    """The newest good snapshot, or None, and one note for each damaged checkpoint met on the way."""

    snapshot: Snapshot | None
    notes: tuple[str, ...] = ()


def save_checkpoint(
    folder: Path, snapshot: Snapshot, *, keep: int = 2, every: int = 1, before: int | None = None
) -> Path:
    """Write `snapshot` durably under `folder`, then remove older checkpoints. Returns its folder.

    The newest `keep` stay, and of the multiples of `every` the newest `keep`, so that an interrupted run, which saves
    in between, loses none that another has. So does the newest multiple before step `before`. A run's state is a
    function of its step, so a step that is already saved is left as it is.

    Raises: ConfigError for keep < 2; TrainingError when there is not enough space, the disk refuses, or a value is not
        finite; TypeError for a value that JSON would change. In each case older checkpoints are untouched and nothing
        half-written stays.
    """
    if keep < 2:
        raise ConfigError(
            f"keep is {keep}, but at least 2 checkpoints are needed: should the newest turn out damaged, training goes "
            f"on from the one before it. Set it to 2 or more."
        )
    _require_json(snapshot.values, "values")
    final = folder / f"step-{snapshot.step:08d}"
    if not final.exists():
        make_folder(folder)
        _remove_leftovers(folder)
        state = json.dumps(snapshot.values, indent=1)
        _require_space(final, sum(t.nbytes for part in snapshot.tensors.values() for t in part.values()) + len(state))
        _commit(final, snapshot, state)
    _remove_older(final, keep, every, before)
    return final


def load_latest(folder: Path) -> Loaded:
    """The newest checkpoint under `folder` that is exactly as it was written, on the CPU, in freshly allocated memory.

    Damaged checkpoints on the way are renamed to `.corrupt-...` and noted with file and reason; half-written ones are
    removed. With nothing usable the snapshot is None: the caller decides whether that is a fresh start or an error.
    """
    if not folder.is_dir():
        return Loaded(None)
    _remove_leftovers(folder)
    notes: list[str] = []
    for path in reversed(_committed(folder)):
        damage = _damage(path)
        if damage is None:
            return Loaded(_read(path), tuple(notes))
        aside = _set_aside(path)
        notes.append(f"checkpoint {path} is damaged ({damage}); it was set aside as {aside.name}")
    return Loaded(None, tuple(notes))


def load_before(folder: Path, step: int, *, every: int) -> Snapshot | None:
    """The newest good checkpoint of a step before `step` that is a multiple of `every`; None if there is none.

    Only multiples count, so that a run that was interrupted and saved in between goes back to the same step.
    """
    found = _multiples(_committed(folder), every) if folder.is_dir() else []
    good = (path for path in reversed(found) if _step(path) < step and _damage(path) is None)
    path = next(good, None)
    return None if path is None else _read(path)


def _commit(final: Path, snapshot: Snapshot, state: str) -> None:
    temporary = final.with_name(TEMPORARY + final.name)
    try:
        temporary.mkdir()
        for component, tensors in snapshot.tensors.items():
            save_file(_independent(tensors), temporary / f"{component}.safetensors")
        (temporary / STATE).write_text(state, encoding="ascii")
        for path in temporary.iterdir():
            sync(path)
        write_text(temporary / MANIFEST, _manifest(snapshot.step, _files(temporary)))
        os.replace(temporary, final)
        sync(final.parent)
    except (OSError, SafetensorError, AccordError) as error:
        raise TrainingError(
            f"cannot save the checkpoint {final}: {error}. Earlier checkpoints are untouched: make room or mend the "
            f"disk, then run the same command again."
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _independent(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors on the CPU, contiguous, and none sharing memory with another: what safetensors can write."""
    result: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        if tensor.untyped_storage().data_ptr() in storages:
            tensor = tensor.clone()
        storages.add(tensor.untyped_storage().data_ptr())
        result[name] = tensor
    return result


def _require_space(final: Path, size: int) -> None:
    needed, free = math.ceil(SPACE_FACTOR * size), shutil.disk_usage(final.parent).free
    if free < needed:
        raise TrainingError(
            f"not enough disk space for the checkpoint {final}: {needed:,} bytes are needed, {free:,} are free. "
            f"Earlier checkpoints are untouched: make room, then run the same command again."
        )


def _require_json(value: Any, where: str) -> None:
    """Refuse what would come back from JSON as something else: tuples as lists, 1 as "1", NaN as a syntax error."""
    match value:
        case None | bool() | int() | str():
            return
        case float():
            if math.isfinite(value):
                return
            raise TrainingError(f"the state to be saved holds {value} at {where}: training cannot go on from it")
        case list():
            for index, item in enumerate(value):
                _require_json(item, f"{where}[{index}]")
        case dict() if all(isinstance(key, str) for key in value):
            for key, item in value.items():
                _require_json(item, f"{where}.{key}")
        case _:
            raise TypeError(f"{where} is a {type(value).__name__} that JSON would change: {value!r:.80}")


def _files(folder: Path) -> dict[str, dict[str, Any]]:
    return {path.name: _fingerprint(path) for path in folder.iterdir() if path.name != MANIFEST}


def _fingerprint(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        return {"size": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _manifest(step: int, files: dict[str, dict[str, Any]]) -> str:
    """The manifest's text. It seals itself with a hash, so that damage to it is not blamed on the files it lists."""
    body = {"step": step, "files": files}
    seal = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    return json.dumps({**body, "sha256": seal}, indent=1, sort_keys=True) + "\n"


def _damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, as "file: reason", or None."""
    try:
        written = (path / MANIFEST).read_bytes()
        manifest = json.loads(written)
        step, listed = manifest["step"], manifest["files"]
        if step != _step(path) or written != _manifest(step, listed).encode():
            return f"{MANIFEST}: not as it was written"
    except FileNotFoundError:
        return f"{MANIFEST}: missing"
    except (OSError, ValueError, KeyError, TypeError):
        return f"{MANIFEST}: not readable"
    try:
        found = _files(path)
    except OSError as error:
        return f"{Path(error.filename).name}: {error.strerror}"
    changed = [name for name in sorted(listed | found) if listed.get(name) != found.get(name)]
    return f"{changed[0]}: {_difference(listed.get(changed[0]), found.get(changed[0]))}" if changed else None


def _difference(listed: dict[str, Any] | None, found: dict[str, Any] | None) -> str:
    if found is None:
        return "missing"
    if listed is None:
        return "not listed in the manifest"
    if listed["size"] != found["size"]:
        return f"{found['size']} bytes instead of {listed['size']}"
    return "its sha256 is not the one in the manifest"


def _read(path: Path) -> Snapshot:
    tensors = {file.stem: _read_tensors(file) for file in sorted(path.glob("*.safetensors"))}
    return Snapshot(_step(path), tensors, json.loads((path / STATE).read_bytes()))


def _read_tensors(path: Path) -> dict[str, Tensor]:
    # Clones: tensors that point into the file start at whatever offset it gives them, and CPU kernels take other paths,
    # with other roundings, for other alignments.
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name).clone() for name in file.keys()}


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _committed(folder: Path) -> list[Path]:
    return sorted((path for path in folder.iterdir() if re.fullmatch(r"step-\d{8,}", path.name)), key=_step)


def _set_aside(path: Path) -> Path:
    base = path.with_name(f".corrupt-{path.name}")
    aside = next(p for n in count(1) if not (p := base if n == 1 else base.with_name(f"{base.name}-{n}")).exists())
    os.replace(path, aside)
    sync(path.parent)
    return aside


def _multiples(paths: list[Path], every: int) -> list[Path]:
    return [path for path in paths if _step(path) % every == 0]


def _remove_older(newest: Path, keep: int, every: int, before: int | None) -> None:
    known = [path for path in _committed(newest.parent) if _step(path) <= _step(newest)]
    multiples = _multiples(known, every)
    earlier = [path for path in multiples if before is not None and _step(path) < before]
    needed = {*known[-keep:], *multiples[-keep:], *earlier[-1:]}
    for path in known:
        if path not in needed:
            # Renamed first: a kill in the middle of the removal must not leave something that looks like a checkpoint.
            doomed = path.with_name(TEMPORARY + path.name)
            os.replace(path, doomed)
            shutil.rmtree(doomed, ignore_errors=True)


def _remove_leftovers(folder: Path) -> None:
    for path in folder.glob(f"{TEMPORARY}*"):
        shutil.rmtree(path, ignore_errors=True)
