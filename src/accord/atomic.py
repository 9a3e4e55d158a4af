"""Files and folders that are either the old one or the new one, never half of each, and that survive a power cut.

The order matters, and `kill -9` cannot show a mistake in it, because the page cache outlives the process: the file's
bytes are made durable before its name appears, and the folder that holds the name after.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accord.errors import AccordError

__all__ = ["cache_folder", "make_folder", "new_folder", "sync", "write_bytes", "write_json", "write_text"]


def write_text(path: Path, text: str) -> None:
    """Replace `path` by `text` (UTF-8), as `write_bytes`."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, *content: bytes | bytearray) -> None:
    """Replace `path` by `content`, its parts in order, in one step. Raises AccordError naming the path when the disk
    refuses."""
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            file.writelines(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync(path.parent)
    except OSError as error:
        raise AccordError(f"cannot write {path}: {error.strerror}") from error
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Replace `path` by `value` as indented JSON. Floats keep every bit; NaN and infinities are a ValueError."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def sync(path: Path) -> None:
    """Make a file's bytes, or the names in a folder, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def cache_folder(what: str) -> Path:
    """Where a kind of thing is kept for other runs: in $ACCORD_CACHE, else `accord` in $XDG_CACHE_HOME, else in
    ~/.cache."""
    named = os.environ.get("ACCORD_CACHE")
    folder = Path(named) if named else Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "accord"
    return folder.expanduser() / what


def make_folder(path: Path) -> None:
    """Create `path` and its missing parents durably; an existing folder is fine."""
    if not path.is_dir():
        make_folder(path.parent)
        path.mkdir(exist_ok=True)
        sync(path.parent)


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder to write into, which takes the place of `folder` as a whole when the block ends, and not after an error.

    What is written is readable for whoever may read new files here, whatever wrote it (safetensors makes its files
    private to the user).
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    yield partial
    for file in (*partial.rglob("*"), partial):
        file.chmod((0o777 if file.is_dir() else 0o666) & ~_umask())
        sync(file)
    replaced = folder.with_name(f".{folder.name}.replaced")
    shutil.rmtree(replaced, ignore_errors=True)
    if folder.exists():
        folder.rename(replaced)
    partial.rename(folder)
    sync(folder.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _umask() -> int:
    """The process's file mode mask, which can only be read by setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
