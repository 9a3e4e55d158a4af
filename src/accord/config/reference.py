"""The configuration in words: what `--help` prints and what docs/configuration.md is made of. Torch-free."""

from __future__ import annotations

import re
import textwrap
import typing
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from accord.config.load import section_in
from accord.config.recipe import Recipe

__all__ = ["key_lines", "reference_page"]

WIDTH = 100


def key_lines(section: str) -> str:
    """Every key of a recipe's section with its default and meaning, one paragraph each."""
    model = section_in(Recipe.model_fields[section].annotation)
    assert model is not None
    return "\n".join(
        textwrap.fill(
            f"{section}.{name} ({_default(field)}): {field.description}",
            WIDTH,
            initial_indent="  ",
            subsequent_indent="      ",
            break_long_words=False,
            break_on_hyphens=False,
        )
        for name, field in model.model_fields.items()
    )


def reference_page() -> str:
    """docs/configuration.md, whole."""
    parts = [
        "# Configuration reference",
        "Generated from the code by `scripts/generate_docs.py`. A recipe is a YAML file with these sections; any key "
        "can be changed on the command line with `--set section.key=value`, and taken back with "
        "`--set section.key=null`. Unknown keys are errors that name the nearest one. `--dry-run` shows the resolved "
        "configuration without running it.",
        "## Top level",
        _table(Recipe, only_plain=True),
    ]
    shown: dict[type[BaseModel], str] = {}
    for name, field in Recipe.model_fields.items():
        model = section_in(field.annotation)
        if model is not None:
            parts += _section(name, model, shown)
    return "\n\n".join(parts) + "\n"


def _section(name: str, model: type[BaseModel], shown: dict[type[BaseModel], str]) -> list[str]:
    """A section and those inside it. `shown` (section -> its first name) is filled: the keys of a section that several
    have stand once."""
    title = f"{'#' * min(2 + name.count('.'), 4)} `{name}`"
    if model in shown:
        return [title, f"As [`{shown[model]}`](#{re.sub(r'[^a-z0-9_-]', '', shown[model].lower())})."]
    shown[model] = name
    parts = [title, (model.__doc__ or "").strip(), _table(model)]
    for inner_name, field in model.model_fields.items():
        inner = section_in(field.annotation)
        if inner is not None:
            entry = ".NAME" if typing.get_origin(field.annotation) is dict else ""
            parts += _section(f"{name}.{inner_name}{entry}", inner, shown)
    return parts


def _table(model: type[BaseModel], *, only_plain: bool = False) -> str:
    rows = [
        f"| `{name}` | {_kind(field.annotation)} | `{_default(field)}` | {_cell(field.description)} |"
        for name, field in model.model_fields.items()
        if not (only_plain and section_in(field.annotation))
    ]
    return "\n".join(["| key | type | default | meaning |", "|---|---|---|---|", *rows])


def _cell(text: str | None) -> str:
    return (text or "").replace("|", r"\|")


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value: Any = field.get_default(call_default_factory=True)  # type: ignore[call-arg]
    if isinstance(value, BaseModel):
        return "see below"
    return "unset" if value is None or value in ((), {}) else str(value)


def _kind(annotation: Any) -> str:
    text = str(annotation) if not isinstance(annotation, type) else annotation.__name__
    if section_in(annotation) is not None:
        return "list" if "tuple" in text else "sections by name" if "dict[" in text else "section"
    if "Literal" in text:
        options = text.partition("Literal[")[2].partition("]")[0].replace("'", "`").replace(", ", " or ")
        return f"list of {options}" if text.startswith("tuple[") else options
    return text.replace(" | None", "").replace("typing.", "").replace("|", "or")
