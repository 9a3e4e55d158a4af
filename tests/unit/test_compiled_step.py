"""The compiled decoding step against the plain one: same tokens and log-probabilities, few shapes, nothing baked in.

Compiled to plain calls, for compiling to machine code takes half a minute; that is left to one small test."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from accord.config import recipe_from
from accord.errors import ConfigError
from accord.methods.context import _model_settings
from accord.methods.roles import sampler_of as sampler_of_a_stage
from accord.records import SampledCompletion
from accord.rollout import compiled_step
from accord.rollout.compiled_step import CompiledStep
from accord.rollout.llama_step import LlamaStep
from accord.rollout.native import NativeSampler, PromptTokens
from accord.rollout.sampling import Sampling
from models_support import PAD_ID, tiny_model, uneven_model

# What torch's own compiler says about itself.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
PROMPTS = [PromptTokens((5, 6, 7), 0), PromptTokens((8,), 1), PromptTokens((4, 9, 2, 11, 30), 2)]
# Of 12 rows about one in ten ends at each token: the batch shrinks several times, at last to a single row.
ENDING = Sampling(14, stop_ids=(3, 4, 5, 6, 7))


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def sampler_of(model: Any, *, buckets: bool | None, backend: Any = "eager", limit: int = 64) -> NativeSampler:
    """A sampler with the compiled step; None = with the plain one, the oracle."""
    sampler = NativeSampler(model, pad_id=PAD_ID, max_batch_sequences=limit)
    if buckets is not None:
        assert isinstance(sampler._step, LlamaStep)
        sampler._step = CompiledStep(sampler._step, buckets=buckets, backend=backend)
    return sampler


def drawn(sampler: NativeSampler, n: int = 4, sampling: Sampling = ENDING) -> list[SampledCompletion]:
    return [sample for group in sampler.generate(PROMPTS, n, sampling, ("step",)) for sample in group]


def assert_same(found: list[SampledCompletion], expected: list[SampledCompletion], abs: float = 1e-6) -> None:
    assert [(s.ids, s.finish_reason) for s in found] == [(s.ids, s.finish_reason) for s in expected]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.logprobs == pytest.approx(theirs.logprobs, abs=abs)


@pytest.mark.parametrize(("kind", "buckets"), [("llama", False), ("qwen2", True)])
def test_the_compiled_step_samples_what_the_plain_one_does(kind: str, buckets: bool) -> None:
    """While rows of several prompts leave the batch early, and one and the same sampler is called again."""
    plain, compiled = (sampler_of(uneven_model(kind), buckets=b) for b in (None, buckets))
    for n in (4, 1):
        expected = drawn(plain, n)
        assert len({len(sample.ids) for sample in expected}) > 2
        assert_same(drawn(compiled, n), expected)
    assert isinstance(compiled._step, CompiledStep)


def test_with_symbols_code_is_compiled_for_one_row_and_for_several_whatever_the_shapes() -> None:
    counter = CompileCounter()
    sampler = sampler_of(tiny_model("llama", num_hidden_layers=1), buckets=False, backend=counter)
    for new in (5, 14, 9):
        drawn(sampler, 4, Sampling(new, stop_ids=ENDING.stop_ids))
        sampler.generate(PROMPTS[:1], 1, Sampling(new), ("alone", new))
    assert counter.frame_count == 2


def test_with_buckets_shapes_are_powers_of_two_by_multiples_of_128_and_no_more() -> None:
    """12 rows of 5 + 14 places, then fewer; 4 rows of 125 + 4. A bucket's buffers stay where they are."""
    counter, seen = CompileCounter(), []
    model = uneven_model("llama", num_hidden_layers=1, max_position_embeddings=256)
    sampler = sampler_of(model, buckets=True, backend=counter)
    inner = sampler._step._compiled  # type: ignore[union-attr]

    def watched(tokens: Any, mask: Any, positions: Any, place: Any, buffers: Any) -> Any:
        seen.append((*mask.shape, buffers[-1][1].data_ptr()))
        return inner(tokens, mask, positions, place, buffers)

    sampler._step._compiled = watched  # type: ignore[union-attr]
    for _ in range(2):
        drawn(sampler)
    sampler.generate([PromptTokens(tuple(range(2, 52)) * 2 + (5,) * 25, 3)], 4, Sampling(4), ("long",))
    assert seen[0][:2] == (16, 128) and {rows for rows, _, _ in seen} <= {16, 8, 4, 2, 1}
    assert len({rows for rows, _, _ in seen}) > 1 and {places for _, places, _ in seen} == {128, 256}
    assert counter.frame_count == len(set(seen))


def test_more_shapes_than_are_compiled_run_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled_step, "_LIMIT", 1)
    model = uneven_model("llama", num_hidden_layers=1)
    plain, compiled = (sampler_of(model, buckets=b, backend="eager") for b in (None, True))
    with pytest.warns(UserWarning, match="more than 1 shapes"):
        found = drawn(compiled)
    assert_same(found, drawn(plain))
    assert_same(drawn(compiled), drawn(plain))


