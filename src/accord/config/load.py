"""Recipes from YAML and `--set`, and every mistake in them reported at once with its fix."""

from __future__ import annotations

import difflib
import re
import types
import typing
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from accord.config.check import contradictions
from accord.config.foreign import ABSENT, RENAMED
from accord.config.recipe import Recipe
from accord.errors import ConfigError

__all__ = ["load_recipe", "merged", "overrides_tree", "parse_override", "recipe_from", "section_in"]

EXPONENT = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)[eE][+-]?\d+")


def parse_override(text: str) -> tuple[tuple[str, ...], Any]:
    """`section.key=value` -> (("section", "key"), value). The value is read as YAML; `1e-5` is a number."""
    key, equals, value = text.partition("=")
    if not equals or not all(part.strip() for part in key.split(".")):
        raise ConfigError(f"--set {text!r}: expected section.key=value, for example --set ppo.kl_coef=0.1")
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {text!r}: the value is not valid YAML ({error}); quote it") from error
    return tuple(part.strip() for part in key.split(".")), _number(parsed)


def _number(value: Any) -> Any:
    """YAML 1.1 reads `1e-5` as text; people mean the number. Quoted digits stay the text they are."""
    if isinstance(value, str):
        return float(value) if EXPONENT.fullmatch(value) else value
    if isinstance(value, dict):
        return {key: _number(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_number(item) for item in value]
    return value


def load_recipe(
    path: str | Path | None, overrides: Sequence[str] = (), *, defaults: Mapping[str, Any] | None = None
) -> Recipe:
    """Read a recipe file, apply the overrides in order, check everything.

    `defaults` lie below the file (what a verb such as `accord sft` implies). Relative data and model paths in a file
    are taken as the user wrote them, relative to the current folder.

    Raises: ConfigError naming every wrong key at once.
    """
    tree: dict[str, Any] = merged({}, defaults or {})
    if path is not None:
        tree = merged(tree, _read_yaml(Path(path)))
    given = overrides_tree(overrides)
    return recipe_from(merged(tree, given), source=str(path) if path is not None else "--set", given=given)


def overrides_tree(overrides: Sequence[str]) -> dict[str, Any]:
    """All `section.key=value` texts as one nested mapping; later ones win."""
    tree: dict[str, Any] = {}
    for text in overrides:
        keys, value = parse_override(text)
        _assign(tree, keys, value, text)
    return tree


def recipe_from(tree: Mapping[str, Any], *, source: str = "config", given: Mapping[str, Any] | None = None) -> Recipe:
    """A checked `Recipe` from nested mappings. Raises ConfigError listing all problems, those of values that `given`
    holds as mistakes of `--set`."""
    try:
        recipe = Recipe.model_validate(_without_unset(tree, Recipe))
    except ValidationError as error:
        raise ConfigError(_explain(error, source, tree, given or {})) from None
    problems = contradictions(recipe)
    if problems:
        raise ConfigError("\n".join(problems))
    return recipe


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such recipe file") from None
    except (IsADirectoryError, UnicodeDecodeError, PermissionError) as error:
        raise ConfigError(f"{path}: cannot be read as a YAML recipe ({error})") from None
    try:
        tree = yaml.load(text, Loader=_UniqueKeys)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise ConfigError(f"{where}: not valid YAML: {getattr(error, 'problem', error)}") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected sections (`model:`, `data:`, `sft:` ...), found {type(tree).__name__}")
    return {str(key): ({} if value is None else _number(value)) for key, value in tree.items()}


def _without_unset(tree: Mapping[str, Any], section: type[BaseModel]) -> dict[str, Any]:
    """The tree without the keys whose value is null where null is no value: they are as if not given."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        field = section.model_fields.get(key)
        inner = section_in(field.annotation) if field else None
        if field is not None and value is None and type(None) not in typing.get_args(field.annotation):
            continue
        if inner is not None and isinstance(value, Mapping):
            named = field is not None and typing.get_origin(field.annotation) is dict
            value = (
                {
                    name: _without_unset(one, inner) if isinstance(one, Mapping) else one
                    for name, one in value.items()
                    if one is not None
                }
                if named
                else _without_unset(value, inner)
            )
        found[key] = value
    return found


class _UniqueKeys(yaml.SafeLoader):
    """YAML keeps the last of two equal keys and says nothing; a recipe with two is a mistake."""


def _unique_mapping(loader: _UniqueKeys, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, Hashable):
            raise yaml.MarkedYAMLError(problem=f"{key!r} is no key", problem_mark=key_node.start_mark)
        if key in seen:
            raise yaml.MarkedYAMLError(problem=f"the key {key!r} stands twice", problem_mark=key_node.start_mark)
        seen.add(key)
    return yaml.SafeLoader.construct_mapping(loader, node, deep=True)


_UniqueKeys.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _unique_mapping)


def merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Two nested mappings as one; where both have a value, that of `above` stands."""
    result = dict(below)
    for key, value in above.items():
        old = result.get(key)
        if isinstance(old, Mapping) and isinstance(value, Mapping) and not isinstance(value, _Whole):
            value = merged(old, value)
        result[key] = value
    return result


class _Whole(dict[str, Any]):
    """A mapping that was given as one value: it replaces what lies below, where dotted keys are joined to it."""


def _assign(tree: dict[str, Any], keys: tuple[str, ...], value: Any, text: str) -> None:
    node = tree
    for key in keys[:-1]:
        child = node.get(key)
        if child is None:  # null first, then a key inside: what lies below is gone
            child = node[key] = _Whole() if key in node else {}
        if not isinstance(child, dict):
            raise ConfigError(f"--set {text!r}: {key!r} is a value, not a section")
        node = child
    node[keys[-1]] = _Whole(value) if isinstance(value, dict) else value


def _explain(error: ValidationError, source: str, tree: Mapping[str, Any], given: Mapping[str, Any]) -> str:
    mistakes: dict[str, list[str]] = {source: [], "--set": []}
    for item in error.errors():
        unknown = item["type"] == "extra_forbidden"
        for loc in _leaves(item["loc"], item["input"]) if unknown else [item["loc"]]:
            key, hint = ".".join(map(str, loc)), _no_space(loc, item["input"])
            if unknown:
                line = f"unknown key `{key}`{hint or _suggestion(loc, tree)}"
            else:
                line = f"`{key}`: {item['msg'][0].lower()}{item['msg'][1:]}; found {item['input']!r}{hint}"
            mistakes["--set" if _holds(given, loc) else source].append(line)
    return "\n".join(
        f"{where}: " + ("\n  ".join(["", *lines]) if len(lines) > 1 else lines[0])
        for where, lines in mistakes.items()
        if lines
    )


def _holds(given: Mapping[str, Any], loc: tuple[int | str, ...]) -> bool:
    """Whether the value at a place comes from this mapping, or would stand inside one that does."""
    node: Any = given
    for part in loc:
        if isinstance(node, _Whole) or not isinstance(node, Mapping) or part not in node:
            break
        node = node[part]
    return isinstance(node, _Whole) or not isinstance(node, Mapping)


def _no_space(loc: tuple[int | str, ...], value: Any) -> str:
    """`{q_proj:2}` is the key `q_proj:2` without a value to YAML."""
    name, colon, given = str(loc[-1]).partition(":")
    return f"; YAML wants a space after the colon: `{name}: {given}`" if value is None and colon and given else ""


def _leaves(loc: tuple[int | str, ...], value: Any) -> list[tuple[int | str, ...]]:
    """The places of an unknown key: those of the keys inside it where it is a section that another tool has."""
    if not isinstance(value, Mapping) or _foreign(loc) or not any(_foreign((*loc, *rest)) for rest in _paths(value)):
        return [loc]
    return [(*loc, *rest) for rest in _paths(value)]


def _paths(value: Mapping[str, Any]) -> list[tuple[str, ...]]:
    return [
        (str(key), *rest)
        for key, inner in value.items()
        for rest in (_paths(inner) if isinstance(inner, Mapping) and inner else [()])
    ]


def _foreign(loc: tuple[int | str, ...]) -> bool:
    path = ".".join(map(str, loc))
    return path in RENAMED or path in ABSENT


def _suggestion(loc: tuple[int | str, ...], tree: Mapping[str, Any]) -> str:
    """Ours for a name; of sections that both have it, one that the recipe has. Dashes are from a command line."""
    loc = tuple(part if isinstance(part, int) else part.lstrip("-") for part in loc)
    path, name = ".".join(map(str, loc)), str(loc[-1])
    if path in ABSENT or (name in ABSENT and path not in RENAMED):
        return f"; {ABSENT.get(path) or ABSENT[name]}"
    ours = RENAMED.get(path) or RENAMED.get(name)
    section = _section_at(loc[:-1])
    if ours is not None and ("." in ours or (ours in Recipe.model_fields and section is not Recipe)):
        return f"; here it is called `{ours}`"
    if section is None:
        return ""
    prefix = path.removesuffix(name)
    fields = list(section.model_fields)
    if ours in fields:
        return f"; here it is called `{prefix}{ours}`"
    near = difflib.get_close_matches(name, fields, n=1, cutoff=0.6)
    if near:
        return f"; did you mean `{prefix}{near[0]}`?"
    for top, field in sorted(Recipe.model_fields.items(), key=lambda item: item[0] not in tree):
        inner = section_in(field.annotation)
        if inner is not None and (name in inner.model_fields or ours in inner.model_fields):
            return f"; did you mean `{top}.{name if name in inner.model_fields else ours}`?"
    return f"; known here: {', '.join(fields)}"


def _section_at(loc: tuple[int | str, ...]) -> type[BaseModel] | None:
    section: type[BaseModel] | None = Recipe
    parts = iter(part for part in loc if not isinstance(part, int))
    for part in parts:
        field = section.model_fields.get(part) if section else None
        section = section_in(field.annotation) if field else None
        if field is not None and typing.get_origin(field.annotation) is dict:
            next(parts, None)  # the name that the recipe gives
    return section


def section_in(annotation: Any) -> type[BaseModel] | None:
    """The pydantic model inside `X | None`, `tuple[X, ...]` or `Annotated[X, ...]`."""
    if (
        isinstance(annotation, type)
        and not isinstance(annotation, types.GenericAlias)
        and issubclass(annotation, BaseModel)
    ):
        return annotation
    for inner in typing.get_args(annotation):
        found = section_in(inner)
        if found is not None:
            return found
    return None
