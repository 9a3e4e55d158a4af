"""Packages that a setting needs and that not every installation has. Nothing here imports them."""

from __future__ import annotations

from importlib.util import find_spec

from accord.errors import ConfigError

__all__ = ["require_bitsandbytes", "require_flash_attention"]


def require_bitsandbytes(key: str) -> None:
    """Raises ConfigError when `key` is set and bitsandbytes is not installed."""
    if find_spec("bitsandbytes") is None:
        raise ConfigError(
            f"`{key}` needs bitsandbytes, which is not installed: pip install 'accord-rlhf[quant]', or unset `{key}`"
        )


def require_flash_attention(key: str) -> None:
    """Raises ConfigError when `key` asks for flash-attn and it is not installed."""
    if find_spec("flash_attn") is None:
        raise ConfigError(
            f"`{key}` = flash needs the package flash-attn, which is not installed: pip install flash-attn, or set "
            f"`{key}` to auto"
        )