def test_weights_are_read_anew_and_nothing_is_compiled_again() -> None:
    counter, model = CompileCounter(), uneven_model("llama", num_hidden_layers=1)
    compiled, plain = sampler_of(model, buckets=False, backend=counter), sampler_of(model, buckets=None)
    before, compilations = drawn(compiled), counter.frame_count
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    assert_same(drawn(compiled), drawn(plain))
    assert drawn(compiled) != before
    assert counter.frame_count == compilations


def test_a_wrong_step_is_noticed_and_the_token_it_wrote_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Among rows that fill up a bucket."""
    right = drawn(sampler_of(uneven_model("llama", num_hidden_layers=1), buckets=None))
    inner = LlamaStep.logits
    monkeypatch.setattr(LlamaStep, "logits", lambda self, *args: inner(self, *args) * 1.01)
    sampler = sampler_of(uneven_model("llama", num_hidden_layers=1), buckets=True)
    with pytest.warns(UserWarning, match="the model's own is used"):
        assert_same(drawn(sampler), right)
    assert sampler._step is None


def test_where_memory_runs_out_halves_are_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the third token of the whole batch; what waited for the next batch is let go."""
    expected = drawn(sampler_of(uneven_model("llama", num_hidden_layers=1), buckets=None))
    sampler = sampler_of(uneven_model("llama", num_hidden_layers=1), buckets=True)
    following, held = NativeSampler._next_logits, []

    def failing(self: Any, tokens: torch.Tensor, mask: torch.Tensor, *rest: Any) -> torch.Tensor:
        if len(tokens) > 6 and mask.shape[1] > 6:
            held.append(len(self._step._held))
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        if held and len(held) == 1:
            held.append(len(self._step._held))
        return following(self, tokens, mask, *rest)

    monkeypatch.setattr(NativeSampler, "_next_logits", failing)
    with pytest.warns(UserWarning, match="out of memory while sampling 12 sequences"):
        assert_same(drawn(sampler), expected)
    assert held == [1, 0]


def test_a_model_without_a_short_step_is_sampled_from_as_it_is_and_that_is_said() -> None:
    with pytest.warns(UserWarning, match="compile_sampling.* this GPT2LMHeadModel has none"):
        sampler = NativeSampler(tiny_model("gpt2"), pad_id=PAD_ID, compiled=True)
    assert drawn(sampler) == drawn(NativeSampler(tiny_model("gpt2"), pad_id=PAD_ID))


def test_compiled_to_machine_code_it_samples_the_same() -> None:
    """One block, one shape: the kind of code a run on a CPU has."""
    model = tiny_model("llama", num_hidden_layers=1)
    compiled = NativeSampler(model, pad_id=PAD_ID, compiled=True)
    expected = drawn(NativeSampler(model, pad_id=PAD_ID), 1, Sampling(3))
    assert_same(drawn(compiled, 1, Sampling(3)), expected, abs=1e-5)
    assert isinstance(compiled._step, CompiledStep)


@pytest.mark.gpu
def test_on_a_real_gpu_graphs_are_replayed_and_sample_the_same() -> None:
    """In float32, while rows leave; the second call replays what the first recorded, with other weights."""
    model = tiny_model("llama").to("cuda")
    compiled = NativeSampler(model, pad_id=PAD_ID, compiled=True)
    plain = NativeSampler(model, pad_id=PAD_ID)
    assert_same(drawn(compiled), drawn(plain), abs=1e-4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    assert_same(drawn(compiled), drawn(plain), abs=1e-4)
    assert torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] == 0


@pytest.mark.parametrize(("model", "why"), [
    ({"path": "quickstart", "adapter": {}}, "with adapters cannot be compiled"),
    ({"scratch": {"kind": "gpt2"}}, "`model.scratch.kind` = gpt2"),
])  # fmt: skip
def test_what_has_no_step_to_compile_is_a_contradiction(model: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        recipe_from({"model": model | {"compile_sampling": True}})


@pytest.mark.parametrize("chosen", [False, True])
def test_the_key_reaches_the_sampler_and_belongs_to_stages_that_sample(chosen: bool) -> None:
    context: Any = SimpleNamespace(recipe=recipe_from({"model": {"path": "quickstart", "compile_sampling": chosen}}))
    policy: Any = SimpleNamespace(model=tiny_model("llama"), pad_id=PAD_ID)
    assert isinstance(sampler_of_a_stage(context, policy)._step, CompiledStep) == chosen
    for stage in ("ppo", "rft", "bestofn"):
        assert ("compile_sampling" in _model_settings(context, stage)) == chosen
    for stage in ("sft", "reward", "evaluate"):
        assert "compile_sampling" not in _model_settings(context, stage)
