"""Token scores against what transformers computes from full logits, one unpadded row at a time."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Gemma3Config

from accord.errors import ConfigError
from accord.models import projection
from accord.models.layout import CompletionBatch, collate
from accord.models.load import reward_model_from, value_model_from
from accord.models.projection import LogitTransform, token_logprobs
from accord.models.self_check import check_layouts
from accord.models.token_scores import (
    attention_window,
    last_hidden_states,
    score_completions,
    score_tokens,
    score_values,
)
from accord.records import TokenGroup
from models_support import ARCHITECTURES, PAD_ID, VOCABULARY, tiny_model, token_group

GROUPS = [token_group("abcdefg", "hij", "kLmno", "p"), token_group("x", "pq", "rS"), token_group("tuv", "wxyz")]


def batch_of(layout: str, groups: list[TokenGroup] = GROUPS, pad_id: int = PAD_ID) -> CompletionBatch:
    return collate(groups, layout=layout, pad_id=pad_id)  # type: ignore[arg-type]


def unpadded_rows(groups: list[TokenGroup]) -> list[tuple[Tensor, int]]:
    """(1, tokens) of prompt + completion, and where the completion starts."""
    return [
        (torch.tensor([group.prompt_ids + completion.ids]), len(group.prompt_ids))
        for group in groups
        for completion in group.completions
    ]


def own_scores(model: Any, groups: list[TokenGroup], temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """(C, T) log-probabilities and entropies from the model's full logits."""
    rows = unpadded_rows(groups)
    width = max(ids.shape[1] - start for ids, start in rows)
    logprobs, entropies = [], []
    for ids, start in rows:
        logp = (model(input_ids=ids).logits[0, start - 1 : -1] / temperature).log_softmax(dim=-1)
        padding = (0, width - logp.shape[0])
        chosen = logp.gather(1, ids[0, start:, None])[:, 0]
        logprobs.append(torch.nn.functional.pad(chosen, padding))
        entropies.append(torch.nn.functional.pad(-(logp.exp() * logp).sum(dim=-1), padding))
    return torch.stack(logprobs), torch.stack(entropies)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_both_layouts_give_the_models_own_logprobs(architecture: str) -> None:
    model = tiny_model(architecture)
    with torch.no_grad():
        own, own_entropies = own_scores(model, GROUPS)
        shared = score_tokens(model, batch_of("shared"), with_entropy=True)
        plain = score_tokens(model, batch_of("plain"), with_entropy=True)
    for scores in (shared, plain):
        torch.testing.assert_close(scores.logprobs, own, rtol=0, atol=1e-5)
        torch.testing.assert_close(scores.entropies, own_entropies, rtol=0, atol=1e-5)
    assert own[own != 0].std() > 0.05, "the models are too flat for the comparison to mean anything"


@pytest.mark.parametrize(
    ("architecture", "rounding"), [("gpt2", 1e-10), ("opt", 1e-10), ("gptj", 1e-5), ("llama", 1e-5), ("gemma2", 1e-5)]
)
@pytest.mark.parametrize("layout", ["shared", "plain"])
def test_both_layouts_give_the_gradients_of_the_models_own_logits(
    architecture: str, rounding: float, layout: str
) -> None:
    """In float64; some architectures compute norms, rotations or attention weights in float32 all the same."""
    model = tiny_model(architecture, dtype=torch.float64)
    twin = copy.deepcopy(model)
    weights = torch.linspace(-1.0, 2.0, steps=6 * 5, dtype=torch.float64).view(6, 5)
    scores = score_tokens(model, batch_of(layout), temperature=0.7, with_entropy=True)
    assert scores.entropies is not None
    (weights * scores.logprobs + weights.square() * scores.entropies).sum().backward()
    own, own_entropies = own_scores(twin, GROUPS, temperature=0.7)
    (weights * own + weights.square() * own_entropies).sum().backward()
    for (name, ours), (_, theirs) in zip(model.named_parameters(), twin.named_parameters(), strict=True):
        if theirs.grad is None:
            assert ours.grad is None, name
        else:
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=rounding, msg=name)


@pytest.mark.parametrize("temperature", [0.25, 1.0, 3.0])
def test_temperature_divides_the_logits(temperature: float) -> None:
    model = tiny_model("gemma2")
    with torch.no_grad():
        own, own_entropies = own_scores(model, GROUPS, temperature)
        scores = score_tokens(model, batch_of("shared"), temperature=temperature, with_entropy=True)
    torch.testing.assert_close(scores.logprobs, own, rtol=0, atol=2e-5)
    torch.testing.assert_close(scores.entropies, own_entropies, rtol=0, atol=2e-5)


