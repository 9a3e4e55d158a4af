"""Demonstrations mixed into PPO's updates, so that the policy keeps doing what it was taught before.

    loss of an update = PPO's loss + ptx_coef * mean over a batch's counted tokens of -log p(token)

The text is imitated at temperature 1, as in SFT, whatever the rollouts are sampled at.

Source: Ouyang et al. 2022, arXiv:2203.02155, eq. 2 ("PPO-ptx"). Departures: a mean over tokens; one batch for every
update, whatever its size, where the paper mixes eight times as many pre-training examples as episodes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from accord.config import PPOConfig
from accord.data.order import batch_indices
from accord.losses.sft import sft_loss
from accord.methods.offline import group_passes
from accord.methods.online import add_sums
from accord.models.layout import collate
from accord.models.memory import one_pass
from accord.models.token_scores import score_tokens
from accord.phases import phase
from accord.records import TokenGroup

__all__ = ["Imitation"]


class Imitation:
    """Batches of demonstrations in an order of their own, a fresh one for every pass; each has its number, so nothing
    has to be remembered."""

    def __init__(self, items: Sequence[TokenGroup], section: PPOConfig, *, pad_id: int, seed: int) -> None:
        self._items, self._section, self._pad_id, self._seed = items, section, pad_id, seed

    @phase("forward")
    def accumulate(self, model: Any, number: int, budget: int, backward: Callable[[Tensor], None]) -> dict[str, float]:
        """Add the gradient of ptx_coef times the loss of batch `number` (from 1), in passes of at most `budget`
        tokens, by `backward`; sums over its tokens."""
        section = self._section
        chosen = batch_indices(number, len(self._items), section.ptx_batch_size, self._seed, "ppo", "ptx")
        batch_items = [self._items[i] for i in chosen]
        count = sum(sum(c.mask) for item in batch_items for c in item.completions)
        sums: dict[str, float] = {}
        for items in group_passes(batch_items, lambda item: item, "plain", budget):
            with one_pass(items):
                with phase("data"):
                    batch = collate(items, layout="plain", pad_id=self._pad_id, device=model.device)
                logprobs = score_tokens(model, batch, mask="loss").logprobs
                result = sft_loss(logprobs, batch.completion_mask, num_tokens=count)
                backward(section.ptx_coef * result.loss)
            add_sums(sums, {"ptx_nll": result.nll_sum, "ptx_tokens": result.token_count})
        return sums
