"""What a model's path may be, found out without loading anything. Torch-free."""

from __future__ import annotations

from pathlib import Path

from accord.errors import ConfigError

__all__ = ["check_model_path"]

_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def check_model_path(path: str | Path) -> None:
    """Raises ConfigError for what cannot be a model: no folder and no hub name, or a folder without safe weights."""
    folder = Path(path)
    if not folder.is_dir():
        if str(path).count("/") != 1 or str(path).startswith((".", "/", "~")):
            raise ConfigError(
                f"{path}: no such folder; expected a Hugging Face model folder, or a hub name such as owner/name"
            )
        return
    if (folder / "adapter_config.json").is_file():
        raise ConfigError(
            f"{path}: this folder holds an adapter, which is no model by itself; name the folder `model` that Accord "
            "left beside it, or merge the adapter into its model and save that"
        )
    if not (folder / "config.json").is_file():
        raise ConfigError(f"{path}: no config.json in this folder; expected a Hugging Face model folder")
    if not any(folder.glob("*.safetensors")):
        pickled = sorted(file.name for pattern in _PICKLED for file in folder.glob(pattern))
        found = f"only {pickled[0]}, which can run code when opened" if pickled else "no weights"
        raise ConfigError(f"{path}: found {found}; expected *.safetensors; convert the model and save it again")
