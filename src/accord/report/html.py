"""The building blocks of a report page: elements that escape by default, readable numbers, and the page itself.

Everything a model or a file wrote is untrusted. A plain `str` is always escaped; only `Html`, which nothing but
`element` and `join` make, goes in as it is. Forgetting a conversion therefore shows tags as text, never runs them.
The page allows no script, no form and no request of any kind: its content-security policy permits one style sheet,
by its hash.
"""

from __future__ import annotations

import base64
import hashlib
import html
import math
import unicodedata
from collections.abc import Iterable, Sequence

from accord.report.style import STYLE

__all__ = ["Html", "duration", "element", "join", "number", "page", "quantity", "section", "with_interval"]

_VOID = frozenset({"meta"})
_PLAIN = frozenset("\n\t\u200c\u200d")  # the two joiners are part of spelling (Persian, emoji) and hide nothing
_NO_CHARACTER = frozenset({0xFFFE, 0xFFFF})  # not allowed in XML, so not in a drawing


class Html(str):
    """Text that is markup already and must not be escaped again."""

    __slots__ = ()


def _escape(text: str) -> str:
    """Escape markup, and make the characters visible that could hide or reorder text or break the file."""
    return html.escape("".join(_visible(character) for character in text), quote=True)


def _visible(character: str) -> str:
    code = ord(character)
    if character in _PLAIN or (unicodedata.category(character) not in {"Cc", "Cf", "Cs"} and code not in _NO_CHARACTER):
        return character
    return chr(0x2400 + code) if code < 0x20 else f"\u27e8U+{code:04X}\u27e9"


def element(name: str, /, *children: str | None, **attributes: str | float | None) -> Html:
    """One element. Children that are not `Html` are escaped, None is left out; `class_` is class, `x_y` is x-y."""
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{_escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    if name in _VOID:
        return Html(f"<{name}{written}/>")
    return Html(f"<{name}{written}>{join(children)}</{name}>")


def join(parts: Iterable[str | None]) -> Html:
    """Parts one after the other, escaped unless they are `Html`."""
    return Html("".join(part if isinstance(part, Html) else _escape(part) for part in parts if part is not None))


def number(value: float) -> str:
    """Four significant digits at most, thin-spaced thousands, a real minus sign; "not a number" is said, not hidden."""
    if not math.isfinite(value):
        return "not finite"
    if value == int(value) and abs(value) < 1e12:
        text = f"{int(value):,}"
    elif 1e-3 <= abs(value) < 1e4:
        text = f"{value:,.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"
    else:
        mantissa, _, exponent = f"{value:.2e}".partition("e")
        text = f"{float(mantissa):g}e{int(exponent)}"
    return text.replace(",", "\u2009").replace("-", "\u2212")


def quantity(value: float, unit: str | None) -> str:
    """A number with its unit: fractions as percent, seconds as a duration."""
    if unit == "fraction":
        return f"{value * 100:.1f}%".replace("-", "\u2212") if math.isfinite(value) else number(value)
    if unit == "seconds":
        return duration(value)
    return f"{number(value)} {unit}" if unit else number(value)


def with_interval(value: float, low: float | None, high: float | None, n: int | None, unit: str | None) -> str:
    """ "68.3% [64.1%, 72.4%], n = 300", with what is unknown left out."""
    bare = unit if unit in {"fraction", "seconds"} else None
    text = quantity(value, unit)
    if low is not None and high is not None:
        text += f" [{quantity(low, bare)}, {quantity(high, bare)}]"
    return text if n is None else f"{text}, n\u00a0=\u00a0{number(n)}"


def duration(seconds: float) -> str:
    """Seconds as people say them."""
    if not math.isfinite(seconds):
        return number(seconds)
    if seconds < 60:
        return f"{number(round(seconds, 1) if seconds >= 1 else seconds)} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def section(title: str, *children: str | None, note: str | None = None) -> Html:
    """A titled part of the page, reachable from the contents line."""
    lead = element("p", note, class_="note") if note else None
    return element("section", element("h2", title), lead, *children, id=_anchor(title))


def _anchor(title: str) -> str:
    return "".join(character if character.isalnum() else "-" for character in title.lower())


def page(title: str, header: Html, sections: Sequence[tuple[str, Html]]) -> str:
    """The whole file. `sections` are (title, section) pairs; their titles make the contents line."""
    digest = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    contents = element("nav", *(element("a", name, href=f"#{_anchor(name)}") for name, _ in sections))
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=policy),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("title", title),
        element("style", Html(STYLE)),
    )
    footer = element(
        "footer", "Made by Accord. This file is complete in itself: it needs no network and runs no script."
    )
    body = element("body", element("main", header, contents, *(part for _, part in sections), footer))
    return "<!doctype html>\n" + element("html", head, body, lang="en") + "\n"
