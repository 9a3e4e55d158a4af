"""Write the reference pages under docs/ that come from the code: `python scripts/generate_docs.py`.

A test compares the files with what this script would write, so the pages cannot fall behind.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from accord.config.reference import reference_page
from accord.metrics import FAMILIES, GROUPS, METRICS, REDUCTIONS, Metric

DOCS = Path(__file__).resolve().parents[1] / "docs"

_BETTER = {"up": "higher", "down": "lower", "neutral": "neither"}


def metrics_page() -> str:
    """docs/metrics.md: one table per group of the registry."""
    lines = [
        "# Metrics",
        "",
        "Every number in `metrics.jsonl`. This page is written by `scripts/generate_docs.py` from `accord/metrics.py`.",
        "",
        "How several values inside one step become one number:",
        "",
        *(f"- **{name}**: {meaning}" for name, meaning in REDUCTIONS.items()),
    ]
    for group, meaning in GROUPS.items():
        lines += ["", f"## {group}/", "", meaning, ""]
        lines += ["| metric | unit | reduction | better | formula | what it tells |", "|---|---|---|---|---|---|"]
        lines += [_row(metric) for metric in (*METRICS.values(), *FAMILIES.values()) if metric.group == group]
    return "\n".join(lines) + "\n"


def _row(metric: Metric) -> str:
    formula = metric.formula.replace("|", r"\|")
    name = metric.name.replace("*", "<name>")
    return (
        f"| `{name}` | {metric.unit or '-'} | {metric.reduction} | {_BETTER[metric.direction]} "
        f"| `{formula}` | {metric.meaning} |"
    )


PAGES: dict[str, Callable[[], str]] = {"metrics.md": metrics_page, "configuration.md": reference_page}


def main() -> None:
    for name, page in PAGES.items():
        (DOCS / name).write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
