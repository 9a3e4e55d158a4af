"""The report of a whole run: `overview_report(root, stages)` tells the story of all stages on one page.

It reads `root/summary.json`, which has the keys of a stage's summary (see `accord.report.stage`; `name` and `win_rates`
are the usual ones), and every stage's folder, and links to the stages' own reports where they exist.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from accord.atomic import write_text
from accord.report.blocks import account, exchanges, key_figures, label, warnings
from accord.report.html import Html, duration, element, page, section, with_interval
from accord.report.panels import (
    OVERVIEW_PANELS,
    calibration_figure,
    comparison_figure,
    curve_figure,
    grid,
    metric_figures,
    over_optimisation_figure,
)
from accord.report.reading import Estimate, Run, read_run
from accord.report.stage import STAGES, stage_title

__all__ = ["overview_report"]

_GLOSSARY = {
    "Interval": "Every number is measured on a sample. The interval is the range of true values that the sample does "
    "not rule out (at 95%), and n is the number of prompts or comparisons behind it. Small n, wide interval.",
    "Win rate": "A blind judge sees two answers to the same prompt, without knowing who wrote which, and picks one. "
    "50% means no difference.",
    "Score, or proxy": "What the reward model thinks of an answer. PPO raises it directly, so a rise alone proves "
    "nothing.",
    "Gold, or true utility": "What the annotators really value. Only a simulation knows it; no stage trains on it.",
    "KL": "How far a model's behaviour has moved from the model it started from, in nats. The charts use its square "
    "root, because reward typically grows in proportion to that at first.",
    "Over-optimisation": "Past some distance the policy finds answers that the reward model likes and people do not: "
    "the proxy goes on rising while gold falls. The remedy is to stop earlier or to raise kl_coef.",
}


def overview_report(root: Path, stages: Sequence[str]) -> Path:
    """Write `root/report.html` and return its path. `stages` are run folders relative to root, in the order they ran.

    Raises DataError, UnknownMetric.
    """
    whole = read_run(root)
    runs = [read_run(root / stage) for stage in stages]
    header = element(
        "header",
        element("p", "Accord report", class_="eyebrow"),
        element("h1", whole.stage),
        element("p", _subtitle(whole, len(runs)), class_="sub"),
        *warnings([*whole.warnings, *(f"{_titled(root, run)}: {text}" for run in runs for text in run.warnings)]),
    )
    parts: list[tuple[str, str | None, list[Html | None]]] = [
        ("In short", None, _in_short(whole)),
        ("The pipeline", "Each stage builds on the ones before it.", [_pipeline(root, runs)]),
        ("Did it get better?", None, [comparison_figure(_comparisons(whole, runs))]),
        ("Was the reward model exploited?", None, _ppo(root, runs)),
        ("More evidence", None, [_more_evidence((whole, *runs))]),
        ("Side by side", None, list(exchanges([item for run in (whole, *runs) for item in run.side_by_side]))),
        ("How to read this page", None, [_glossary()]),
    ]
    shown = [(name, note, [child for child in children if child is not None]) for name, note, children in parts]
    sections = [(name, section(name, *children, note=note)) for name, note, children in shown if children]
    path = root / "report.html"
    write_text(path, page(f"{whole.stage} \u00b7 Accord", header, sections))
    return path


def _subtitle(whole: Run, count: int) -> str:
    time = f" in {duration(whole.seconds)}" if whole.seconds is not None else ""
    return f"{count} stages{time}" if whole.finished else f"{count} stages, not finished: there is no summary yet"


def _in_short(whole: Run) -> list[Html | None]:
    return [account(whole.account) if whole.account else None, *key_figures(whole.headline)]


def _comparisons(whole: Run, runs: Sequence[Run]) -> tuple[Estimate, ...]:
    """The win rates of all stages, which name their judges, and those that only the whole run's summary has."""
    staged = [item for run in runs for item in run.comparisons]
    names = {item.name for item in staged}
    return (*staged, *(item for item in whole.comparisons if item.name not in names))


def _pipeline(root: Path, runs: Sequence[Run]) -> Html:
    return element("ol", *(_step(root, index, run) for index, run in enumerate(runs, start=1)), class_="steps")


def _step(root: Path, index: int, run: Run) -> Html:
    numbers = [
        part
        for item in _foremost(run)
        for part in (
            element("dt", label(item), title=item.meaning or None),
            element("dd", with_interval(item.value, item.low, item.high, item.n, item.unit)),
        )
    ]
    linked = (run.folder / "report.html").is_file()
    target = f"{run.folder.relative_to(root).as_posix()}/report.html"
    when = duration(run.seconds) if run.seconds is not None else "" if run.finished else "not finished"
    return element(
        "li",
        element("span", " \u00b7 ".join(filter(None, (f"Stage {index}", _place(root, run), when))), class_="when"),
        element("h3", stage_title(run)),
        element("p", STAGES[run.stage][1]) if run.stage in STAGES else None,
        element("dl", *numbers) if numbers else None,
        element("a", "Stage report", href=target) if linked else None,
        class_="card",
    )


def _place(root: Path, run: Run) -> str:
    """The folder between the root and a stage's own, such as a round's; mostly there is none."""
    inside = run.folder.relative_to(root).parent.as_posix()
    return "" if inside == "." else inside


def _titled(root: Path, run: Run) -> str:
    return ", ".join(filter(None, (_place(root, run), stage_title(run))))


def _foremost(run: Run) -> list[Estimate]:
    """Two numbers that stand for a stage: its first ones, or its first judge's first comparisons."""
    own = [item for item in run.headline if not item.source]
    return (own or [item for item in run.comparisons if item.source == run.comparisons[0].source])[:2]


def _ppo(root: Path, runs: Sequence[Run]) -> list[Html | None]:
    """For every run that sampled from its policy: reward against distance, then the curves that explain it."""
    sampled = [run for run in runs if any(name.startswith("rollout/") for name in run.metrics)]
    parts: list[Html | None] = []
    for run in sampled:
        parts += [element("h3", _titled(root, run))] if len(sampled) > 1 else []
        parts.append(grid([over_optimisation_figure(run), *metric_figures(run, OVERVIEW_PANELS)]))
    return parts


def _more_evidence(runs: Sequence[Run]) -> Html | None:
    curves = [curve_figure(curve) for run in runs for curve in run.curves]
    return grid([*(calibration_figure(run) for run in runs), *curves])


def _glossary() -> Html:
    terms = (element("div", element("h3", term), element("p", text)) for term, text in _GLOSSARY.items())
    return element("div", *terms, class_="card glossary")
