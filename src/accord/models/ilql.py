"""A language model with the heads of implicit language Q-learning, and the policy that they shape.

All heads read the trunk's last hidden state, the one the output embedding reads. Two Q heads say of every token of the
vocabulary what return to expect after it, the value head what to expect before any. The target heads are lagged copies
of the Q heads; the trunk is not copied. Shape letters: C completions, T tokens, N counted tokens, H width of the hidden
state, V vocabulary. Index 0 of a stack of two is the first head.
"""

from __future__ import annotations

import copy
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from accord.atomic import write_bytes, write_json
from accord.errors import ConfigError
from accord.losses.ilql import polyak
from accord.models.layout import CompletionBatch
from accord.models.precision import lowered
from accord.models.projection import LogitTransform, logits_of, token_logprobs
from accord.models.token_scores import logit_transform, predicting_states, spread

__all__ = ["ILQLModel", "ILQLScores", "ShapedPolicy", "has_heads", "load_heads", "save_heads", "shaped_logits"]

HEADS_FILE, SETTINGS_FILE = "ilql_heads.safetensors", "ilql.json"
FORMAT = 1
SHAPED_AT_ONCE = 256  # tokens whose logits and Q over the vocabulary are in memory together


@dataclass(frozen=True, slots=True)
class ILQLScores:
    """What the losses read, for the counted tokens of a batch; exactly 0, without gradient, at the others.

    logprobs    (C, T) nats      the policy's log-probability of each token
    q           (2, C, T)        Q of each token
    q_logprobs  (2, C, T) nats   log softmax(Q) of each token
    target_q    (2, C, T)        the target heads' Q of each token, without gradient
    values      (C, T)           V before each token
    """

    logprobs: Tensor
    q: Tensor
    q_logprobs: Tensor
    target_q: Tensor
    values: Tensor


class _Head(nn.Module):
    """H -> 2H -> ReLU -> outputs. The first layer is filled from `numbers`, the last one with 0."""

    def __init__(self, width: int, outputs: int, numbers: torch.Generator) -> None:
        super().__init__()
        # Not filled twice: the default filling would draw from the global generator.
        self.inner = nn.Linear(width, 2 * width, device="meta").to_empty(device="cpu")
        self.outer = nn.Linear(2 * width, outputs, device="meta").to_empty(device="cpu")
        drawn = torch.randn(self.inner.weight.shape, generator=numbers, dtype=torch.float64)
        with torch.no_grad():
            self.inner.weight.copy_(drawn / math.sqrt(width + 1))
            for tensor in (self.inner.bias, self.outer.weight, self.outer.bias):
                tensor.zero_()

    def forward(self, states: Tensor) -> Tensor:
        """(..., outputs) from hidden states (..., H)."""
        return self.outer(self.features(states))

    def features(self, states: Tensor) -> Tensor:
        """(..., 2H) what the last layer reads."""
        return self.inner(states.to(self.inner.weight.dtype)).relu()

    def at(self, features: Tensor, ids: Tensor) -> Tensor:
        """(N,) the outputs `ids` (N,), one for each row of features (N, 2H), without computing the others."""
        rows = self.outer.weight.index_select(0, ids)
        return (features * rows).sum(dim=1) + self.outer.bias.index_select(0, ids)

    def logprobs_at(self, features: Tensor, ids: Tensor) -> Tensor:
        """(N,) log softmax(outputs) at `ids`; the outputs exist a chunk of rows at a time."""
        outer = self.outer
        return token_logprobs(features, outer.weight, outer.bias, ids, LogitTransform(), with_entropy=False)[0]


