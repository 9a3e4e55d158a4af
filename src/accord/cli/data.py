"""`accord data`: check, convert and count files of prompts, demonstrations and preferences. Never imports torch."""

from __future__ import annotations

import argparse
import json
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from accord.cli.screen import screen, watched
from accord.data.containers import parts_of
from accord.data.convert import KINDS, convert_groups, nothing_fits, writing
from accord.data.formats import FORMATS
from accord.data.problems import Problem
from accord.data.read import MAX_PROBLEMS, Scan, scan
from accord.data.stats import QUANTILES, DataStats, Lengths, data_stats
from accord.errors import ConfigError, DataError
from accord.records import GroupKind

__all__ = ["add_parser"]

SHOWN_PROBLEMS = 20

_FORMAT_LIST = "\n".join(f"  {item.name:<18} {item.description}" for item in FORMATS)

_EPILOG = {
    "data": "Begin with `accord data check FILE`: it names the format and every row that cannot be used.",
    "check": f"""examples:
  accord data check preferences.jsonl
  accord data check train/ eval.csv --json          one JSON object per file, for programs
  accord data check export.json --map prompt=data.question --map completion=data.reply

exit code: 0 when all rows of all files are usable, 2 otherwise.

formats, detected from the rows (force one with --format):
{_FORMAT_LIST}""",
    "convert": """examples:
  accord data convert hh.jsonl.gz pairs.jsonl --to pairs
  accord data convert trees.jsonl pairs.jsonl --to pairs        all pairs of each ranked list; ties are left out
  accord data convert labels.csv good.jsonl --to sft            the desirable answers only
  accord data convert scored.parquet prompts.jsonl.gz --to prompts --lenient

The output is JSON Lines (.jsonl or .jsonl.gz). It appears complete or not at all, and replaces nothing.""",
    "stats": """examples:
  accord data stats preferences.jsonl
  accord data stats preferences.jsonl --json

exit code: 0 when all rows are usable, 2 otherwise; the figures are those of the usable rows.

Watch for: duplicate prompts, chosen answers that are mostly the longer ones, labels that are nearly all alike.""",
}


def add_parser(subparsers: Any) -> None:
    """Add `data` and its commands; each sets `run` to the function that does it."""
    data = _command(subparsers, "data", "check, convert and count data files")
    commands = data.add_subparsers(title="commands", metavar="COMMAND", required=True)

    check = _command(commands, "check", "name the format and every row that cannot be used")
    check.add_argument("files", nargs="+", type=Path, metavar="FILE", help="a file, or a folder of parts")
    check.add_argument("--json", action="store_true", help="one JSON object per file on standard output")
    _reading_options(check)
    check.set_defaults(run=_check)

    convert = _command(commands, "convert", "rewrite a file as one kind of data, in one canonical JSON Lines form")
    convert.add_argument("input", type=Path, metavar="IN", help="a file, or a folder of parts")
    convert.add_argument("output", type=Path, metavar="OUT", help="a new file, .jsonl or .jsonl.gz")
    convert.add_argument("--to", choices=KINDS, required=True, help="the kind of data to write")
    convert.add_argument("--lenient", action="store_true", help="leave out and count the rows that cannot be used")
    _reading_options(convert)
    convert.set_defaults(run=_convert)

    stats = _command(commands, "stats", "lengths, duplicates, biases and languages of a file")
    stats.add_argument("file", type=Path, metavar="FILE", help="a file, or a folder of parts")
    stats.add_argument("--json", action="store_true", help="the figures as one JSON object")
    _reading_options(stats)
    stats.set_defaults(run=_stats)