def test_a_temperature_of_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="temperature is 0"):
        score_tokens(tiny_model("gpt2"), batch_of("plain"), temperature=0.0)


@pytest.mark.parametrize("layout", ["shared", "plain"])
def test_the_loss_mask_leaves_other_tokens_at_exactly_zero(layout: str) -> None:
    model, batch = tiny_model("llama"), batch_of(layout)
    every = score_tokens(model, batch).logprobs
    loss = score_tokens(model, batch, mask="loss").logprobs
    assert not loss[~batch.completion_mask].any()
    torch.testing.assert_close(loss, torch.where(batch.completion_mask, every, 0.0), rtol=0, atol=1e-5)
    assert (batch.valid_mask & ~batch.completion_mask).sum() == 2
    assert (every[~batch.valid_mask] == 0).all()
    assert (every[batch.valid_mask] < 0).all()


def test_a_batch_without_a_token_in_the_loss_scores_zero() -> None:
    model = tiny_model("gpt2")
    scores = score_tokens(model, batch_of("shared", [token_group("ab", "CD", "E")]), mask="loss", with_entropy=True)
    assert scores.logprobs.tolist() == [[0.0, 0.0], [0.0, 0.0]]
    scores.logprobs.sum().backward()
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in model.parameters())


@pytest.mark.parametrize("layout", ["shared", "plain"])
def test_padding_and_tokens_outside_the_loss_receive_no_gradient(layout: str) -> None:
    """Token 50 is padding and nothing else. After "g" only "Z" is predicted, outside the loss, and after "Z" nothing.
    The head is not tied, so an embedding's gradient comes from the token's use as input alone."""
    model = tiny_model("llama")
    batch = batch_of(layout, [token_group("abc", "defgZ", "hi"), token_group("k", "l")], pad_id=50)
    score_tokens(model, batch, mask="loss").logprobs.sum().backward()
    gradient = model.get_input_embeddings().weight.grad
    assert not gradient[50].any()
    for unused in token_group("gz").prompt_ids:
        assert not gradient[unused].any()
    for used in token_group("abcdefhk").prompt_ids:
        assert gradient[used].any()


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt", "gemma3_text"])
@pytest.mark.parametrize("layout", ["shared", "plain"])
def test_values_and_scores_are_the_head_on_the_right_hidden_states(architecture: str, layout: str) -> None:
    reward_model = reward_model_from(tiny_model(architecture), seed=5)
    value_model = value_model_from(reward_model)
    batch = batch_of(layout)
    with torch.no_grad():
        values, scores = score_values(value_model, batch), score_completions(reward_model, batch)
        states = last_hidden_states(reward_model, batch)
        assert (values[~batch.valid_mask] == 0).all()
        for c, (ids, start) in enumerate(unpadded_rows(GROUPS)):
            hidden = reward_model.base_model(input_ids=ids).last_hidden_state[0]
            heads = (hidden @ reward_model.score.weight.t())[:, 0]
            size = ids.shape[1] - start
            torch.testing.assert_close(values[c, :size], heads[start - 1 : -1], rtol=0, atol=1e-5)
            torch.testing.assert_close(scores[c], heads[-1], rtol=0, atol=1e-5)
            torch.testing.assert_close(states[c], hidden[-1], rtol=0, atol=1e-5)


def test_value_gradients_do_not_depend_on_the_layout() -> None:
    value_model = reward_model_from(tiny_model("gpt2", dtype=torch.float64), seed=5)
    twin = value_model_from(value_model)
    (score_values(value_model, batch_of("shared")) ** 2).sum().backward()
    (score_values(twin, batch_of("plain")) ** 2).sum().backward()
    assert value_model.score.weight.grad.any()
    for (name, ours), theirs in zip(value_model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-10, msg=name)