class ILQLModel(nn.Module):
    """A causal language model (`policy`) under two Q heads, their targets and a value head, trained together.

    The heads' first layers are N(0, 1/(H + 1)) numbers that depend on `seed` and the shapes alone, different in each;
    their last layers are 0. So a fresh model says 0 of everything, and shapes nothing.
    The heads are float32 at least, whatever the policy is: small updates vanish in 16 bits.
    """

    def __init__(self, policy: Any, *, seed: int) -> None:
        super().__init__()
        self.policy = policy
        vocabulary, width = policy.get_output_embeddings().weight.shape
        numbers = torch.Generator().manual_seed(seed)
        heads = nn.ModuleList(_Head(width, outputs, numbers) for outputs in (vocabulary, vocabulary, 1))
        heads.to(policy.device, torch.promote_types(policy.dtype, torch.float32))
        self.q_heads: Any = heads[:2]
        self.target_heads: Any = _frozen_copy(self.q_heads)
        self.value_head: Any = heads[2]

    @property
    def device(self) -> torch.device:
        return self.policy.device

    def forward(self, batch: CompletionBatch) -> ILQLScores:
        """One pass of the trunk; the vocabulary is projected at the counted tokens alone, a chunk at a time."""
        mask, ids = batch.completion_mask, batch.completion_ids[batch.completion_mask]
        states = predicting_states(self.policy, batch, mask)
        output = self.policy.get_output_embeddings()
        transform = logit_transform(self.policy, 1.0)
        hidden, weight = lowered(states, output.weight)
        logprobs, _ = token_logprobs(hidden, weight, output.bias, ids, transform, with_entropy=False)
        features = [head.features(states) for head in self.q_heads]
        with torch.no_grad():
            target_q = [head.at(head.features(states), ids) for head in self.target_heads]
        return ILQLScores(
            logprobs=spread(logprobs, mask),
            q=_both([head.at(x, ids) for head, x in zip(self.q_heads, features, strict=True)], mask),
            q_logprobs=_both([head.logprobs_at(x, ids) for head, x in zip(self.q_heads, features, strict=True)], mask),
            target_q=_both(target_q, mask),
            values=spread(self.value_head(states)[:, 0], mask),
        )

    def action_values(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """The target heads' Q of every token, (2, ..., V), and V, (...), from hidden states (..., H)."""
        return torch.stack([head(states) for head in self.target_heads]), self.value_head(states)[..., 0]

    def sync_targets(self, rate: float) -> None:
        """Moves the target heads towards the Q heads by the share `rate`; see `polyak`."""
        for head, target in zip(self.q_heads, self.target_heads, strict=True):
            for name, values in head.named_parameters():
                target.get_buffer(name).copy_(polyak(target.get_buffer(name), values, rate=rate))


class ShapedPolicy:
    """The policy whose logits the heads have shaped; samplers and exact evaluation read it as they read a model.

    With `beta` 0 it is the policy itself, bit for bit. See `shaped_logits` for what beta does.
    """

    def __init__(self, model: ILQLModel, beta: float) -> None:
        if not 0 <= beta < math.inf:
            raise ValueError(f"beta is {beta}; expected a finite number >= 0 (0 = the policy itself)")
        self._model, self._beta = model, beta

    @property
    def config(self) -> Any:
        return self._model.policy.config

    @property
    def device(self) -> torch.device:
        return self._model.policy.device

    @property
    def training(self) -> bool:
        return self._model.policy.training

    def eval(self) -> ShapedPolicy:
        return self.train(False)

    def train(self, mode: bool = True) -> ShapedPolicy:
        self._model.policy.train(mode)
        return self

    def __call__(self, **inputs: Any) -> Any:
        """The policy's own output with shaped logits, (B, tokens asked for, V)."""
        policy = self._model.policy
        if self._beta == 0:
            return policy(**inputs)
        states: list[Tensor] = []
        handle = policy.base_model.register_forward_hook(lambda *call: states.append(call[2].last_hidden_state))
        try:
            output = policy(**inputs)
        finally:
            handle.remove()
        asked = states[-1][:, -output.logits.shape[1] :]
        output.logits = shaped_logits(output.logits, *self._model.action_values(asked), beta=self._beta)
        return output

    @torch.no_grad()
    def logprobs(self, batch: CompletionBatch, scored: Tensor, *, temperature: float = 1.0) -> Tensor:
        """(C, T) log-probabilities, nats, of the completion tokens where `scored` (C, T) is True; 0 elsewhere."""
        policy = self._model.policy
        output, transform = policy.get_output_embeddings(), logit_transform(policy, 1.0)
        states, ids = predicting_states(policy, batch, scored), batch.completion_ids[scored]
        found = []
        for some, tokens in zip(states.split(SHAPED_AT_ONCE), ids.split(SHAPED_AT_ONCE), strict=True):
            logits, _ = logits_of(some, output.weight, output.bias, transform)
            shaped = shaped_logits(logits, *self._model.action_values(some), beta=self._beta)
            found.append((shaped / temperature).log_softmax(dim=-1).gather(1, tokens[:, None])[:, 0])
        return spread(torch.cat(found), scored)


def shaped_logits(logits: Tensor, target_q: Tensor, values: Tensor, *, beta: float) -> Tensor:
    """What tokens are drawn from: the policy's log-probabilities plus beta times each token's advantage.

        log softmax(logits)(a) + beta * (min over heads of target_q(a) - values)

    Not normalised: temperature and top-k act on it as on any logits. Towards infinity, beta picks the best advantage of
    the WHOLE vocabulary, however unlikely the token: only the CQL term keeps Q low where there was no data.

    Shapes: logits (..., V); target_q (2, ..., V); values (...) -> (..., V) in float32 at least.
    Source: Snell et al. 2022, arXiv:2206.11871. Departures: the smaller of the two target heads.
    Tested by: tests/golden/test_golden_ilql.py
    """
    logprobs = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(dim=-1)
    return logprobs + beta * (target_q.amin(dim=0) - values[..., None])


def save_heads(model: ILQLModel, folder: Path, *, beta: float) -> None:
    """Writes all heads, and the beta to sample with, beside the policy that was saved in `folder`."""
    tensors = {name: x for name, x in model.state_dict().items() if not name.startswith("policy.")}
    write_bytes(folder / HEADS_FILE, save({name: x.cpu().contiguous() for name, x in tensors.items()}))
    write_json(folder / SETTINGS_FILE, {"format": FORMAT, "beta": beta})


def has_heads(folder: Path | str) -> bool:
    """Whether a model folder holds heads beside the policy."""
    return (Path(folder) / HEADS_FILE).is_file()


def load_heads(policy: Any, folder: Path | str) -> tuple[ILQLModel, float]:
    """The policy, which was loaded from `folder`, under the heads saved beside it, and the beta to sample with.

    Raises: ConfigError for a folder without heads, or with those of another model.
    """
    if not has_heads(folder):
        raise ConfigError(
            f"{folder} holds no {HEADS_FILE}: it is a language model without Q heads; train them with `accord ilql`, "
            "or name the `model` folder of an ilql stage"
        )
    model = ILQLModel(policy, seed=0)
    settings = json.loads((Path(folder) / SETTINGS_FILE).read_text(encoding="utf-8"))
    tensors = load((Path(folder) / HEADS_FILE).read_bytes())
    expected = {name: x.shape for name, x in model.state_dict().items() if not name.startswith("policy.")}
    if {name: x.shape for name, x in tensors.items()} != expected or settings["format"] != FORMAT:
        raise ConfigError(
            f"{folder}: the heads in {HEADS_FILE} do not fit the policy beside them (width and vocabulary "
            f"{tuple(policy.get_output_embeddings().weight.shape)[::-1]}): keep the files of one training together"
        )
    model.load_state_dict(tensors, strict=False)
    return model, settings["beta"]


def _frozen_copy(heads: nn.ModuleList) -> nn.ModuleList:
    """The heads again, with buffers for parameters: no optimiser finds those, and every checkpoint holds them."""
    frozen = copy.deepcopy(heads)
    for module in frozen.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            delattr(module, name)
            module.register_buffer(name, parameter.detach())
    return frozen


def _both(values: list[Tensor], mask: Tensor) -> Tensor:
    """(2, C, T) from what the two heads say of the counted tokens, (N,) each."""
    return torch.stack([spread(x, mask) for x in values])
