"""Low-rank adapters (LoRA, DoRA): a model that is frozen but for small matrices beside its linear layers.

    lora    y = (W + s B A) x                    A (rank, in), B (out, rank) are trained; W is not; s = alpha / rank
    dora    y = m (W + s B A) / |W + s B A| x    and so is m (out,); |.| (out,) are the lengths of the rows

B starts at zero and m at |W|, so a fresh adapter changes nothing. Switched off, the model is its own reference, bit for
bit, however long the adapter has trained: no second copy is needed. The layers are `peft`'s; they are put inside the
model, which stays of its own class, so that everything that reads a model reads this one too.

Source: Hu et al. 2021, arXiv:2106.09685; Liu et al. 2024, arXiv:2402.09353, whose section 4.3 is followed: to the
gradient, |W + s B A| is a constant. Departures: all linear layers are adapted, not the attention's alone.
Left out: dropout (importance ratios compare two passes over the same tokens), adapted embeddings, biases.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from accord.atomic import new_folder
from accord.errors import ConfigError, TrainingError
from accord.models.heads import score_head
from accord.models.quantise import dequantise, is_quantised, plain_layer, quantised_weight

__all__ = [
    "CONFIG_FILE",
    "AdapterSettings",
    "adapter_heads",
    "adapter_settings",
    "adapters_off",
    "add_adapter",
    "bare_trunk",
    "fold_adapter",
    "has_adapter",
    "load_adapter",
    "load_trainable_state",
    "save_adapter",
    "trainable_state",
]

# `peft` takes seconds to import: it is imported where there is an adapter, not by every run.

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"  # peft's names
_NAME = "default"  # of the adapter within the model; peft's own default


@dataclass(frozen=True, slots=True)
class AdapterSettings:
    """What an adapter is, whatever it has learned: `layers` are the names of the adapted layers, sorted, and `ranks`
    those with a rank other than `rank`."""

    kind: Literal["lora", "dora"]
    rank: int
    alpha: float
    layers: tuple[str, ...]
    ranks: tuple[tuple[str, int], ...]

    def __str__(self) -> str:
        names = ", ".join(self.layers) if len(self.layers) < 9 else f"{len(self.layers)} layers"
        others = "".join(f", rank {rank} on {name}" for name, rank in self.ranks[:3])
        return f"{self.kind} of rank {self.rank} and alpha {self.alpha:g} on {names}{others}"


def add_adapter(
    model: Any,
    *,
    rank: int,
    alpha: float,
    targets: Sequence[str],
    seed: int,
    kind: Literal["lora", "dora"] = "lora",
    ranks: Mapping[str, int] | None = None,
) -> None:
    """Freezes `model` and puts a fresh adapter in: from here on only the adapter trains, and a scalar head if there is
    one.

    Args:
        rank: inner size of the two matrices, at least 1.
        alpha: the adapter's output is multiplied by alpha / rank, whatever rank `ranks` gives a layer.
        targets: last parts of layers' names, such as `q_proj` or `self_attn.q_proj`. Empty = every linear layer of the
            trunk, which neither the output embedding nor a scalar head belongs to.
        seed: the values of A depend on the seed and the shapes alone.
        ranks: ranks other than `rank`, by last parts of layers' names; the longest that fits counts.
    The adapter's weights are at least float32, whatever the model's: small updates vanish in 16 bits.
    Raises: ConfigError for a target that is no linear layer of the trunk, a rank for a layer that is not adapted, or a
        model that peft cannot adapt.
    """
    from peft import LoraConfig
    from peft.functional import cast_adapter_dtype, inject_adapter_in_model

    layers, ranks = _linear_layers(model), ranks or {}
    _require_found(model, layers, "targets", targets)
    names = [name for name in layers if not targets or any(_ends(name, target) for target in targets)]
    _require_found(model, names, "ranks", ranks)
    own = {name: ranks[max(found, key=len)] for name in names if (found := [e for e in ranks if _ends(name, e)])}
    has_head = model.get_output_embeddings() is None
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # pyright: ignore[reportArgumentType]  (declared int; only ever divided)
        target_modules=names,
        rank_pattern=own,
        alpha_pattern={name: alpha * r / rank for name, r in own.items()},
        use_dora=kind == "dora",
        fan_in_fan_out=all(isinstance(layers[name], Conv1D) for name in names),
        task_type="SEQ_CLS" if has_head else "CAUSAL_LM",
    )
    model.is_loaded_in_4bit = is_quantised(model)  # where peft looks
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            inject_adapter_in_model(config, model, _NAME)
        except ValueError as error:
            raise ConfigError(f"no adapter can be put into {type(model).__name__}: {error}") from error
    cast_adapter_dtype(model, _NAME)
    if kind == "dora":
        _set_lengths(model)
    if has_head:
        score_head(model).requires_grad_(True)


def has_adapter(model: nn.Module) -> bool:
    """Whether `add_adapter` was called on this model, or on the one it is a copy of."""
    return hasattr(model, "peft_config")


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Inside the block, the model is what it was before `add_adapter`, bit for bit; a scalar head stays as trained.

    Only layers are switched: no weight is touched. Run the reference without gradient: an adapter gets none.
    """
    layers = [module for _, module in _adapted(model) if not module.disable_adapters]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def fold_adapter(model: Any) -> None:
    """Folds the adapter into the weights, W + s B A for LoRA: the model is a plain one then, for others to load.

    It is done in place, without a second copy: whoever shares the weights is changed too, and there is no way back to
    the reference (a weight that was added to and subtracted from again has other bits). So it comes last. Results are
    those of the adapted model up to the rounding of the weights. Quantised weights become whole again.
    """
    for name, layer in list(_adapted(model)):
        if is_quantised(layer):
            model.set_submodule(name, plain_layer(layer.get_base_layer(), _merged_weight(layer)))
        else:
            layer.merge()
            model.set_submodule(name, layer.get_base_layer())
    dequantise(model)
    model.is_loaded_in_4bit = False
    del model.peft_config


