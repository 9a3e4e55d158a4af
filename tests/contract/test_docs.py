"""The documentation says what is so: commands parse, recipes load, links lead somewhere, defaults and names are the
code's."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
import shlex
from collections.abc import Iterator, Mapping
from fnmatch import fnmatch
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from accord.cli.main import _parser
from accord.config import Recipe, load_recipe
from accord.config.load import overrides_tree, recipe_from, section_in
from accord.methods.catalogue import STAGES
from accord.metrics import FAMILIES, GROUPS, METRICS

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
SECTIONS = [name for name, field in Recipe.model_fields.items() if section_in(field.annotation) is not None]


def blocks(page: Path) -> Iterator[tuple[str, str]]:
    """(language, text) of every fenced block; indented blocks have the language ""."""
    text = page.read_text(encoding="utf-8")
    for match in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        yield match[1], match[2]
    for line in re.findall(r"^    (\S.*)$", re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL), re.M):
        yield "", line


def prose(page: Path) -> str:
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def of_pages(found: Mapping[Path, list[Any]]) -> list[Any]:
    """One test parameter for each thing found, named after its page."""
    return [
        pytest.param(item, id=f"{page.relative_to(ROOT)}-{number}")
        for page, items in found.items()
        for number, item in enumerate(items)
    ]


def commands(program: str) -> list[Any]:
    """The arguments of every line in a block that begins with the program's name."""
    lines = {
        page: [
            shlex.split(line, comments=True)[1:]
            for language, text in blocks(page)
            if language in ("", "sh")
            for line in text.splitlines()
            if line.startswith(program + " ")
        ]
        for page in PAGES
    }
    return of_pages(lines)


def in_language(language: str) -> list[Any]:
    return of_pages({page: [text for found, text in blocks(page) if found == language] for page in PAGES})


def of_family(name: str) -> bool:
    """Whether a metric is one of those that have a name from the recipe in them."""
    return any(fnmatch(name, family) for family in FAMILIES)


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


def generator_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate_docs", ROOT / "scripts/generate_docs.py")
    assert spec and spec.loader
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


def shown_default(value: object) -> str:
    return "unset" if value is None else str(value)


def tabled_settings(page: Path) -> dict[str, str]:
    """key -> value of the rows "| `section.key` | `value` | ..." of a page's tables."""
    return dict(re.findall(r"^\| `([a-z_]+\.[a-z_0-9]+)` \| `([^`]*)` \|", prose(page), re.MULTILINE))


def setting(tree: Mapping[str, Any], key: str) -> str:
    section, name = key.split(".")
    return shown_default(tree[section][name])


@pytest.mark.parametrize("arguments", commands("accord"))
def test_every_command_in_the_docs_parses(arguments: list[str]) -> None:
    args = _parser().parse_args(arguments)
    recipe_from(overrides_tree(getattr(args, "overrides", [])))


@pytest.mark.parametrize("arguments", commands("make"))
def test_every_make_target_in_the_docs_exists(arguments: list[str]) -> None:
    wanted = {word for word in arguments if "=" not in word}
    assert wanted and wanted <= make_targets()


