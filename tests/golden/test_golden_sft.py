"""The supervised loss against closed forms and against transformers' own."""

from __future__ import annotations

import math

import pytest
import torch
from transformers.loss.loss_utils import ForCausalLMLoss

from accord.losses import sft_loss


@pytest.mark.parametrize(("vocabulary", "expected"), [(23, 3.135494), (32000, 10.373491), (50257, 10.824905)])
def test_uniform_guessing_costs_the_log_of_the_vocabulary(vocabulary: int, expected: float) -> None:
    logprobs = torch.log_softmax(torch.zeros(2, 3, vocabulary), dim=-1)[:, :, 5]
    assert sft_loss(logprobs, torch.ones(2, 3, dtype=torch.bool)).loss.item() == pytest.approx(expected, rel=1e-6)


def test_every_token_weighs_the_same() -> None:
    """Losses 1 1 1 1 in one answer and 4 in another: 8 / 5 = 1.6 per token (the mean of means would be 2.5), with
    derivative -1/5 on each counted token and 0 on the padding."""
    logprobs = -torch.tensor([[1.0, 1, 1, 1], [4, 9, 9, 9]])
    logprobs.requires_grad_()
    mask = torch.tensor([[True] * 4, [True, False, False, False]])
    result = sft_loss(logprobs, mask)
    result.loss.backward()
    assert logprobs.grad is not None
    assert result.loss.item() == pytest.approx(1.6)
    assert logprobs.grad.flatten().tolist() == pytest.approx([-0.2] * 5 + [0.0] * 3)
    assert (result.nll_sum.item(), result.token_count.item()) == (8.0, 5)


def test_micro_batches_of_one_answer_add_up_to_the_whole_step() -> None:
    """With the step's 5 tokens as normaliser the two answers give 4 / 5 and 4 / 5, which add up to 1.6."""
    full = torch.tensor([[True] * 4])
    one = torch.tensor([[True, False, False, False]])
    first = sft_loss(torch.full((1, 4), -1.0), full, num_tokens=5)
    second = sft_loss(torch.full((1, 4), -4.0), one, num_tokens=torch.tensor(5))
    assert first.loss.item() == pytest.approx(0.8)
    assert second.loss.item() == pytest.approx(0.8)


def test_agrees_with_the_loss_of_transformers() -> None:
    random = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 6, 11, generator=random, dtype=torch.float64).float().requires_grad_()
    labels = torch.randint(0, 11, (3, 6), generator=random)
    mask = torch.rand(3, 6, generator=random) < 0.6
    theirs = ForCausalLMLoss(
        logits, labels.masked_fill(~mask, -100), vocab_size=11, num_items_in_batch=torch.tensor(40)
    )
    logprobs = torch.log_softmax(logits[:, :-1], -1).gather(2, labels[:, 1:, None])[:, :, 0]
    ours = sft_loss(logprobs, mask[:, 1:], num_tokens=40).loss
    assert math.isclose(ours.item(), theirs.item(), rel_tol=1e-6)
    gradients = [torch.autograd.grad(loss, logits, retain_graph=True)[0] for loss in (ours, theirs)]
    torch.testing.assert_close(*gradients)
