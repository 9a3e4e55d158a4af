"""Files larger than memory: what reading them costs does not grow with their rows, or by the bytes that are said."""

from __future__ import annotations

import csv
import gzip
import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from accord.data.read import MAX_NOTES, scan
from accord.data.stats import data_stats

FEW, MANY = 1200, 2400  # the smaller file is larger than the buffers


def row(number: int) -> dict[str, str]:
    return {"prompt": f"question {number} of many", "chosen": f"answer {number} " * 8, "rejected": f"other {number}"}


def write(folder: Path, kind: str, rows: int) -> Path:
    path = folder / f"{rows}.{kind}"
    made = [row(number) for number in range(rows)]
    lines = [json.dumps(item) + "\n" for item in made]
    if kind == "jsonl":
        path.write_text("".join(lines))
    elif kind == "jsonl.gz":
        path.write_bytes(gzip.compress("".join(lines).encode()))
    elif kind == "json":
        path.write_text("[" + ",".join(lines) + "]")
    elif kind == "csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(made[0]))
            writer.writeheader()
            writer.writerows(made)
    else:
        pq.write_table(pa.Table.from_pylist(made), path, row_group_size=500)
    return path


def peak(work: Callable[[], object]) -> int:
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def drain(path: Path) -> None:
    scanned = scan(path)
    for _ in scanned:
        pass
    assert scanned.usable == scanned.rows


def growth(folder: Path, kind: str, read: Callable[[Path], object]) -> float:
    """Bytes that a row more takes at the peak."""
    few, many = write(folder, kind, FEW), write(folder, kind, MANY)
    read(few)  # what is imported and cached on the way
    return (peak(lambda: read(many)) - peak(lambda: read(few))) / (MANY - FEW)


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "csv", "parquet"])
def test_checking_takes_no_memory_for_a_row(tmp_path: Path, kind: str) -> None:
    """What a row holds is some 200 bytes of text, and 1 kB as Python's objects; Parquet keeps an entry a row group."""
    assert growth(tmp_path, kind, drain) < 8


def test_a_json_array_is_read_through_a_window(tmp_path: Path) -> None:
    """The window is 256 KiB, more than the smaller file."""
    assert growth(tmp_path, "json", drain) < 200


def test_figures_take_sixteen_bytes_a_group(tmp_path: Path) -> None:
    """Two hashes of 8 bytes, an eighth more for the arrays' room to grow, and a copy to sort one of them."""
    assert growth(tmp_path, "jsonl", lambda path: data_stats(scan(path))) < 30


def test_names_of_columns_are_kept_up_to_a_number_of_them(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row(n) | {f"column {n}": 1}) + "\n" for n in range(MAX_NOTES + 3)))
    scanned = scan(path)
    assert sum(1 for _ in scanned) == MAX_NOTES + 3
    *_, columns = scanned.notes()
    assert columns.endswith(f"and {MAX_NOTES - 8} more")
    assert any("too many names to keep: 3 rows" in note for note in scanned.notes())


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "json", "csv"])
def test_the_bytes_read_are_those_of_the_file_when_all_is_read(tmp_path: Path, kind: str) -> None:
    scanned = scan(write(tmp_path, kind, FEW))
    assert scanned.bytes_read == 0
    seen = [scanned.bytes_read for _ in scanned]
    assert seen == sorted(seen) and seen[-1] == scanned.bytes_read == scanned.bytes_total
