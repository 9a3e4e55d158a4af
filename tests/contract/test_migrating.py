"""docs/migrating.md keeps its word: what other tools call an option leads to what we call it, in the error itself."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from accord.config import AdapterConfig, Recipe, recipe_from
from accord.config.foreign import ABSENT, RENAMED
from accord.config.load import section_in
from accord.errors import ConfigError

PAGE = Path(__file__).resolve().parents[2] / "docs/migrating.md"


def rows() -> list[tuple[str, str]]:
    """(theirs, ours or "-") of every row of the tables of options; `a: b` and `--a.b` there are a.b here."""
    found = []
    for theirs, ours in re.findall(r"^\| (`[^|]*`) \| (`[^`|]*`|-) \|[^|]*\|$", PAGE.read_text(encoding="utf-8"), re.M):
        found += [
            (name.removeprefix("--").replace(": ", "."), ours.strip("`")) for name in re.findall(r"`([^`]*)`", theirs)
        ]
    return sorted(set(found))


def fields_at(path: str) -> bool:
    """Whether a dotted path is a key of a recipe."""
    section: type[Any] | None = Recipe
    for part in path.split("."):
        if section is None or part not in section.model_fields:
            return False
        section = section_in(section.model_fields[part].annotation)
    return True


def refusal(theirs: str, section: str | None) -> str:
    """What is said when an option of theirs is written where it would be written."""
    tree: dict[str, Any] = {}
    node = tree
    path = theirs.split(".") if "." in theirs or section is None else [section, theirs]
    for part in path[:-1]:
        node = node.setdefault(part, {})
    node[path[-1]] = 1
    with pytest.raises(ConfigError) as refused:
        recipe_from(tree)
    return str(refused.value)


def test_the_page_has_the_tables_this_test_reads() -> None:
    assert len(rows()) > 120
    assert {"init_kl_coef", "method.init_kl_coef", "algo.kl.init_coef"} <= {theirs for theirs, _ in rows()}


@pytest.mark.parametrize(("theirs", "ours"), [pytest.param(*row, id=row[0]) for row in rows() if row[1] != "-"])
def test_their_option_leads_to_ours(theirs: str, ours: str) -> None:
    assert fields_at(ours)
    section = ours.split(".")[0] if "." in ours and ours.split(".")[0] not in ("model", "data") else "ppo"
    message = refusal(theirs, section)
    assert re.search(rf"unknown key `[\w.]*{re.escape(theirs)}`; here it is called `{re.escape(ours)}`", message), (
        message
    )


@pytest.mark.parametrize("theirs", [theirs for theirs, ours in rows() if ours == "-"])
def test_an_option_that_is_not_here_says_why(theirs: str) -> None:
    assert "there is no such option: " in refusal(theirs, "ppo")


def test_every_foreign_name_leads_to_a_key_that_exists_and_is_no_key_itself() -> None:
    sections = [section_in(field.annotation) for field in Recipe.model_fields.values()]
    keys = {key for section in sections if section for key in section.model_fields} | Recipe.model_fields.keys()
    keys |= AdapterConfig.model_fields.keys()
    for theirs, ours in RENAMED.items():
        assert fields_at(ours) if "." in ours else ours in keys, ours
        assert not fields_at(theirs), theirs
    assert not (RENAMED.keys() & ABSENT.keys())
    assert not any(fields_at(theirs) for theirs in ABSENT)
