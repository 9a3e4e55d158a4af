"""Where models are: the device that a recipe names, and whether this machine has it."""

from __future__ import annotations

import torch

from accord.errors import ConfigError

__all__ = ["choose_device"]


def choose_device(name: str) -> torch.device:
    """The device of `model.device`: `auto` is the first GPU where there is one, else the CPU.

    Raises: ConfigError for a GPU that this machine does not have, or that torch cannot use.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        return torch.device("cuda", 0) if count else torch.device("cpu")
    device = torch.device(name)
    if device.type != "cuda":
        return device
    index = device.index or 0
    if index >= count:
        why = "torch finds no usable GPU (is it a build for CUDA, and the driver there?)"
        if count:
            why = f"this machine has {count}, counted from 0"
        raise ConfigError(f"`model.device` = {name}: {why}; set it to auto or cpu")
    return torch.device("cuda", index)
