"""A trunk compiled for the passes that train it.

Passes with gradient, and they alone, run through `torch.compile`; sampling, the reference and every other reading stay
as they are, and so do copies of the model. Shapes are dynamic: rows and lengths are symbols, and code is compiled for
passes of several rows and for those of one, each with either kind of mask, not for every shape. So nothing is padded.
Results differ from those of the plain trunk by rounding.
"""

from __future__ import annotations

import os
import shutil
import sys
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from accord.errors import ConfigError

__all__ = ["check_compiler", "compile_seconds", "compile_trunk", "trunk_of"]

# By model, not in it: a copy of a module takes its attributes along, and would run the original's weights.
_COMPILED: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()


def check_compiler(key: str, device: torch.device) -> None:
    """Raises ConfigError where what `key` asks for takes a C++ compiler, and the one that torch calls is not there."""
    compiler = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
    if device.type == "cpu" and shutil.which(compiler) is None:
        raise ConfigError(
            f"`{key}` needs a C++ compiler on a CPU, and torch finds no {compiler} on the PATH: install one, name it "
            f"in the environment variable CXX, or drop `{key}`"
        )


def compile_trunk(model: Any, *, backend: Any = "inductor") -> None:
    """From here on passes with gradient through the model's trunk are compiled, at the first of each kind."""
    _COMPILED[model] = torch.compile(model.base_model, dynamic=True, backend=backend)


def trunk_of(model: Any) -> Any:
    """What computes the model's hidden states: its trunk, or what that was compiled to."""
    return _COMPILED.get(model, model.base_model) if torch.is_grad_enabled() else model.base_model


def compile_seconds() -> float:
    """Seconds that this process has spent compiling so far."""
    dynamo = sys.modules.get("torch._dynamo.utils")
    return 0.0 if dynamo is None else sum(dynamo.compilation_time_metrics.get("_compile.compile_inner", ()))
