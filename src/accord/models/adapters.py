"""Low-rank adapters (LoRA): a model that is frozen but for small matrices beside its linear layers.

    y = W x + (alpha / rank) B A x        A (rank, in), B (out, rank) are trained; W is not

B starts at zero, so a fresh adapter changes nothing. Switched off, the model is its own reference, bit for bit, however
long the adapter has trained: no second copy is needed. The layers are `peft`'s; they are put inside the model, which
stays of its own class, so that everything that reads a model reads this one too.

Source: Hu et al. 2021, arXiv:2106.09685. Departures: all linear layers are adapted, not the attention's alone.
Left out: dropout (importance ratios compare two passes over the same tokens), adapted embeddings, biases.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from accord.atomic import new_folder
from accord.errors import ConfigError, TrainingError
from accord.models.heads import average_heads, score_head

__all__ = [
    "adapters_off",
    "add_adapter",
    "has_adapter",
    "load_trainable_state",
    "merged",
    "plain_state",
    "save_adapter",
    "sharing_copy",
    "trainable_state",
]

# `peft` takes seconds to import: it is imported where there is an adapter, not by every run.

_NAME = "default"  # of the adapter within the model; peft's own default


def add_adapter(model: Any, *, rank: int, alpha: float, targets: Sequence[str], seed: int) -> None:
    """Freezes `model` and puts a fresh adapter in: from here on only the adapter trains, and a scalar head if there is
    one.

    Args:
        rank: inner size of the two matrices, at least 1.
        alpha: the adapter's output is multiplied by alpha / rank.
        targets: last parts of layers' names, such as `q_proj` or `self_attn.q_proj`. Empty = every linear layer of the
            trunk, which neither the output embedding nor a scalar head belongs to.
        seed: the values of A depend on the seed and the shapes alone.
    The adapter's weights are at least float32, whatever the model's: small updates vanish in 16 bits.
    Raises: ConfigError for a target that is no linear layer of the trunk, or a model that peft cannot adapt.
    """
    from peft import LoraConfig
    from peft.functional import cast_adapter_dtype, inject_adapter_in_model

    layers = _linear_layers(model)
    _require_found(model, layers, targets)
    names = [name for name in layers if not targets or any(_ends(name, target) for target in targets)]
    has_head = model.get_output_embeddings() is None
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # pyright: ignore[reportArgumentType]  (declared int; only ever divided)
        target_modules=names,
        fan_in_fan_out=all(isinstance(layers[name], Conv1D) for name in names),
        task_type="SEQ_CLS" if has_head else "CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            inject_adapter_in_model(config, model, _NAME)
        except ValueError as error:
            raise ConfigError(f"no adapter can be put into {type(model).__name__}: {error}") from error
    cast_adapter_dtype(model, _NAME)
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


def merged(model: Any) -> Any:
    """A plain copy of the model with the adapter folded in, W + (alpha / rank) B A: what is saved for others to load.

    Its results are those of the adapted model up to the rounding of its weights. The model itself is left as it is: a
    weight that was added to and subtracted from again would not be the reference's any more.
    """
    plain = copy.deepcopy(model)
    for name, layer in list(_adapted(plain)):
        layer.merge()
        plain.set_submodule(name, layer.get_base_layer())
    del plain.peft_config
    return plain


def plain_state(module: nn.Module) -> dict[str, Tensor]:
    """The `state_dict` of the module without its adapter: the frozen weights, under the names they had before."""
    state = {name: tensor for name, tensor in module.state_dict().items() if ".lora_" not in name}
    return {name.replace(".base_layer.", "."): tensor for name, tensor in state.items()}


def sharing_copy(model: Any) -> Any:
    """A value model out of a reward model: a copy with a head of its own (the mean, of several) that shares all other
    weights: for an adapter, which leaves those alone. So two models that start from one cost the memory of one."""
    own = {id(parameter) for parameter in score_head(model).parameters()}
    result = copy.deepcopy(model, {id(p): p for p in model.parameters() if id(p) not in own})
    average_heads(result)
    return result


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
        save_file(named, partial / "adapter_model.safetensors", metadata={"format": "pt"})


def trainable_state(model: nn.Module) -> dict[str, Tensor]:
    """What a checkpoint must hold of a model: its `state_dict` but for the parameters that are frozen.

    When everything trains that is everything: tied weights under each of their names, and buffers.
    """
    frozen = {name for name, p in model.named_parameters(remove_duplicate=False) if not p.requires_grad}
    return {name: tensor for name, tensor in model.state_dict().items() if name not in frozen}


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


def _linear_layers(model: Any) -> dict[str, nn.Module]:
    """The trunk's linear layers by their names in the model; GPT-2's family writes them as transposed convolutions."""
    trunk = model.base_model
    prefix = next(name for name, module in model.named_modules() if module is trunk)
    return {
        f"{prefix}.{name}": module for name, module in trunk.named_modules() if isinstance(module, nn.Linear | Conv1D)
    }


def _require_found(model: Any, layers: Mapping[str, nn.Module], targets: Sequence[str]) -> None:
    missing = [target for target in targets if not any(_ends(name, target) for name in layers)]
    if missing or not layers:
        found = ", ".join(sorted({name.rpartition(".")[2] for name in layers})) or "none"
        raise ConfigError(
            f"`model.adapter.targets`: {', '.join(map(repr, missing)) or 'unset'} names no linear layer of "
            f"{type(model).__name__}; its linear layers are called: {found}"
        )


def _ends(name: str, ending: str) -> bool:
    return name == ending or name.endswith(f".{ending}")
