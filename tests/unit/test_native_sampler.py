"""The native sampler on tiny random models: against teacher forcing, greedy generation, exact probabilities, itself."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
)
from transformers.cache_utils import DynamicLayer

from accord.errors import ConfigError, DataError, TrainingError
from accord.records import SampledCompletion
from accord.rollout.native import NativeSampler, PromptTokens
from accord.rollout.sampling import Sampling

VOCAB = 32
COMMON = {
    "num_hidden_layers": 2,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 4,
    "vocab_size": VOCAB,
    "max_position_embeddings": 48,
    "initializer_range": 0.4,  # large, so that a wrong position, mask or cache row changes the distribution visibly
    "bos_token_id": None,
    "eos_token_id": None,
}
CONFIGS = {
    "llama": LlamaConfig(**COMMON, num_key_value_heads=2),
    "gpt2": GPT2Config(
        n_layer=2,
        n_embd=16,
        n_head=4,
        vocab_size=VOCAB,
        n_positions=48,
        initializer_range=0.4,
        bos_token_id=None,
        eos_token_id=None,
    ),
    "gpt_neox": GPTNeoXConfig(**COMMON),
    "qwen2": Qwen2Config(**COMMON, num_key_value_heads=2),
    "sliding window": MistralConfig(**COMMON, num_key_value_heads=2, sliding_window=6),
}
PROMPTS = [
    PromptTokens((5, 9, 2), 11),
    PromptTokens((7,), 12),
    PromptTokens((1, 8, 3, 4, 6, 9, 2, 30), 13),
    PromptTokens((5, 9, 3), 14),
    PromptTokens((0, 0, 31, 5, 5), 15),
]
SAMPLING = Sampling(10, stop_ids=(3, 4, 5))
KEY = ("ppo", 0, 1)


def _model(config: PretrainedConfig, attention: str = "sdpa") -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return _model(CONFIGS["llama"])


def _sampler(model: PreTrainedModel, max_batch_sequences: int = 64) -> NativeSampler:
    return NativeSampler(model, pad_id=0, max_batch_sequences=max_batch_sequences)


def _forced_logprobs(
    model: PreTrainedModel, prompt: PromptTokens, ids: tuple[int, ...], temperature: float
) -> torch.Tensor:
    """The oracle: one forward over prompt and completion alone, in one row, without cache or padding: (C, V)."""
    with torch.no_grad():
        logits = model.eval()(torch.tensor([prompt.ids + ids])).logits[0]
    return (logits[len(prompt.ids) - 1 : -1].double() / temperature).log_softmax(-1)


def _assert_same(found: tuple[SampledCompletion, ...], expected: tuple[SampledCompletion, ...]) -> None:
    """Same tokens and ends exactly; logprobs to rounding, since matrix products round differently in other batches."""
    assert [(s.ids, s.finish_reason) for s in found] == [(s.ids, s.finish_reason) for s in expected]
    for a, b in zip(found, expected, strict=True):
        assert a.logprobs == pytest.approx(b.logprobs, abs=2e-5)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", CONFIGS)
def test_logprobs_are_those_of_teacher_forcing_at_the_temperature(name: str, attention: str) -> None:
    model = _model(CONFIGS[name], attention)
    sampling = replace(SAMPLING, temperature=0.7)
    groups = _sampler(model, 8).generate(PROMPTS, 3, sampling, KEY)
    for prompt, group in zip(PROMPTS, groups, strict=True):
        for sample in group:
            forced = _forced_logprobs(model, prompt, sample.ids, 0.7)
            assert sample.logprobs == pytest.approx([forced[t, i].item() for t, i in enumerate(sample.ids)], abs=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_is_what_transformers_generates(name: str) -> None:
    model = _model(CONFIGS[name]).eval()
    groups = _sampler(model).generate(PROMPTS, 1, replace(SAMPLING, temperature=0), KEY)
    for prompt, (sample,) in zip(PROMPTS, groups, strict=True):
        ids = torch.tensor([prompt.ids])
        expected = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=10,
            eos_token_id=[3, 4, 5],
            pad_token_id=0,
        )
        assert sample.ids == tuple(expected[0, len(prompt.ids) :].tolist())


def test_top_k_of_one_is_greedy(model: PreTrainedModel) -> None:
    one = _sampler(model).generate(PROMPTS, 1, replace(SAMPLING, top_k=1), KEY)
    greedy = _sampler(model).generate(PROMPTS, 1, replace(SAMPLING, temperature=0), KEY)
    assert [g[0].ids for g in one] == [g[0].ids for g in greedy]


@pytest.mark.parametrize("max_batch_sequences", [1, 3, 5, 8, 20])
def test_samples_do_not_depend_on_the_batch_size(model: PreTrainedModel, max_batch_sequences: int) -> None:
    expected = _sampler(model).generate(PROMPTS, 4, SAMPLING, KEY)
    found = _sampler(model, max_batch_sequences).generate(PROMPTS, 4, SAMPLING, KEY)
    for a, b in zip(found, expected, strict=True):
        _assert_same(a, b)


@pytest.mark.parametrize("late", [False, True])
def test_a_batch_without_memory_is_sampled_in_halves(
    model: PreTrainedModel, late: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory for 3 sequences at once, found to be missing before the first token or at the second."""
    expected = _sampler(model).generate(PROMPTS, 4, SAMPLING, KEY)
    sizes: list[int] = []
    prefill, following = NativeSampler._prefill, NativeSampler._next_logits

    def first(self: Any, prompts: Any, rows: Any, room: int) -> Any:
        sizes.append(len(rows))
        if not late and len(rows) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 is full.")
        return prefill(self, prompts, rows, room)

    def second(self: Any, tokens: torch.Tensor, *rest: Any) -> torch.Tensor:
        if late and len(tokens) > 3:
            raise RuntimeError("[enforce fail] . DefaultCPUAllocator: can't allocate: you tried to allocate 9 bytes. ")
        return following(self, tokens, *rest)

    monkeypatch.setattr(NativeSampler, "_prefill", first)
    monkeypatch.setattr(NativeSampler, "_next_logits", second)
    said = r"out of memory while sampling 8 sequences .*: tried to allocate (2.00 GiB|9 bytes); .*`max_new_tokens`"
    sampler = _sampler(model, 8)
    with pytest.warns(UserWarning, match=said) as told:
        found = sampler.generate(PROMPTS, 4, SAMPLING, KEY)
    assert len(told) == 1
    assert sizes[:4] == [8, 4, 2, 2]
    for a, b in zip(found, expected, strict=True):
        _assert_same(a, b)