def _command(
    subparsers: argparse._SubParsersAction[argparse.ArgumentParser], name: str, purpose: str
) -> argparse.ArgumentParser:
    return subparsers.add_parser(
        name,
        help=purpose,
        description=purpose[0].upper() + purpose[1:] + ".",
        epilog=_EPILOG[name],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def _reading_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--format", metavar="F", help="read as this format instead of detecting it")
    parser.add_argument(
        "--map",
        action="append",
        default=[],
        metavar="FIELD=PATH",
        help="where a field is, as a dotted path in the row (data.prompt, turns.0.text); may be repeated",
    )


def _mapping(options: list[str]) -> Mapping[str, str]:
    for option in options:
        if not all(option.partition("=")[::2]):
            raise ConfigError(f"--map {option}: expected FIELD=PATH, for example --map prompt=data.question.")
    return dict(option.split("=", 1) for option in options)


# --- check -----------------------------------------------------------------------------------------------------------


def _check(args: argparse.Namespace) -> int:
    mapping, console = _mapping(args.map), screen()
    all_usable = True
    for given in args.files:
        for path in _parts(given):
            scanned, message = _examine(path, args.format, mapping)
            all_usable &= message is None and scanned is not None and scanned.problem_count == 0
            if args.json:
                print(json.dumps(_check_row(path, scanned, message)), flush=True)
            else:
                _show_check(console, path, scanned, message)
    return 0 if all_usable else DataError.exit_code


def _parts(path: Path) -> tuple[Path, ...]:
    """The files to examine one by one; a path that cannot be opened is examined itself, to report why."""
    try:
        return parts_of(path)[0]
    except DataError:
        return (path,)


def _examine(path: Path, format: str | None, mapping: Mapping[str, str]) -> tuple[Scan | None, str | None]:
    """The scan of a file, as far as it came, and the sentence if the file was refused."""
    scanned = None
    try:
        scanned = scan(path, format=format, fields=mapping)
        for _ in watched(scanned):
            pass
    except DataError as error:
        return scanned, str(error)
    return scanned, None


def _check_row(path: Path, scanned: Scan | None, message: str | None) -> dict[str, object]:
    row: dict[str, object] = {
        "file": str(path),
        "format": scanned.format if scanned else None,
        "rows": scanned.rows if scanned else 0,
        "usable": scanned.usable if scanned else 0,
        "problem_count": scanned.problem_count if scanned else 0,
        "problems": [_problem_row(problem) for problem in scanned.problems] if scanned else [],
        "notes": list(scanned.notes()) if scanned else [],
    }
    return row | ({"message": message} if message is not None else {})


def _problem_row(problem: Problem) -> dict[str, object]:
    return {
        "line": problem.origin.line,
        "field": problem.field,
        "found": problem.found,
        "expected": problem.expected,
        "fix": problem.fix,
    }


def _show_check(console: Console, path: Path, scanned: Scan | None, message: str | None) -> None:
    if scanned is not None:
        _show_reading(console, path, scanned)
        _show_problems(console, scanned, SHOWN_PROBLEMS, f"--json lists the first {MAX_PROBLEMS}")
    if message is not None:
        console.print(escape(message), style="red", highlight=False, soft_wrap=True)


def _show_problems(console: Console, scanned: Scan, shown: int, where_more: str) -> None:
    for problem in scanned.problems[:shown]:
        console.print(f"  {escape(str(problem))}", style="yellow", highlight=False, soft_wrap=True)
    if scanned.problem_count > shown:
        more = f"  ... and {scanned.problem_count - shown} more rows ({where_more})"
        console.print(escape(more), style="yellow", highlight=False, soft_wrap=True)


def _show_reading(console: Console, path: Path, scanned: Scan) -> None:
    state = "[green]all usable[/]" if not scanned.problem_count else f"[red]{scanned.problem_count} not usable[/]"
    console.print(
        f"[bold]{escape(str(path))}[/]: {scanned.container}, format [bold]{scanned.format}[/] "
        f"({escape(scanned.description)}): {scanned.rows} rows, {state}",
        highlight=False,
        soft_wrap=True,
    )
    for note in scanned.notes():
        console.print(f"  note: {escape(note)}", style="dim", highlight=False, soft_wrap=True)


# --- convert ---------------------------------------------------------------------------------------------------------


def _convert(args: argparse.Namespace) -> int:
    if os.path.lexists(args.output):
        raise DataError(f"{args.output}: it is there already, and convert replaces nothing: give another name.")
    to: GroupKind = args.to
    scanned = scan(args.input, format=args.format, fields=_mapping(args.map))
    dropped, kinds, written = Counter[str](), Counter[GroupKind](), 0
    with writing(args.output) as write:
        for group in convert_groups(watched(scanned), to, dropped, kinds):
            write(group)
            written += 1
        if scanned.problem_count and (not args.lenient or not scanned.usable):
            raise DataError(scanned.refusal(keep_good="--lenient"))
        if not written:
            raise DataError(f"{args.input}: {nothing_fits(to, dropped, kinds)}")
    console = screen(stderr=True)
    _show_reading(console, args.input, scanned)
    for reason, count in dropped.items():
        console.print(f"  left out: {count} {escape(reason)}", style="yellow", highlight=False)
    if scanned.problem_count:
        console.print(f"  left out: {scanned.problem_count} rows that cannot be used", style="yellow", highlight=False)
    print(f"{args.output}: {written} {to} groups")
    return 0


# --- stats -----------------------------------------------------------------------------------------------------------


def _stats(args: argparse.Namespace) -> int:
    scanned = scan(args.file, format=args.format, fields=_mapping(args.map))
    stats = data_stats(watched(scanned))
    if not scanned.usable:
        raise DataError(scanned.refusal())
    exit_code = DataError.exit_code if scanned.problem_count else 0
    if args.json:
        print(json.dumps(_check_row(args.file, scanned, None) | stats.as_dict()))
        return exit_code
    console = screen()
    _show_reading(console, args.file, scanned)
    _show_problems(console, scanned, 1, f"`accord data check {args.file}` lists them")
    console.print(_summary(stats))
    console.print(_distributions(stats))
    return exit_code


def _summary(stats: DataStats) -> Table:
    table = Table(show_header=False, box=None)
    facts = {
        "groups": ", ".join(f"{count} {kind}" for kind, count in stats.kinds.items()),
        "completions per group": _counts(stats.completions_per_group),
        "turns per dialogue": _counts(stats.turns),
        "duplicates": f"{stats.duplicate_prompts} prompts seen before, {stats.duplicate_groups} identical groups",
        "languages": _percent(stats.cjk_fraction, "of the letters are Chinese, Japanese or Korean"),
        "length bias": _percent(stats.chosen_longer_fraction, "of the pairs prefer the longer answer"),
        "ties": str(stats.ties) if stats.ties else None,
        "labels": _percent(stats.desirable_fraction, "of the labelled answers are desirable"),
    }
    for name, value in facts.items():
        if value is not None:
            table.add_row(name, value)
    return table


def _counts(counts: Mapping[int, int]) -> str:
    shown = [f"{value}: {count}" for value, count in list(counts.items())[:8]]
    return ", ".join(shown) + (", ..." if len(counts) > len(shown) else "")


def _percent(fraction: float | None, meaning: str) -> str | None:
    return None if fraction is None else f"{100 * fraction:.1f}% {meaning}"


def _distributions(stats: DataStats) -> Table:
    table = Table("", *(f"{100 * q:.0f}%" for q in QUANTILES), "mean", "min to max", box=None)
    rows = {
        "prompt, characters": stats.prompt_characters,
        "prompt, words": stats.prompt_words,
        "completion, characters": stats.completion_characters,
        "completion, words": stats.completion_words,
        "margin": stats.margins,
        "score": stats.scores,
    }
    for name, lengths in rows.items():
        if lengths is not None:
            cells = (f"{value:g}" for value in (*lengths.quantiles, float(f"{lengths.mean:.4g}")))
            table.add_row(name, *cells, _bars(lengths))
    return table


def _bars(lengths: Lengths) -> str:
    """A histogram in one line; any bin that is not empty shows something."""
    top = max(lengths.histogram)
    return "".join(" ▁▂▃▄▅▆▇█"[-(-8 * count // top)] for count in lengths.histogram)