def bare_trunk(model: Any) -> nn.Module:
    """A copy of the trunk without its adapter, if it has one: it shares what the model does not train."""
    trunk = copy.deepcopy(model.base_model, {id(p): p for p in model.parameters() if not p.requires_grad})
    for name, layer in list(trunk.named_modules()):
        if hasattr(layer, "get_base_layer"):
            trunk.set_submodule(name, layer.get_base_layer())
    return trunk


def save_adapter(model: Any, folder: Path, *, base: str) -> None:
    """Writes the adapter, and a scalar head with it, as a folder that peft loads on top of the model `base`.

    The folder is written whole or not at all, and replaces what was there.
    """
    from peft.functional import get_peft_model_state_dict

    config = copy.copy(model.peft_config[_NAME])
    config.base_model_name_or_path = base
    config.inference_mode = True
    config.target_modules = sorted(config.target_modules)  # a set has another order in every process
    tensors = get_peft_model_state_dict(model, adapter_name=_NAME, save_embedding_layers=False)
    if model.get_output_embeddings() is None:
        tensors |= {f"score.{name}": tensor for name, tensor in score_head(model).state_dict().items()}
    named = {f"base_model.model.{name}": tensor.contiguous() for name, tensor in tensors.items()}
    with new_folder(folder) as partial:
        config.save_pretrained(str(partial))
        save_file(named, partial / WEIGHTS_FILE, metadata={"format": "pt"})


def adapter_settings(model_or_folder: Any) -> AdapterSettings:
    """Those of an adapted model, or of a folder that `save_adapter` wrote."""
    if isinstance(model_or_folder, Path):
        config = json.loads((model_or_folder / CONFIG_FILE).read_bytes())
    else:
        config = model_or_folder.peft_config[_NAME].to_dict()
    return AdapterSettings(
        "dora" if config["use_dora"] else "lora",
        config["r"],
        float(config["lora_alpha"]),
        tuple(sorted(config["target_modules"])),
        tuple(sorted(config["rank_pattern"].items())),
    )


def adapter_heads(folder: Path) -> int:
    """How many heads a reward model's adapter was saved with."""
    with safe_open(folder / WEIGHTS_FILE, "pt") as tensors:
        return tensors.get_slice("base_model.model.score.weight").get_shape()[0]


