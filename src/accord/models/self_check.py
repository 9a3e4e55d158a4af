"""The start-up check that reading a model our way gives that model's own numbers, and which layout it can use."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from accord.errors import ConfigError
from accord.models.attention import blockwise
from accord.models.layout import Layout, collate, layout_cost, packed
from accord.models.precision import reading, reading_dtype
from accord.models.shared_attention import split
from accord.models.token_scores import attention_window, score_tokens
from accord.records import TokenCompletion, TokenGroup

__all__ = [
    "SHARING_PAYS",
    "TOLERANCE",
    "LayoutCheck",
    "best_layout",
    "check_layouts",
    "reads_alike",
    "saved_by_sharing",
]

SHARING_PAYS = 0.15  # the share of tokens that must be saved before prompts are run once for all their completions

# Largest difference of a log-probability (nats) that rounding explains; 16-bit trunks round hidden states themselves.
TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}

_PLAIN_ATTENTION = {"full_attention", "sliding_attention", "chunked_attention"}


@dataclass(frozen=True, slots=True)
class LayoutCheck:
    """The layout to use; the largest difference (nats) between the layouts, None if shared was not tried; why not
    shared, "" if shared; and whether rows may be packed as well."""

    layout: Layout
    max_difference: float | None
    reason: str
    packs: bool = False


def best_layout(check: LayoutCheck, saved: float, *, compiled: bool) -> Layout:
    """The layout for groups of which sharing prompts saves this share of the tokens; compiled code takes no plan for
    packed rows."""
    packs = check.packs and not compiled
    if check.layout == "shared" and saved >= SHARING_PAYS:
        return "shared_packed" if packs else "shared"
    return "plain_packed" if packs else "plain"


def reads_alike(model: Any, other: Any) -> bool:
    """Whether what `check_layouts` found out about a model holds for another: trunks of one class, with one kind of
    attention and one window."""
    attention = (model.config._attn_implementation, attention_window(model.config))
    return type(model.base_model) is type(other.base_model) and attention == (
        other.config._attn_implementation, attention_window(other.config)
    )  # fmt: skip


def saved_by_sharing(groups: Iterable[TokenGroup]) -> float:
    """Share of the tokens that are not run where each prompt runs once for all its completions."""
    plain = shared = 0
    for group in groups:
        plain += layout_cost(group, "plain")
        shared += layout_cost(group, "shared")
    return 1 - shared / plain


def check_layouts(
    model: Any, groups: Sequence[TokenGroup], pad_id: int, *, max_tokens: int | None = None
) -> LayoutCheck:
    """Compares log-probabilities on a few groups: the model's own logits, our plain layout, and our shared layout with
    attention computed whole and split, and by rows of a packed one.

    Plain differing from the model's own is an error: nothing trained that way would mean anything. Shared differing
    from plain, or being impossible, is a reason to use plain; packed, to pad.

    Args:
        groups: a few typical groups with completions; each is tried with one more completion (its first one reversed),
            so that something is shared even where every group has one.
        max_tokens: the longest prompt + completion to come; None = the longest in `groups`.
    Raises: ConfigError when the model's own logits are not what we compute.
    """
    groups = [_with_another_completion(group) for group in groups]
    tolerance = TOLERANCE[reading_dtype() or model.dtype]
    with torch.no_grad():
        plain = collate(groups, layout="plain", pad_id=pad_id, device=model.device)
        ours = score_tokens(model, plain).logprobs
        difference = float((ours - _own_logprobs(model, groups, ours)).abs().max())
        if not difference <= tolerance:
            raise ConfigError(
                f"{type(model).__name__} ({model.config.model_type}) works in a way Accord does not know: the "
                f"log-probabilities Accord computes differ by {difference:.2g} nats from the model's own, expected at "
                f"most {tolerance:g}; use another architecture (llama, qwen, mistral, gemma, phi, olmo, gpt2, ...)"
            )
        reason = _reason_for_plain(model, max(plain.longest, max_tokens or 0))
        if reason:
            return LayoutCheck("plain", None, reason)
        try:
            batch = collate(groups, layout="shared", pad_id=pad_id, device=model.device)
            shared = [score_tokens(model, batch).logprobs]
            split(batch)  # what longer or more completions would do
            shared.append(score_tokens(model, batch).logprobs)
        except (TypeError, ValueError, RuntimeError) as error:
            return LayoutCheck("plain", None, f"{type(model).__name__} cannot run the shared layout: {error}")
    difference = float((torch.stack(shared) - ours).abs().max())
    if not difference <= tolerance:
        return LayoutCheck("plain", difference, f"the shared layout changes log-probabilities by {difference:.2g} nats")
    return LayoutCheck("shared", difference, "", _may_pack(model, groups, pad_id, ours))


def _may_pack(model: Any, groups: Sequence[TokenGroup], pad_id: int, expected: Tensor) -> bool:
    """Whether rows one behind another say the same as plain rows; tried where they would be used: attention a row at a
    time was measured on CPUs alone."""
    if model.config._attn_implementation != "sdpa" or blockwise() or model.device.type != "cpu":
        return False
    batch = packed(groups, layout="shared_packed", pad_id=pad_id, device=model.device)
    try:
        with torch.no_grad():
            difference = float((score_tokens(model, batch).logprobs - expected).abs().max())
    except (TypeError, ValueError, RuntimeError):
        return False
    return difference <= TOLERANCE[reading_dtype() or model.dtype]


def _with_another_completion(group: TokenGroup) -> TokenGroup:
    first = group.completions[0]
    return replace(group, completions=(*group.completions, TokenCompletion(first.ids[::-1], first.mask[::-1])))


def _own_logprobs(model: Any, groups: Sequence[TokenGroup], like: Tensor) -> Tensor:
    """(C, T) from the model's full logits, one unpadded row at a time."""
    own = torch.zeros_like(like)
    rows = [(group.prompt_ids, completion.ids) for group in groups for completion in group.completions]
    for c, (prompt, completion) in enumerate(rows):
        ids = torch.tensor([prompt + completion], device=model.device)
        with reading(model.device):
            logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].to(like.dtype)
        own[c, : len(completion)] = logits.log_softmax(dim=-1).gather(1, ids[0, len(prompt) :, None])[:, 0]
    return own


def _reason_for_plain(model: Any, longest: int) -> str:
    """Why this model cannot share prompts whatever a short comparison says; "" if it may."""
    config, name = model.config.get_text_config(), type(model).__name__
    attention = model.config._attn_implementation
    if attention not in {"sdpa", "eager"}:
        return f"attention implementation {attention!r} takes no mask of ours (sdpa and eager do)"
    window = attention_window(config)
    if window is not None and longest > window:
        return f"sequences of up to {longest} tokens exceed the attention window of {window}"
    if "local" in getattr(config, "attention_layers", ()):
        return f"{name} counts its attention window in row places; completions stand apart from their prompt"
    if getattr(model, "_is_stateful", False) or not set(getattr(config, "layer_types", None) or ()) <= _PLAIN_ATTENTION:
        return f"{name} has layers other than attention, which may read a whole row whatever the mask"
    if any("expert" in key and value for key, value in config.to_dict().items()):
        return f"{name} is a mixture of experts, whose routing may depend on the whole row"
    return ""
