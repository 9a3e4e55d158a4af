"""What the benchmarks' command lines share: what cannot be used is refused before anything is measured, in one sentence
and with exit code 2; and the part of a page that a benchmark writes."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from accord.atomic import write_text

__all__ = ["Command", "count", "new_file", "page_file", "read_json", "refuse", "write_between"]


class Command(argparse.ArgumentParser):
    """`python -m benchmarks.NAME`; its help is the module's docstring as it stands."""

    def __init__(self, name: str, description: str | None) -> None:
        super().__init__(f"python -m benchmarks.{name}", description=description)
        self.formatter_class = argparse.RawDescriptionHelpFormatter

    def error(self, message: str) -> NoReturn:
        refuse(self.prog.removeprefix("python -m "), message)


def refuse(program: str, reason: str) -> NoReturn:
    print(f"{program}: {reason}", file=sys.stderr)
    sys.exit(2)


def count(least: int = 1) -> Callable[[str], int]:
    """The type of an argument that is a whole number of at least `least`."""

    def read(text: str) -> int:
        if not (text.isascii() and text.isdigit()) or int(text) < least:
            raise argparse.ArgumentTypeError(f"found {text!r}, expected a whole number of at least {least}")
        return int(text)

    return read


def new_file(text: str) -> Path:
    """The type of an argument that names a file to be written."""
    path = Path(text)
    if path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"{text} cannot be written: expected a file in a folder that exists")
    return path


def page_file(text: str) -> Path:
    """The type of an argument that names a page of the documentation, of which a part is written anew."""
    path = Path(text)
    if not path.is_file():
        raise argparse.ArgumentTypeError(f"there is no file {text}")
    return path


def read_json(path: Path) -> Any:
    """Results that lie in a file. Raises: ValueError when it cannot be read or is no JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}): name another file") from error


def write_between(path: Path, mark: str, text: str) -> None:
    """Replace what stands between a page's two marks of this name.

    Raises: ValueError when the page lacks them.
    """
    begin, end = f"<!-- {mark}: begin -->", f"<!-- {mark}: end -->"
    found = path.read_text(encoding="utf-8")
    if found.count(begin) != 1 or found.count(end) != 1 or found.index(begin) > found.index(end):
        raise ValueError(f"{path}: expected {begin} and, below it, {end}, each once")
    head, rest = found.split(begin)
    write_text(path, f"{head}{begin}\n\n{text}\n\n{end}{rest.split(end)[1]}")