def test_the_plain_layout_runs_the_causal_kernel_without_a_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """But for the last block of two, where not all of a row is asked for."""
    calls: list[tuple[bool, bool]] = []
    kernel = torch.nn.functional.scaled_dot_product_attention

    def recorded(*args: Any, attn_mask: Tensor | None = None, is_causal: bool = False, **options: Any) -> Tensor:
        calls.append((attn_mask is None, is_causal))
        return kernel(*args, attn_mask=attn_mask, is_causal=is_causal, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", recorded)
    for architecture, last in (("llama", (False, False)), ("gpt2", (True, True))):
        model = tiny_model(architecture)
        score_tokens(model, batch_of("plain"))
        score_tokens(model, batch_of("shared", [token_group("ab", "cdef"), token_group("g", "h")]))
        assert calls == [(True, True), last] * 2
        calls.clear()
    score_tokens(tiny_model("llama"), batch_of("shared"))
    assert calls == [(False, False)] * 2


class LargestTensor(TorchDispatchMode):
    """Remembers the number of elements of the largest tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.elements = max(self.elements, result.numel())
        return result


def test_no_tensor_ever_holds_more_than_one_chunk_of_logits() -> None:
    """60 tokens x 53 entries are 3180 logits; a chunk of 8 rows has 424. The embedding (53, 32) has 1696."""
    model = tiny_model("llama")
    batch = batch_of("plain", [token_group("ab" * 3, "cdefgh" * 5, "ijklmn" * 5)])
    with LargestTensor() as full:
        model(input_ids=batch.input_ids)
    with LargestTensor() as chunked:
        hidden = torch.randn(60, 8, requires_grad=True)
        head = torch.randn(VOCABULARY, 8, requires_grad=True)
        targets = batch.completion_ids.flatten()
        transform = LogitTransform(softcap=2.0)
        logprobs, entropies = token_logprobs(hidden, head, None, targets, transform, with_entropy=True, chunk_rows=8)
        assert entropies is not None
        (logprobs.sum() + entropies.sum()).backward()
    assert full.elements >= 60 * VOCABULARY
    assert chunked.elements <= max(8 * VOCABULARY, 60 * 8)
    assert hidden.grad is not None and head.grad is not None


TRANSFORMS = [
    LogitTransform(),
    LogitTransform(scale=1.7, softcap=2.5, temperature=0.6),
    LogitTransform(temperature=0.6),
]


@pytest.mark.parametrize("with_entropy", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("kept_rows", [0, 4, 5])
def test_projection_gradients_are_those_of_finite_differences(
    with_entropy: bool, with_bias: bool, transform: LogitTransform, kept_rows: int
) -> None:
    """Chunks of 2, 2 and 1 rows; none of them, the first two or all wait for the backward pass."""
    generator = torch.Generator().manual_seed(1)
    hidden, weight, bias = (
        torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
        for shape in ((5, 3), (7, 3), (7,))
    )
    targets = torch.tensor([0, 6, 3, 3, 5])

    def scores(*tensors: Tensor) -> tuple[Tensor, ...]:
        both = token_logprobs(
            tensors[0],
            tensors[1],
            tensors[2] if with_bias else None,
            targets,
            transform,
            with_entropy=with_entropy,
            chunk_rows=2,
            kept_elements=kept_rows * 7,
        )
        return tuple(tensor for tensor in both if tensor is not None)

    assert torch.autograd.gradcheck(scores, (hidden, weight, bias) if with_bias else (hidden, weight))


class Projections(TorchDispatchMode):
    """Counts matrix products that make logits, and the numbers they hold."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.vocabulary, self.rows = vocabulary, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.mm.default and result.shape[1] == self.vocabulary:
            self.rows += len(result)
        return result


@pytest.mark.parametrize(("kept_elements", "projected_again"), [(0, 60), (25 * 53, 36), (60 * 53 - 1, 4), (60 * 53, 0)])
def test_only_what_does_not_wait_is_projected_again(kept_elements: int, projected_again: int) -> None:
    """60 tokens in chunks of 8 rows, the last of 4: with room for 25 rows three whole chunks wait."""
    hidden, head = torch.randn(60, 8, requires_grad=True), torch.randn(53, 8, requires_grad=True)
    targets = torch.arange(60) % 53
    with Projections(53) as seen:
        logprobs, _ = token_logprobs(
            hidden, head, None, targets, LogitTransform(), with_entropy=False, chunk_rows=8, kept_elements=kept_elements
        )
        assert seen.rows == 60
        logprobs.sum().backward(retain_graph=True)
    assert seen.rows == 60 + projected_again
    assert hidden.grad is not None
    once = hidden.grad.clone()
    logprobs.sum().backward()
    torch.testing.assert_close(hidden.grad, 2 * once)


def test_nothing_waits_where_no_gradient_will_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[int] = []
    inner = projection._TokenLogprobs.apply
    monkeypatch.setattr(projection._TokenLogprobs, "apply", lambda *args: kept.append(args[-1]) or inner(*args))
    hidden, head = torch.randn(5, 4), torch.randn(9, 4)
    with torch.no_grad():
        token_logprobs(hidden, head, None, torch.arange(5), LogitTransform(), with_entropy=False)
    token_logprobs(hidden, head, None, torch.arange(5), LogitTransform(), with_entropy=False)
    assert kept[0] == 0 and kept[1] >= 5


def test_a_frozen_head_gets_no_gradient_and_the_trunk_still_does() -> None:
    hidden, weight = torch.randn(5, 4, requires_grad=True), torch.randn(9, 4)
    logprobs, _ = token_logprobs(hidden, weight, None, torch.arange(5), LogitTransform(), with_entropy=False)
    logprobs.sum().backward()
    assert hidden.grad is not None and hidden.grad.any()
    assert weight.grad is None


def test_sixteen_bit_models_score_in_float32() -> None:
    model = tiny_model("llama", dtype=torch.bfloat16)
    scores = score_tokens(model, batch_of("shared"))
    assert scores.logprobs.dtype == torch.float32
    scores.logprobs.sum().backward()
    assert model.get_output_embeddings().weight.grad.dtype == torch.bfloat16
    with torch.no_grad():
        own, _ = own_scores(model.float(), GROUPS)
    torch.testing.assert_close(scores.logprobs, own, rtol=0, atol=0.25)


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2", "cohere"])
def test_the_self_check_shares_prompts_where_it_may(architecture: str) -> None:
    check = check_layouts(tiny_model(architecture), [token_group("abcd", "efg"), token_group("h", "ijk")], PAD_ID)
    assert (check.layout, check.reason) == ("shared", "")
    assert check.max_difference is not None and check.max_difference < 1e-5


@pytest.mark.parametrize(
    ("architecture", "reason"),
    [
        ("mixtral", "mixture of experts"),
        ("mamba", "layers other than attention"),
        ("rwkv", "layers other than attention"),
        ("gpt_neo", "row places"),
        ("bloom", "cannot run the shared layout"),
    ],
)
def test_the_self_check_falls_back_to_plain_and_says_why(architecture: str, reason: str) -> None:
    check = check_layouts(tiny_model(architecture), [token_group("abcd", "efg")], PAD_ID)
    assert check.layout == "plain"
    assert reason in check.reason


def test_the_self_check_falls_back_to_plain_where_the_layouts_differ() -> None:
    """A model that forgets the positions it is given counts the second completion's places wrongly."""
    model = tiny_model("llama")
    forward = model.base_model.forward
    model.base_model.forward = lambda position_ids=None, **inputs: forward(**inputs)
    check = check_layouts(model, GROUPS, PAD_ID)
    assert check.layout == "plain"
    assert "changes log-probabilities by" in check.reason
    assert check.max_difference is not None and check.max_difference > 1e-3


def test_the_self_check_refuses_logits_it_does_not_understand() -> None:
    model = tiny_model("granite")
    model.forward = lambda forward=model.forward, **inputs: scaled(forward(**inputs))
    with pytest.raises(ConfigError, match=r"GraniteForCausalLM \(granite\) works in a way Accord does not know"):
        check_layouts(model, GROUPS, PAD_ID)


def scaled(output: Any) -> Any:
    output.logits = output.logits * 1.1
    return output


def test_sequences_longer_than_the_attention_window_need_the_plain_layout() -> None:
    model = tiny_model("mistral", sliding_window=8)
    inside = [token_group("abcde", "fgh", "ij")]
    beyond = [token_group("abcdef", "ghi", "jk")]
    assert check_layouts(model, inside, PAD_ID).layout == "shared"
    assert "attention window of 8" in check_layouts(model, inside, PAD_ID, max_tokens=9).reason
    check = check_layouts(model, beyond, PAD_ID)
    assert (check.layout, "attention window of 8" in check.reason) == ("plain", True)
    with torch.no_grad():
        own, _ = own_scores(model, beyond)
        torch.testing.assert_close(score_tokens(model, batch_of("plain", beyond)).logprobs, own, rtol=0, atol=1e-5)
    with pytest.raises(ConfigError, match="use the plain layout"):
        score_tokens(model, batch_of("shared", beyond))


def test_a_window_that_no_layer_uses_is_no_window() -> None:
    model = tiny_model("gemma3_text", sliding_window=4, layer_types=["full_attention", "full_attention"])
    assert check_layouts(model, GROUPS, PAD_ID).layout == "shared"


def test_a_model_for_text_and_images_has_the_window_of_its_text_part() -> None:
    config = Gemma3Config(text_config={"sliding_window": 16})
    assert attention_window(config) == 16


def test_attention_that_takes_no_mask_needs_the_plain_layout() -> None:
    model = tiny_model("llama")
    batch = batch_of("shared")
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ConfigError, match="'flash_attention_2' takes no mask"):
        score_tokens(model, batch)