@pytest.mark.parametrize("text", in_language("yaml"))
def test_every_recipe_in_the_docs_loads(text: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(text, encoding="utf-8")
    load_recipe(tmp_path / "recipe.yaml")


@pytest.mark.parametrize("recipe", [pytest.param(path, id=path.name) for path in RECIPES])
def test_every_recipe_in_the_repository_loads(recipe: Path) -> None:
    load_recipe(recipe)


@pytest.mark.parametrize("text", in_language("python"))
def test_python_in_the_docs_runs_as_far_as_it_needs_no_model(text: str) -> None:
    program = compile(ast.parse(text), "docs", "exec")
    if "accord.train(" not in text and "from_pretrained(" not in text:
        exec(program, {})


@pytest.mark.parametrize("page", [pytest.param(page, id=str(page.relative_to(ROOT))) for page in PAGES])
def test_links_lead_to_a_file_and_a_heading(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if target.startswith(("http://", "https://")):
            continue
        name, _, heading = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), f"{page}: {target}"
        if heading:
            titles = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
            assert heading in slugs, f"{page}: {target}"


@pytest.mark.parametrize("page", [pytest.param(page, id=str(page.relative_to(ROOT))) for page in PAGES])
def test_keys_metrics_and_files_named_in_the_docs_exist(page: Path) -> None:
    text = prose(page)
    for section, name in re.findall(rf"`({'|'.join(SECTIONS)})\.(\w+)\b(?!\()", text):
        model = section_in(Recipe.model_fields[section].annotation)
        path_in_a_row = section == "data" and page.name == "data-formats.md"
        assert model and (name in {*model.model_fields, "py", "jsonl"} or path_in_a_row), f"{page}: {section}.{name}"
    for name in re.findall(rf"`((?:{'|'.join(GROUPS)})/[\w/]+)`", text):
        assert name in METRICS or of_family(name) or (ROOT / "src/accord" / name).exists(), f"{page}: {name}"
    for name in re.findall(r"`([\w/]+/\w+\.py)(?:::\w+)?`", text):
        assert any((folder / name).exists() for folder in (ROOT, ROOT / "src/accord", ROOT / "src")), f"{page}: {name}"


@pytest.mark.parametrize("name", [page.stem for page in sorted((ROOT / "docs/methods").glob("*.md"))])
def test_the_defaults_on_a_methods_page_are_the_codes(name: str) -> None:
    recipe = recipe_from({stage: {} for stage in STAGES}).model_dump()
    tabled = tabled_settings(ROOT / f"docs/methods/{name}.md")
    assert tabled and tabled == {key: setting(recipe, key) for key in tabled}


def test_every_row_of_the_papers_page_names_a_function_and_a_test_of_it() -> None:
    page = prose(ROOT / "docs/papers.md")
    rows = re.findall(r"^\|[^|]*\|[^|]*\| `losses/(\w+)\.py` `(\w+)` \| `([\w/]+\.py)` `(\w+)` \|$", page, re.MULTILINE)
    assert len(rows) == len(re.findall(r"^\| .*\|$", page, re.MULTILINE)) - 1
    for module, function, file, test in rows:
        assert callable(getattr(importlib.import_module(f"accord.losses.{module}"), function)), function
        source = (ROOT / file).read_text(encoding="utf-8")
        body = re.search(rf"^def {test}\(.*?(?=^\S|\Z)", source, re.MULTILINE | re.DOTALL)
        assert body and function in source, f"{file}: {test} of {function}"


@pytest.mark.parametrize("name", ["quickstart", "randomwalks"])
def test_the_settings_on_a_demos_page_are_the_demos(name: str) -> None:
    demo = importlib.import_module(f"accord.demos.{name}")
    recipe = recipe_from(demo.SETTINGS).model_dump()
    tabled = tabled_settings(ROOT / f"docs/{name}.md")
    assert tabled and tabled == {key: setting(recipe, key) for key in tabled}


def test_the_quickstarts_page_counts_its_data_as_the_quickstart_does() -> None:
    from accord.demos.quickstart import NUM_COMPARED, NUM_DEMONSTRATIONS, NUM_HELD_OUT, NUM_PROMPTS

    rows = dict(re.findall(r"^\| `(\w+)` \|.*\| ([^|]*) \|$", prose(ROOT / "docs/quickstart.md"), re.MULTILINE))
    assert rows["sft"].startswith(f"{NUM_DEMONSTRATIONS:,} demonstrations")
    assert rows["annotate"].startswith(f"{NUM_COMPARED:,} prompts")
    assert rows["ppo"].startswith(f"{NUM_PROMPTS:,} prompts")
    assert rows["evaluate"].startswith(f"{NUM_HELD_OUT:,} held-out prompts")


def test_generated_pages_are_what_the_code_says() -> None:
    for name, page in generator_script().PAGES.items():
        assert (ROOT / "docs" / name).read_text(encoding="utf-8") == page(), f"docs/{name}: run `make docs`"


def test_both_readmes_show_the_same_commands() -> None:
    def without_comments(page: Path) -> list[str]:
        return [re.sub(r"\s*#.*", "", text) for language, text in blocks(page) if language]

    assert without_comments(ROOT / "README.md") == without_comments(ROOT / "README.zh-CN.md")
