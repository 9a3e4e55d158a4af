"""Packages that a setting needs and that not every installation has. Nothing here imports them."""

from __future__ import annotations

from importlib.util import find_spec

from accord.errors import ConfigError

__all__ = ["require_bitsandbytes"]


def require_bitsandbytes(key: str) -> None:
    """Raises ConfigError when `key` is set and bitsandbytes is not installed."""
    if find_spec("bitsandbytes") is None:
        raise ConfigError(
            f"`{key}` needs bitsandbytes, which is not installed: pip install 'accord-rlhf[quant]', or unset `{key}`"
        )
