"""Functions that a recipe names. Torch-free."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from typing import Any

from accord.errors import ConfigError

__all__ = ["load_function"]


def load_function(spec: str, key: str) -> Callable[..., Any]:
    """The function behind `module:function`, looked up on the import path and in the current folder."""
    module_name, colon, name = spec.partition(":")
    if not colon or not name or not module_name or module_name.startswith("."):
        raise ConfigError(f"`{key}` = {spec!r}: expected module:function, for example my_rewards:score")
    # A console script starts with its own folder on the path, where `python -m` has the current one.
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    if "" not in sys.path:
        sys.path.insert(0, "")  # the current folder, which an installed command does not look in
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ConfigError(
            f"`{key}` = {spec!r}: cannot import {module_name!r} ({error}); "
            "it must be installed, in the current folder, or in a folder on PYTHONPATH"
        ) from error
    except (Exception, SystemExit) as error:  # the user's code may raise anything
        raise ConfigError(
            f"`{key}` = {spec!r}: importing {module_name!r} failed with {type(error).__name__}: {error}"
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        raise ConfigError(f"`{key}` = {spec!r}: {module_name!r} has no function {name!r}")
    return function