def test_a_single_sequence_without_memory_is_one_clear_error(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 is full.")

    monkeypatch.setattr(NativeSampler, "_prefill", fail)
    with pytest.raises(TrainingError, match=r"a single sequence .* 8 tokens and 10 new .*2\.00 GiB\. Lower `max_new"):
        _sampler(model, 1).generate(PROMPTS, 1, SAMPLING, KEY)


def test_samples_do_not_depend_on_the_order_or_presence_of_other_prompts(model: PreTrainedModel) -> None:
    expected = dict(zip(PROMPTS, _sampler(model).generate(PROMPTS, 3, SAMPLING, KEY), strict=True))
    backwards = PROMPTS[::-1]
    for prompt, group in zip(backwards, _sampler(model).generate(backwards, 3, SAMPLING, KEY), strict=True):
        _assert_same(group, expected[prompt])
    for prompt in PROMPTS:
        _assert_same(_sampler(model).generate([prompt], 3, SAMPLING, KEY)[0], expected[prompt])


def test_asking_for_fewer_samples_gives_the_first_ones(model: PreTrainedModel) -> None:
    three = _sampler(model).generate(PROMPTS, 3, SAMPLING, KEY)
    for few, many in zip(_sampler(model).generate(PROMPTS, 2, SAMPLING, KEY), three, strict=True):
        _assert_same(few, many[:2])


def test_a_repeated_prompt_id_goes_on_counting_samples(model: PreTrainedModel) -> None:
    """Two calls' worth of one prompt: samples 0, 1 and then 2, 3, as if four had been asked for at once."""
    four = _sampler(model).generate([PROMPTS[0]], 4, SAMPLING, KEY)[0]
    twice = _sampler(model).generate([PROMPTS[0], PROMPTS[1], PROMPTS[0]], 2, SAMPLING, KEY)
    _assert_same(twice[0] + twice[2], four)


def test_samples_of_a_prompt_differ_and_so_do_keys(model: PreTrainedModel) -> None:
    sampler = _sampler(model)
    eight = [s.ids for s in sampler.generate([PROMPTS[0]], 8, Sampling(10), KEY)[0]]
    assert len(set(eight)) == 8
    other = [s.ids for s in sampler.generate([PROMPTS[0]], 8, Sampling(10), ("ppo", 0, 2))[0]]
    assert not set(eight) & set(other)


def test_two_prompt_ids_with_equal_tokens_get_different_samples(model: PreTrainedModel) -> None:
    a, b = _sampler(model).generate([PROMPTS[0], replace(PROMPTS[0], prompt_id=99)], 1, Sampling(10), KEY)
    assert a[0].ids != b[0].ids


def test_stopping_cuts_the_sample_and_disturbs_no_other(model: PreTrainedModel) -> None:
    """Without stop tokens nothing ever leaves the batch; cutting those samples after the first stop token must give
    what the sampler returns when sequences do leave it."""
    free = _sampler(model).generate(PROMPTS, 6, replace(SAMPLING, stop_ids=()), KEY)
    stopped = _sampler(model).generate(PROMPTS, 6, SAMPLING, KEY)
    reasons = set()
    for whole_group, group in zip(free, stopped, strict=True):
        for whole, sample in zip(whole_group, group, strict=True):
            stops = [t for t, token in enumerate(whole.ids) if token in SAMPLING.stop_ids]
            cut = SampledCompletion(whole.ids, whole.logprobs, "length")
            if stops:
                end = stops[0] + 1
                cut = SampledCompletion(whole.ids[:end], whole.logprobs[:end], "stop")
            _assert_same((sample,), (cut,))
            reasons.add(sample.finish_reason)
    assert reasons == {"stop", "length"}


def test_a_stop_token_in_the_last_place_is_a_stop(model: PreTrainedModel) -> None:
    ends = [s for g in _sampler(model).generate(PROMPTS, 20, Sampling(1, stop_ids=(3, 4, 5)), KEY) for s in g]
    assert {s.finish_reason for s in ends if s.ids[0] in {3, 4, 5}} == {"stop"}
    assert {s.finish_reason for s in ends if s.ids[0] not in {3, 4, 5}} == {"length"}


def test_no_stop_token_comes_before_min_new_tokens(model: PreTrainedModel) -> None:
    """And the logprobs there are renormalised over the tokens that were allowed."""
    stops = tuple(range(20))
    groups = _sampler(model).generate(PROMPTS, 4, Sampling(10, min_new_tokens=4, stop_ids=stops), KEY)
    for prompt, group in zip(PROMPTS, groups, strict=True):
        for sample in group:
            assert len(sample.ids) >= 5 or sample.finish_reason == "length"
            assert not set(sample.ids[:4]) & set(stops)
            forced = _forced_logprobs(model, prompt, sample.ids, 1.0)
            forced[:4, : len(stops)] = -math.inf
            forced = forced.log_softmax(-1)
            assert sample.logprobs == pytest.approx([forced[t, i].item() for t, i in enumerate(sample.ids)], abs=1e-5)
    assert any(len(s.ids) == 5 for g in groups for s in g)


def test_sampled_pairs_follow_the_exact_joint_distribution() -> None:
    """4 tokens, 2 steps, 16 outcomes with p(a) p(b | a) from teacher forcing: chi-square of 4,000 samples below 37.70,
    the 99.9th percentile at 15 degrees of freedom; the key is fixed."""
    config = GPT2Config(
        n_layer=2,
        n_embd=8,
        n_head=2,
        vocab_size=4,
        n_positions=8,
        initializer_range=0.4,
        bos_token_id=None,
        eos_token_id=None,
    )
    model, prompt, n = _model(config), PromptTokens((1, 2), 5), 4000
    (group,) = _sampler(model, 1000).generate([prompt], n, Sampling(2), KEY)
    chi_square = 0.0
    for a in range(4):
        forced = _forced_logprobs(model, prompt, (a, 0), 1.0)
        for b in range(4):
            expected = n * math.exp(forced[0, a].item() + forced[1, b].item())
            chi_square += (sum(s.ids == (a, b) for s in group) - expected) ** 2 / expected
    assert chi_square < 37.70


def _shape(tokens: torch.Tensor) -> tuple[int, int]:
    """(rows, columns) of token ids; the short step takes one token a row, without a column."""
    return tokens.shape[0], tokens.numel() // tokens.shape[0]


def test_prompts_run_once_and_finished_sequences_leave_the_batch(model: PreTrainedModel) -> None:
    """Rows and columns of every forward pass: 5 prompts once for 50 samples; then fewer and fewer rows of one token."""
    shapes: list[tuple[int, int]] = []
    projected: list[int] = []
    hooks = [
        model.get_input_embeddings().register_forward_hook(lambda _m, args, _out: shapes.append(_shape(args[0]))),
        model.get_output_embeddings().register_forward_hook(
            lambda _m, args, _out: projected.append(args[0].numel() // args[0].shape[-1] // args[0].shape[0])
        ),
    ]
    groups = _sampler(model).generate(PROMPTS, 10, Sampling(10, stop_ids=tuple(range(8))), KEY)
    assert shapes[1] == (1, 1)  # the model's own step, which the short one is compared with once
    del shapes[1]
    for hook in hooks:
        hook.remove()
    assert shapes[0] == (5, 8)
    assert all(columns == 1 for _, columns in shapes[1:])
    assert set(projected) == {1}
    alive = [sum(len(s.ids) > step for g in groups for s in g) for step in range(1, 10)]
    rows = [rows for rows, _ in shapes[1:]]
    assert all(
        needed <= held < max(needed / 0.75, needed + 1) + 1e-9 for held, needed in zip(rows, alive, strict=False)
    )
    assert rows[-1] < rows[0]


@pytest.mark.parametrize(
    ("max_batch_sequences", "prefills"), [(5, [(1, 8), (1, 5), (1, 3), (1, 3), (1, 1)]), (7, [(2, 8), (2, 3), (1, 1)])]
)
def test_batches_hold_whole_groups_of_similar_length(
    model: PreTrainedModel, max_batch_sequences: int, prefills: list[tuple[int, int]]
) -> None:
    """3 samples of prompts of 3, 1, 8, 3 and 5 tokens: a batch of 5 has room for one group, a batch of 7 for two."""
    shapes: list[tuple[int, int]] = []
    hook = model.get_input_embeddings().register_forward_hook(
        lambda _m, args, _out: shapes.append(tuple(args[0].shape))
    )
    _sampler(model, max_batch_sequences).generate(PROMPTS, 3, Sampling(1), KEY)
    hook.remove()
    assert shapes == prefills


def test_decoding_does_not_copy_what_is_cached(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library's layer concatenates in `update`: it may do so for the prompt, once per model layer."""
    calls: list[int] = []
    update = DynamicLayer.update
    monkeypatch.setattr(DynamicLayer, "update", lambda *args, **kwargs: (calls.append(1), update(*args, **kwargs))[1])
    _sampler(model).generate(PROMPTS, 2, Sampling(8), KEY)
    assert len(calls) == 2


def test_samples_that_do_not_fit_together_are_split(model: PreTrainedModel) -> None:
    shapes: list[int] = []
    hook = model.get_input_embeddings().register_forward_hook(lambda _m, args, _out: shapes.append(args[0].shape[0]))
    groups = _sampler(model, 3).generate(PROMPTS[:1], 7, Sampling(2), KEY)
    hook.remove()
    assert shapes == [1, 1, 3, 1, 3, 1, 1]  # the short step is compared with the model's own once, on one row
    assert len(groups[0]) == 7


def test_the_mode_and_gradients_of_the_model_are_left_alone(model: PreTrainedModel) -> None:
    grad: set[bool] = set()
    hook = model.get_input_embeddings().register_forward_hook(lambda *_: grad.add(torch.is_grad_enabled()))
    for training in (True, False):
        model.train(training)
        _sampler(model).generate(PROMPTS, 1, SAMPLING, KEY)
        assert model.training is training
    assert grad == {False}
    hook.remove()
    logits = model(torch.tensor([[1, 2, 3]])).logits
    logits.sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    model.zero_grad()


def test_dropout_is_off_while_sampling() -> None:
    config = GPT2Config(
        n_layer=1,
        n_embd=8,
        n_head=2,
        vocab_size=VOCAB,
        n_positions=48,
        resid_pdrop=0.5,
        embd_pdrop=0.5,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = _model(config).train()
    found, again = (_sampler(model).generate(PROMPTS, 2, SAMPLING, KEY) for _ in range(2))
    assert found == again


def test_progress_counts_finished_sequences(model: PreTrainedModel) -> None:
    calls: list[tuple[int, int]] = []
    NativeSampler(model, pad_id=0, max_batch_sequences=4, progress=lambda *call: calls.append(call)).generate(
        PROMPTS, 2, SAMPLING, KEY
    )
    assert calls == [(4, 10), (8, 10), (10, 10)]


def test_no_prompts_give_no_samples(model: PreTrainedModel) -> None:
    assert _sampler(model).generate([], 4, SAMPLING, KEY) == []


def test_a_prompt_too_long_for_the_model_names_the_numbers(model: PreTrainedModel) -> None:
    assert len(_sampler(model).generate([PromptTokens((1,) * 38, 0)], 1, SAMPLING, KEY)[0]) == 1
    with pytest.raises(ConfigError, match=r"prompt 1 has 39 tokens.*max_new_tokens = 10.*48 positions"):
        _sampler(model).generate([PROMPTS[0], PromptTokens((1,) * 39, 0)], 1, SAMPLING, KEY)


def test_an_empty_prompt_is_refused(model: PreTrainedModel) -> None:
    with pytest.raises(DataError, match="prompt 0 has no tokens"):
        _sampler(model).generate([PromptTokens((), 0)], 1, SAMPLING, KEY)


@pytest.mark.parametrize("n", [0, -1])
def test_less_than_one_sample_is_refused(model: PreTrainedModel, n: int) -> None:
    with pytest.raises(ValueError, match=f"^n is {n}"):
        _sampler(model).generate(PROMPTS, n, SAMPLING, KEY)


def test_a_batch_of_nothing_is_refused(model: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match="max_batch_sequences is 0"):
        _sampler(model, 0)


def test_a_diverged_model_is_an_error_and_the_mode_is_restored() -> None:
    model = _model(CONFIGS["llama"]).train()
    with torch.no_grad():
        model.get_output_embeddings().weight.fill_(math.nan)
    with pytest.raises(TrainingError, match="not finite"):
        _sampler(model).generate(PROMPTS, 1, SAMPLING, KEY)
    assert model.training
