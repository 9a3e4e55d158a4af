"""The parts of both kinds of page that are text: tiles and tables of numbers, accounts, warnings, answers."""

from __future__ import annotations

from collections.abc import Sequence

from accord.metrics import METRICS
from accord.report.html import Html, element, number, quantity
from accord.report.reading import Answer, Estimate, Exchange, GuardRow

__all__ = ["account", "exchanges", "guard_table", "key_figures", "key_value_table", "label", "warnings"]


def label(item: Estimate) -> str:
    """The name to show: a declared metric's title, or the name as it was given."""
    return METRICS[item.name].title if item.name in METRICS else item.name


def key_figures(estimates: Sequence[Estimate]) -> list[Html]:
    """A tile for each number of the run itself, and a table of those that describe one of several models."""
    tiles = [_tile(item) for item in estimates if not item.source]
    compared = [item for item in estimates if item.source]
    parts = [element("div", *tiles, class_="tiles")] if tiles else []
    return [*parts, _model_table(compared)] if compared else parts


def guard_table(guards: Sequence[GuardRow]) -> Html | None:
    """One row a guard, the worst first: level, when, what was seen, what to do."""
    if not guards:
        return None
    order = {"ALERT": 0, "WARN": 1}
    rows = [
        element(
            "tr",
            element("th", guard.title, scope="row"),
            element("td", element("strong", guard.worst) if guard.worst in order else guard.worst),
            element("td", f"step {guard.step}" if guard.worst in order else ""),
            element("td", guard.at_end),
            element("td", guard.seen, element("small", guard.advice) if guard.advice else None),
        )
        for guard in sorted(guards, key=lambda guard: order.get(guard.worst, 2))
    ]
    names = ("guard", "worst", "reached", "at the end", "what was seen, and what to do")
    head = element("tr", *(element("th", name, scope="col") for name in names))
    return element("div", element("table", head, *rows, class_="guards"), class_="card scroll")


def _tile(item: Estimate) -> Html:
    bare = item.unit if item.unit in {"fraction", "seconds"} else None
    spread = [*([item.unit] if item.unit and not bare else []), *_spread(item, "95% interval ", bare)]
    return element(
        "div",
        element("div", label(item), class_="name", title=_hover(item)),
        element("div", quantity(item.value, bare), class_="value"),
        element("div", ", ".join(spread), class_="spread") if spread else None,
        element("div", item.meaning, class_="why") if item.meaning else None,
        class_="card tile",
    )


def _hover(item: Estimate) -> str | None:
    return f"{item.name}: {METRICS[item.name].formula}" if item.name in METRICS else None


def _model_table(estimates: Sequence[Estimate]) -> Html:
    """One row a metric, one column a model; below each number its 95% interval and n."""
    models = list(dict.fromkeys(item.source for item in estimates))
    by_name: dict[str, dict[str, Estimate]] = {}
    for item in estimates:
        by_name.setdefault(item.name, {})[item.source] = item
    head = element("tr", element("th"), *(element("th", model, scope="col") for model in models))
    rows = [
        element(
            "tr",
            element("th", label(first), element("small", first.meaning), scope="row", title=_hover(first)),
            *(_cell(row.get(model)) for model in models),
        )
        for row in by_name.values()
        for first in (next(iter(row.values())),)
    ]
    return element("div", element("table", head, *rows, class_="models"), class_="card scroll")


def _cell(item: Estimate | None) -> Html:
    if item is None:
        return element("td")
    bare = item.unit if item.unit in {"fraction", "seconds"} else None
    return element("td", quantity(item.value, bare), element("small", ", ".join(_spread(item, "", bare))))


def _spread(item: Estimate, words: str, bare: str | None) -> list[str]:
    """The interval and n, those of them that are known."""
    parts = []
    if item.low is not None and item.high is not None:
        parts.append(f"{words}{quantity(item.low, bare)} to {quantity(item.high, bare)}")
    if item.n is not None:
        parts.append(f"n\u00a0=\u00a0{number(item.n)}")
    return parts


def account(paragraphs: Sequence[str]) -> Html:
    return element("div", *(element("p", text) for text in paragraphs), class_="card account")


def warnings(messages: Sequence[str]) -> list[Html]:
    return [element("div", element("p", text), class_="warning", role="note") for text in messages]


def exchanges(items: Sequence[Exchange]) -> list[Html]:
    """Prompts, each with its answers side by side. Colours follow the order of the answers."""
    return [
        element(
            "article",
            element("p", item.prompt, class_="prompt"),
            element("div", *(_answer(i, answer) for i, answer in enumerate(item.answers)), class_="answers"),
            class_="card exchange",
        )
        for item in items
    ]


def _answer(index: int, answer: Answer) -> Html:
    said = (
        element("div", answer.text, class_="said") if answer.text.strip() else element("div", "empty", class_="empty")
    )
    notes = element("span", ", ".join(answer.notes)) if answer.notes else None
    who = element("div", element("b", answer.who), notes, class_="who")
    return element("div", who, said, class_=f"answer c{index % 6}")


def key_value_table(rows: Sequence[tuple[str, str]]) -> Html:
    return element(
        "table", *(element("tr", element("th", key, scope="row"), element("td", value)) for key, value in rows)
    )
