"""Checkpoints of TRL's language model with a value head, taken apart: a plain policy, and a value model beside it.

TRL (up to 0.11, and its experimental PPO since) saves one model with two outputs: the causal model's own tensors, and
`v_head.summary.weight` (1, H) and `v_head.summary.bias` (1,) beside them, in the same files or in
`value_head.safetensors`. The value of a position is

    V = w . h + b        h (H,) = the last hidden state, after the final norm

which is what a sequence classifier with one output computes from the same trunk, but for the constant b: transformers'
classifiers have no bias. It is kept as `score.bias` in the value model's file, which Accord reads (`load_reward_model`)
and plain transformers leaves out, so there its values are lower by b.

Left out: dropout in front of the head (Accord trains without), heads of other shapes, pickled files.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from accord.errors import ConfigError
from accord.models.heads import scalar_head
from accord.models.load import load_policy, reward_model_from, save_model, unread_tensors
from accord.models.paths import check_model_path

__all__ = ["ImportedModels", "import_value_head"]

_WEIGHT, _BIAS = "v_head.summary.weight", "v_head.summary.bias"
_PICKLED = ("pytorch_model*.bin", "value_head.bin")


@dataclass(frozen=True, slots=True)
class ImportedModels:
    """Where the two models lie, and the constant that plain transformers would leave out of the values."""

    policy: Path
    value: Path
    bias: float


def import_value_head(folder: Path, out: Path) -> ImportedModels:
    """Write the checkpoint's policy to `out/policy` and its value model to `out/value`, in float32.

    Raises: ConfigError for what is no such checkpoint (saying what it is), for pickled files (saying how to convert
        them safely), and when `out` holds something already.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} exists already and nothing is replaced: name another folder with --out")
    _refuse_pickled(folder)
    check_model_path(folder)
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such folder; expected one that `save_pretrained` of TRL's model has written")
    weight, bias = _value_head(folder)
    with unread_tensors():
        policy, tokenizer = load_policy(folder)
    value = reward_model_from(policy, seed=0)
    head = scalar_head(value)
    if weight.shape != head.weight.shape:
        raise ConfigError(
            f"{folder}: the value head {_WEIGHT} has shape {tuple(weight.shape)}, and the hidden states of "
            f"{type(policy).__name__} ask for {tuple(head.weight.shape)}: the head belongs to another model"
        )
    if not all(tensor.is_floating_point() and bool(tensor.isfinite().all()) for tensor in (weight, bias)):
        raise ConfigError(
            f"{folder}: the value head {_WEIGHT} holds what are no finite numbers ({weight.dtype}): a value model that "
            "diverged, or a damaged file; let `ppo.value_init` start from the reward model or the policy"
        )
    with torch.no_grad():
        head.weight.copy_(weight)
        head.bias = nn.Parameter(bias.float())
    # TRL's PPO can leave a generation configuration that never stops.
    eos_id = tokenizer.eos_token_id
    card = f"Imported from {folder} by `accord import-value-head`."
    stop_ids = (eos_id,) if policy.generation_config.eos_token_id is None and eos_id is not None else ()
    save_model(policy, tokenizer, out / "policy", stop_ids=stop_ids, card=f"# Policy\n\n{card}\n")
    constant = (
        f"`score.bias` in its file, {float(bias):+.6g}, belongs to every value; transformers' classifier, which has no "
        "bias, leaves it out, and Accord does not."
    )
    save_model(value, tokenizer, out / "value", card=f"# Value model\n\n{card} {constant}\n")
    return ImportedModels(out / "policy", out / "value", float(bias))


def _value_head(folder: Path) -> tuple[Tensor, Tensor]:
    """The head's weight (1, H) and bias (1,), from whichever safetensors file has them."""
    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt") as tensors:
                found |= {name: tensors.get_tensor(name) for name in tensors.keys() if name.startswith("v_head.")}
        except SafetensorError as error:
            raise ConfigError(f"{file} is no whole safetensors file ({error}): copy it again") from error
    if not found:
        raise ConfigError(
            f"{folder}: no {_WEIGHT} in its safetensors files, so this is no TRL model with a value head: a plain "
            "policy needs no import, and a reward model can be `ppo.value_init` as it is"
        )
    others = sorted(found.keys() - {_WEIGHT, _BIAS})
    if _WEIGHT not in found or others:
        raise ConfigError(
            f"{folder}: expected a linear value head, {_WEIGHT} and {_BIAS}, as TRL has, and found "
            f"{', '.join(others or found)} (trlX's is two layers, for which a classifier has no place): let "
            "`ppo.value_init` start from the reward model or the policy"
        )
    return found[_WEIGHT], found.get(_BIAS, torch.zeros(1))


def _refuse_pickled(folder: Path) -> None:
    """Raises ConfigError where weights, or the head, are only there as pickled files."""
    pickled = sorted(file for pattern in _PICKLED for file in folder.glob(pattern))
    safe = sorted(folder.glob("*.safetensors"))
    if not pickled or (safe and not any(file.name == "value_head.bin" for file in pickled)):
        return
    target = "value_head.safetensors" if safe else "model.safetensors"
    if (folder / target).exists():
        return
    files = [file for file in pickled if not safe or file.name == "value_head.bin"]
    names = ", ".join(file.name for file in files)
    raise ConfigError(
        f"{folder} holds {names}: pickled files can run code when they are opened, so Accord opens none. Convert "
        f"{'them' if len(files) > 1 else 'it'} once with torch's reader that runs no code:\n  "
        f"{_conversion([str(file) for file in files], str(folder / target))}"
    )


def _conversion(sources: list[str], target: str) -> str:
    return (
        'python -c "import torch; from safetensors.torch import save_file; t = {}; '
        f"[t.update(torch.load(f, map_location='cpu', weights_only=True)) for f in {sources!r}]; "
        f"save_file({{k: v.clone().contiguous() for k, v in t.items()}}, {target!r}, metadata={{'format': 'pt'}})\""
    )
