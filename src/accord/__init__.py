"""Accord aligns language models with human feedback, end to end, and shows with confidence intervals that they got
better.

`import accord` does not import torch; the names below load what they need when first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["__version__", "train"]

if TYPE_CHECKING:
    from accord.api import train


def __getattr__(name: str) -> Any:
    if name == "train":
        from accord.api import train

        return train
    raise AttributeError(f"module 'accord' has no attribute {name!r}")
