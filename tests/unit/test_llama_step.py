"""The short decoding step against the model's own forward pass, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache

from accord.models.adapters import add_adapter
from accord.rollout import native
from accord.rollout.llama_step import LlamaStep, llama_step
from accord.rollout.native import NativeSampler, PromptTokens
from accord.rollout.sampling import Sampling
from models_support import PAD_ID, VOCABULARY, tiny_model, uneven_model

FITTING = ("llama", "qwen2", "mistral")


@pytest.mark.parametrize("kind", FITTING)
@torch.no_grad()
def test_steps_give_the_logits_of_whole_rows(kind: str) -> None:
    """Two key heads for four query heads; the first row is padded on the left by 3. The library's norms compute in
    float32 whatever the model does, ours do not."""
    made, steps = uneven_model(kind), 4
    step = llama_step(made)
    assert step is not None
    ids = torch.randint(2, VOCABULARY, (3, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(3, 9, dtype=torch.bool)
    mask[0, :3] = False
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    whole = made(input_ids=ids, attention_mask=mask, position_ids=positions).logits
    cache = DynamicCache(config=made.config)
    begun = ids.shape[1] - steps
    made(
        input_ids=ids[:, :begun], attention_mask=mask[:, :begun], position_ids=positions[:, :begun],
        past_key_values=cache, use_cache=True,
    )  # fmt: skip
    for place in range(begun, ids.shape[1]):
        logits = step(ids[:, place], mask[:, : place + 1], positions[:, place, None], cache)
        torch.testing.assert_close(logits, whole[:, place], rtol=0, atol=2e-6)


@pytest.mark.parametrize("kind", ["gpt2", "qwen3", "gemma2", "phi3", "granite", "olmo2"])
def test_models_of_other_equations_have_no_short_step(kind: str) -> None:
    assert llama_step(tiny_model(kind)) is None


def test_an_adapter_and_a_sliding_window_have_no_short_step() -> None:
    adapted = tiny_model("llama")
    add_adapter(adapted, rank=2, alpha=4.0, targets=(), seed=0)
    windowed = tiny_model("mistral")
    windowed.config.sliding_window = 8
    assert llama_step(adapted) is None and llama_step(windowed) is None


def sampled(made: Any) -> tuple[NativeSampler, list[Any]]:
    sampler = NativeSampler(made, pad_id=PAD_ID)
    prompts = [PromptTokens((5, 6, 7), 0), PromptTokens((8,), 1)]
    return sampler, sampler.generate(prompts, 2, Sampling(6), ("short", "step"))


def test_samples_and_their_logprobs_are_those_of_the_models_own_step(monkeypatch: pytest.MonkeyPatch) -> None:
    _, short = sampled(uneven_model("llama"))
    monkeypatch.setattr(native, "llama_step", lambda model: None)
    _, own = sampled(uneven_model("llama"))
    for ours, theirs in zip(short, own, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert a.ids == b.ids
            assert a.logprobs == pytest.approx(b.logprobs, abs=1e-6)


def test_a_step_that_says_something_else_is_noticed_and_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    _, right = sampled(uneven_model("llama"))
    inner = LlamaStep.__call__
    monkeypatch.setattr(LlamaStep, "__call__", lambda self, *args: inner(self, *args) * 1.01)
    with pytest.warns(UserWarning, match="the model's own is used"):
        sampler, samples = sampled(uneven_model("llama"))
    assert sampler._step is None
    assert [s.ids for group in samples for s in group] == [s.ids for group in right for s in group]
