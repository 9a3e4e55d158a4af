"""A frozen trunk in 4 bits a weight, for an adapter to train on (QLoRA).

    W = code[q] * the block's largest |W|        q: 4 bits; 64 weights, one after another, are a block

`code` is NF4: 16 quantiles of the normal distribution between -1 and 1, with 0 among them. The blocks' scales are kept
in 8 bits, 256 of them under a scale of their own ("double quantisation"): 4 + 8/64 + 32/(64 * 256) = 4.127 bits a
weight. Weights are made whole again, in the format that the model is read in, in the layer that runs; embeddings,
norms, biases, output embedding and heads stay as they are. The arithmetic is `bitsandbytes`'.

Source: Dettmers et al. 2023, arXiv:2305.14314.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from accord.errors import ConfigError
from accord.models.extras import require_bitsandbytes
from accord.models.precision import reading_dtype

__all__ = ["dequantise", "is_quantised", "plain_layer", "quantise", "quantised_weight"]

# `bitsandbytes` takes a second to import: its layers are known by name, and it is imported where there is one.
_LAYER = "Linear4bit"


def quantise(model: Any) -> None:
    """Puts the trunk's linear layers into 4 bits, in place, one after another; they are frozen from then on.

    The same weights give the same bits every time. What is not quantised is copied out of the file that it may still be
    mapped from, so that the file leaves memory.
    Raises: ConfigError without bitsandbytes, or for a trunk without linear layers.
    """
    require_bitsandbytes("model.quantise")
    trunk = model.base_model
    layers = [(name, layer) for name, layer in trunk.named_modules() if type(layer) is nn.Linear]
    if not layers:
        raise ConfigError(
            f"`model.quantise`: {type(model).__name__} keeps its weights in other layers than linear ones, and only "
            "those can be quantised; unset it, or use another architecture (llama, qwen, mistral, gemma, ...)"
        )
    for name, layer in layers:
        trunk.set_submodule(name, _quantised(layer))
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.clone()


def is_quantised(model: nn.Module) -> bool:
    """Whether any layer is quantised, or the layer itself."""
    return any(type(module).__name__ == _LAYER for module in model.modules())


def dequantise(model: nn.Module) -> None:
    """Puts plain layers in the place of quantised ones, with the weights these stand for."""
    for name, layer in list(model.named_modules()):
        if type(layer).__name__ == _LAYER:
            model.set_submodule(name, plain_layer(layer, quantised_weight(layer)))


def quantised_weight(layer: Any) -> Tensor:
    """(out, in) the weights that a quantised layer computes with."""
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(layer.weight.data, layer.weight.quant_state)


def plain_layer(layer: Any, weight: Tensor) -> nn.Linear:
    """A linear layer of this weight with the layer's bias."""
    plain = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    plain.weight = nn.Parameter(weight, requires_grad=False)
    plain.bias = layer.bias
    return plain


def _quantised(layer: nn.Linear) -> nn.Module:
    from bitsandbytes.nn import Linear4bit, Params4bit

    dtype = reading_dtype() or layer.weight.dtype
    result: Any = Linear4bit(layer.in_features, layer.out_features, bias=False, compute_dtype=dtype, device="meta")
    parameter: Any = Params4bit  # its arguments are untyped
    weight = parameter(layer.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=True)
    result.weight = weight.to(layer.weight.device)
    result.bias = layer.bias
    # On some CPUs bitsandbytes would pack the weights anew at the first pass without gradient, and compute in bfloat16
    # from then on: the reference and the policy would be read in two ways.
    result.support_avx512bf16_for_cpu = False
    return result