def load_adapter(model: Any, folder: Path) -> None:
    """Puts the adapter that `save_adapter` wrote, and its head, into a plain model of the same kind: the trunk that it
    was trained on. The trunk's weights are frozen and stay as they are."""
    was = adapter_settings(folder)
    add_adapter(model, rank=was.rank, alpha=was.alpha, targets=was.layers, seed=0, kind=was.kind, ranks=dict(was.ranks))
    prefix, ending = "base_model.model.", re.compile(r"(\.lora_[AB]|\.lora_magnitude_vector)(\.weight)?$")
    saved = load_file(folder / WEIGHTS_FILE)
    tensors = {ending.sub(rf"\1.{_NAME}.weight", name.removeprefix(prefix)): tensor for name, tensor in saved.items()}
    load_trainable_state(model, tensors)


def trainable_state(model: nn.Module) -> dict[str, Tensor]:
    """What a checkpoint must hold of a model: its `state_dict` but for the parameters that are frozen, and for what
    quantised ones have beside them under longer names (`weight.absmax`).

    When everything trains that is everything: tied weights under each of their names, and buffers.
    """
    frozen = {name for name, p in model.named_parameters(remove_duplicate=False) if not p.requires_grad}
    quantised = tuple(f"{name}." for name in frozen) if is_quantised(model) else ()
    state = model.state_dict()
    return {name: tensor for name, tensor in state.items() if name not in frozen and not name.startswith(quantised)}


def load_trainable_state(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Puts back what `trainable_state` gave. Raises TrainingError when the model trains other tensors than those."""
    expected = trainable_state(model).keys()
    different = sorted(expected ^ tensors.keys())
    if different:
        raise TrainingError(
            f"the checkpoint holds {len(tensors)} tensors and this model trains {len(expected)}; one of the "
            f"{len(different)} that only one side has is {different[0]!r}. The checkpoint is of other settings or of "
            "another version of the libraries: delete the stage's folder to train anew"
        )
    model.load_state_dict(tensors, strict=False)


def _adapted(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Name and layer, for each layer with an adapter beside it."""
    if has_adapter(model):
        from peft.tuners.lora import LoraLayer

        yield from ((name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer))


@torch.no_grad()
def _set_lengths(model: nn.Module) -> None:
    """Sets DoRA's m to the lengths of the weight's rows as the forward pass computes them, in the adapter's number
    format: `peft` computes them in the weight's own, and in 16 bits a fresh adapter would not be the identity."""
    from peft.utils.integrations import dequantize_module_weight

    for _, layer in _adapted(model):
        first, second = layer.lora_A[_NAME], layer.lora_B[_NAME]
        weight = dequantize_module_weight(layer.get_base_layer()).to(first.weight.dtype)
        vector = layer.lora_magnitude_vector[_NAME]
        vector.weight.copy_(vector.get_weight_norm(weight, vector.get_lora_weight(first, second), layer.scaling[_NAME]))


def _merged_weight(layer: Any) -> Tensor:
    """(out, in) a quantised layer's weights with its adapter folded in. `peft` would quantise the result again."""
    weight = quantised_weight(layer.get_base_layer())
    variant = layer.lora_variant.get(_NAME)
    if variant is not None:
        return variant.merge_safe(layer, _NAME, weight).detach()
    return (weight + layer.get_delta_weight(_NAME)).to(weight.dtype).detach()


def _linear_layers(model: Any) -> dict[str, nn.Module]:
    """The trunk's linear layers by their names in the model; GPT-2's family writes them as transposed convolutions."""
    trunk = model.base_model
    prefix = next(name for name, module in model.named_modules() if module is trunk)
    return {
        f"{prefix}.{name}": module for name, module in trunk.named_modules() if isinstance(module, nn.Linear | Conv1D)
    }


def _require_found(model: Any, layers: Collection[str], key: str, endings: Collection[str]) -> None:
    """Raises ConfigError when an ending fits no layer, or there are no layers at all."""
    missing = [ending for ending in endings if not any(_ends(name, ending) for name in layers)]
    if missing or not layers:
        found = ", ".join(sorted({name.rpartition(".")[2] for name in layers})) or "none"
        kind = "linear layer" if key == "targets" else "adapted layer"
        raise ConfigError(
            f"`model.adapter.{key}`: {', '.join(map(repr, missing)) or 'unset'} names no {kind} of "
            f"{type(model).__name__}; its {kind}s are called: {found}"
        )


def _ends(name: str, ending: str) -> bool:
    return name == ending or name.endswith(f".{ending}")
