"""The model with Q heads and the policy it shapes: layouts, saving, sampling, the lagged targets."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from accord.errors import ConfigError
from accord.models.ilql import ILQLModel, ILQLScores, ShapedPolicy, has_heads, load_heads, save_heads, shaped_logits
from accord.models.layout import CompletionBatch, collate
from accord.models.load import load_policy, save_model
from accord.models.token_scores import score_tokens
from accord.records import TokenCompletion, TokenGroup
from accord.rollout.native import NativeSampler, PromptTokens
from accord.rollout.sampling import Sampling, adjusted_logits
from models_support import PAD_ID, VOCABULARY, tiny_model, token_group, word_tokenizer

GROUPS = [token_group("abcdefg", "hij", "kLmno", "p"), token_group("x", "pq", "rS"), token_group("tuv", "wxyz")]
FIELDS = ("logprobs", "q", "q_logprobs", "target_q", "values")


def ilql_model(architecture: str = "gpt2", *, seed: int = 0, trained: bool = True, **options: Any) -> ILQLModel:
    """Heads that say something, and targets that say something else, as after some training."""
    model = ILQLModel(tiny_model(architecture, **options), seed=seed)
    if trained:
        numbers = torch.Generator().manual_seed(seed + 1)
        for head in (*model.q_heads, *model.target_heads, model.value_head):
            for name, tensor in head.state_dict().items():
                scale = 0.2 if name == "inner.weight" else 1.0
                tensor.copy_(scale * torch.randn(tensor.shape, generator=numbers, dtype=torch.float64))
    return model


def batch_of(layout: str, groups: list[TokenGroup] = GROUPS) -> CompletionBatch:
    return collate(groups, layout=layout, pad_id=PAD_ID)  # type: ignore[arg-type]


def by_hand(model: ILQLModel, groups: list[TokenGroup]) -> dict[str, list[Tensor]]:
    """The fields of `ILQLScores` at each counted token, from full rows and full projections."""
    found: dict[str, list[Tensor]] = {name: [] for name in FIELDS}
    for group in groups:
        for completion in group.completions:
            ids = torch.tensor([group.prompt_ids + completion.ids])
            states = model.policy.base_model(input_ids=ids).last_hidden_state[0].to(model.value_head.inner.weight.dtype)
            logprobs = model.policy(input_ids=ids).logits[0].log_softmax(-1)
            q, targets = ([head(states) for head in heads] for heads in (model.q_heads, model.target_heads))
            for t, (token, counts) in enumerate(zip(completion.ids, completion.mask, strict=True)):
                place = len(group.prompt_ids) + t - 1
                if counts:
                    found["logprobs"].append(logprobs[place, token])
                    found["q"].append(torch.stack([head[place, token] for head in q]))
                    found["q_logprobs"].append(torch.stack([head[place].log_softmax(-1)[token] for head in q]))
                    found["target_q"].append(torch.stack([head[place, token] for head in targets]))
                    found["values"].append(model.value_head(states[place])[0])
    return found


# --- the heads -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "gemma2", "opt"])
@pytest.mark.parametrize("layout", ["shared", "plain"])
def test_both_layouts_read_every_head_where_the_token_is_predicted(architecture: str, layout: str) -> None:
    """OPT's last hidden state is narrower than its hidden size; gemma2 caps its logits, and nothing caps Q."""
    model, batch = ilql_model(architecture), batch_of(layout)
    with torch.no_grad():
        scores, expected = model(batch), by_hand(model, GROUPS)
    for name in FIELDS:
        field = getattr(scores, name)
        assert field.shape[-2:] == batch.completion_mask.shape
        torch.testing.assert_close(
            field[..., batch.completion_mask], torch.stack(expected[name], -1), atol=2e-5, rtol=0
        )
        assert not field[..., ~batch.completion_mask].any()
        assert field.std() > 0.05, "too flat for the comparison to mean anything"
    assert torch.equal(scores.logprobs, score_tokens(model.policy, batch, mask="loss").logprobs)


def loss_of(scores: ILQLScores) -> Tensor:
    weights = torch.linspace(-1.0, 2.0, steps=scores.values.numel(), dtype=torch.float64).view_as(scores.values)
    return (weights * (scores.logprobs + scores.q.prod(0) + scores.q_logprobs.sum(0) + scores.values.square())).sum()


@pytest.mark.parametrize("layout", ["shared", "plain"])
def test_gradients_are_those_of_full_projections(layout: str) -> None:
    model, twin = (ilql_model("gpt2", dtype=torch.float64) for _ in range(2))
    batch = batch_of(layout)
    loss_of(model(batch)).backward()
    full = {}
    for name, rows in by_hand(twin, GROUPS).items():
        values = torch.stack(rows, -1)
        full[name] = values.new_zeros(*values.shape[:-1], *batch.completion_mask.shape)
        full[name][..., batch.completion_mask] = values
    loss_of(ILQLScores(**full)).backward()
    for (name, ours), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert theirs.grad is not None and theirs.grad.any(), name
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-9, msg=name)


def test_the_vocabulary_is_projected_at_counted_tokens_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    import accord.models.ilql as module

    rows: list[int] = []
    project = module.token_logprobs

    def counted(hidden: Tensor, *rest: Any, **options: Any) -> Any:
        rows.append(len(hidden))
        return project(hidden, *rest, **options)

    monkeypatch.setattr(module, "token_logprobs", counted)
    model, batch = ilql_model(), batch_of("shared")
    with matrix_products(VOCABULARY) as wide:
        model(batch)
    number = int(batch.completion_mask.sum())
    assert rows == [number] * 3 and number < batch.input_ids.numel()
    assert wide == [number] * 3, "the policy and the two Q heads; the targets only look their tokens up"


@contextmanager
def matrix_products(width: int) -> Iterator[list[int]]:
    """Rows of every matrix product with `width` columns."""
    from torch.utils._python_dispatch import TorchDispatchMode

    found: list[int] = []

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            if func in {torch.ops.aten.mm.default, torch.ops.aten.addmm.default} and result.shape[-1] == width:
                found.append(result.shape[0])
            return result

    with Products():
        yield found


def test_a_fresh_model_says_0_of_everything_and_its_heads_depend_on_the_seed_alone() -> None:
    model = ilql_model(trained=False)
    scores = model(batch_of("plain"))
    for name in ("q", "target_q", "values"):
        assert not getattr(scores, name).any()
    mask = batch_of("plain").completion_mask
    uniform = torch.full((2, int(mask.sum())), -torch.log(torch.tensor(float(VOCABULARY))).item())
    torch.testing.assert_close(scores.q_logprobs[:, mask], uniform)
    torch.manual_seed(123)
    same, other = ilql_model(trained=False), ilql_model(seed=1, trained=False)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, same.state_dict()[name]), name
    firsts = [head.inner.weight for m in (model, other) for head in (*m.q_heads, m.value_head)]
    assert all(not torch.equal(a, b) for i, a in enumerate(firsts) for b in firsts[:i])
    assert firsts[0].std().item() == pytest.approx(33**-0.5, rel=0.05)


def test_building_a_model_draws_nothing_from_the_global_generator() -> None:
    policy = tiny_model("gpt2")
    before = torch.get_rng_state()
    ILQLModel(policy, seed=3)
    assert torch.equal(torch.get_rng_state(), before)


def test_heads_of_a_sixteen_bit_policy_are_float32() -> None:
    model = ilql_model("llama", dtype=torch.bfloat16)
    scores = model(batch_of("shared"))
    assert {tensor.dtype for tensor in (scores.q, scores.values, scores.target_q, scores.logprobs)} == {torch.float32}
    scores.q.sum().backward()
    assert model.q_heads[0].inner.weight.grad.dtype == torch.float32


# --- the targets -----------------------------------------------------------------------------------------------------


def test_targets_take_over_their_share_of_every_weight_and_the_heads_stay() -> None:
    model = ilql_model()
    q, before = (
        {name: tensor.clone() for name, tensor in heads.state_dict().items()}
        for heads in (model.q_heads, model.target_heads)
    )
    model.sync_targets(0.25)
    for name, target in model.target_heads.state_dict().items():
        torch.testing.assert_close(target, 0.75 * before[name] + 0.25 * q[name])
        assert torch.equal(model.q_heads.state_dict()[name], q[name])
    assert any(not torch.equal(before[name], q[name]) for name in q)
    model.sync_targets(1.0)
    assert all(torch.equal(target, q[name]) for name, target in model.target_heads.state_dict().items())


def test_no_optimiser_finds_the_targets_and_every_state_holds_them() -> None:
    model = ilql_model()
    assert not any("target" in name for name, _ in model.named_parameters())
    assert sum("target_heads" in name for name in model.state_dict()) == 8
    model(batch_of("plain")).target_q.sum()
    assert not model(batch_of("plain")).target_q.requires_grad


# --- files -----------------------------------------------------------------------------------------------------------


def saved(model: ILQLModel, folder: Path, beta: float = 2.5) -> Path:
    save_model(model.policy, word_tokenizer(), folder)
    save_heads(model, folder, beta=beta)
    return folder


def test_a_saved_model_comes_back_to_the_bit(tmp_path: Path) -> None:
    model = ilql_model()
    folder = saved(model, tmp_path / "model")
    loaded, beta = load_heads(load_policy(folder)[0], folder)
    assert beta == 2.5
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert {file.name for file in folder.iterdir()} >= {"model.safetensors", "ilql_heads.safetensors", "ilql.json"}
    assert not list(folder.glob(".*"))


def test_the_folder_is_a_plain_language_model_for_everybody_else(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = ilql_model()
    plain = AutoModelForCausalLM.from_pretrained(saved(model, tmp_path / "model"))
    ids = torch.tensor([[3, 4, 5]])
    assert torch.equal(plain(input_ids=ids).logits, model.policy(input_ids=ids).logits)


def test_a_folder_without_heads_or_with_those_of_another_model_is_refused(tmp_path: Path) -> None:
    folder = save_model(ilql_model().policy, word_tokenizer(), tmp_path / "plain")
    assert not has_heads(folder)
    with pytest.raises(ConfigError, match=r"holds no ilql_heads\.safetensors.*accord ilql"):
        load_heads(load_policy(folder)[0], folder)
    save_heads(ilql_model("gpt2", n_embd=16), folder, beta=1.0)
    assert has_heads(folder)
    with pytest.raises(ConfigError, match=r"do not fit the policy beside them \(width and vocabulary \(32, 53\)\)"):
        load_heads(load_policy(folder)[0], folder)


def test_heads_of_a_later_format_are_refused(tmp_path: Path) -> None:
    folder = saved(ilql_model(), tmp_path / "model")
    (folder / "ilql.json").write_text(json.dumps({"format": 2, "beta": 1.0}))
    with pytest.raises(ConfigError, match="do not fit"):
        load_heads(load_policy(folder)[0], folder)


# --- sampling --------------------------------------------------------------------------------------------------------

PROMPTS = [PromptTokens((5, 9, 2), 11), PromptTokens((7,), 12), PromptTokens((1, 8, 3, 4, 6, 9, 2, 30), 13)]
KEY = ("ilql", 0)


def samples(model: Any, **sampling: Any) -> Any:
    sampler = NativeSampler(model, pad_id=PAD_ID, max_batch_sequences=8)
    return sampler.generate(PROMPTS, 3, Sampling(6, stop_ids=(3, 4), **sampling), KEY)


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_beta_0_samples_what_the_policy_samples(architecture: str) -> None:
    """The same words; their log-probabilities up to rounding, for the sampler has a shorter step for a plain llama."""
    model = ilql_model(architecture)
    unshaped, own, shaped = samples(ShapedPolicy(model, 0.0)), samples(model.policy), samples(ShapedPolicy(model, 0.5))
    for ours, theirs in zip(unshaped, own, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            assert one.ids == other.ids
            assert one.logprobs == pytest.approx(other.logprobs, abs=1e-5)
    assert [[s.ids for s in group] for group in shaped] != [[s.ids for s in group] for group in own]


def test_a_fresh_model_shapes_nothing_whatever_beta() -> None:
    model = ilql_model(trained=False)
    shaped, plain = samples(ShapedPolicy(model, 100.0)), samples(model.policy)
    assert [[s.ids for s in group] for group in shaped] == [[s.ids for s in group] for group in plain]


def test_a_large_beta_takes_the_best_advantage_of_the_whole_vocabulary() -> None:
    model = ilql_model()
    for group, prompt in zip(samples(ShapedPolicy(model, 1e4)), PROMPTS, strict=True):
        for sample in group:
            ids = torch.tensor([prompt.ids + sample.ids])
            states = model.policy.base_model(input_ids=ids).last_hidden_state[0, len(prompt.ids) - 1 : -1]
            smaller = torch.stack([head(states) for head in model.target_heads]).amin(0)
            assert sample.ids == tuple(smaller.argmax(-1).tolist())
            assert sample.logprobs == pytest.approx([0.0] * len(sample.ids), abs=1e-4)


@pytest.mark.parametrize("beta", [0.0, 0.7])
def test_shaped_logits_follow_the_tokens_asked_for_with_and_without_a_cache(beta: float) -> None:
    model = ilql_model(dtype=torch.float64)
    shaped, ids = ShapedPolicy(model, beta), torch.tensor([[3, 4, 5, 6], [9, 8, 7, 6]])
    with torch.no_grad():
        whole = shaped(input_ids=ids).logits
        last = shaped(input_ids=ids, logits_to_keep=2).logits
        first = shaped(input_ids=ids[:, :3], use_cache=True)
        after = shaped(input_ids=ids[:, 3:], past_key_values=first.past_key_values, use_cache=True).logits
        q, values = model.action_values(model.policy.base_model(input_ids=ids).last_hidden_state)
        expected = model.policy(input_ids=ids).logits
    if beta:
        expected = expected.log_softmax(-1) + beta * (q.amin(0) - values[..., None])
    torch.testing.assert_close(whole, expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(last, expected[:, 2:], rtol=0, atol=1e-10)
    torch.testing.assert_close(after, expected[:, 3:], rtol=0, atol=1e-10)


@pytest.mark.parametrize("layout", ["shared", "plain"])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logprobs_of_a_batch_are_those_the_shaped_logits_give(layout: str, temperature: float) -> None:
    model, batch = ilql_model(dtype=torch.float64), batch_of(layout)
    shaped = ShapedPolicy(model, 0.7)
    found = shaped.logprobs(batch, batch.valid_mask, temperature=temperature)
    assert not found[~batch.valid_mask].any() and not found.requires_grad
    rows = [(group.prompt_ids, completion.ids) for group in GROUPS for completion in group.completions]
    for row, (prompt, ids) in zip(found, rows, strict=True):
        logits = shaped(input_ids=torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
        expected = (logits / temperature).log_softmax(-1)[range(len(ids)), ids]
        torch.testing.assert_close(row[: len(ids)], expected, rtol=0, atol=1e-10)
    loss = shaped.logprobs(batch, batch.completion_mask, temperature=temperature)
    torch.testing.assert_close(loss, torch.where(batch.completion_mask, found, 0.0))


def test_more_tokens_than_fit_at_once_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = ilql_model(dtype=torch.float64), batch_of("plain")
    whole = ShapedPolicy(model, 0.7).logprobs(batch, batch.valid_mask)
    monkeypatch.setattr("accord.models.ilql.SHAPED_AT_ONCE", 2)
    torch.testing.assert_close(ShapedPolicy(model, 0.7).logprobs(batch, batch.valid_mask), whole)


def test_sampled_logprobs_are_those_of_the_batch() -> None:
    shaped = ShapedPolicy(ilql_model("llama"), 0.5)
    groups = [
        TokenGroup(prompt.ids, (TokenCompletion(sample.ids, (True,) * len(sample.ids)),))
        for prompt, group in zip(PROMPTS, samples(shaped), strict=True)
        for sample in group
    ]
    batch = batch_of("plain", groups)
    found = shaped.logprobs(batch, batch.valid_mask)
    sampled = [sample.logprobs for group in samples(shaped) for sample in group]
    for row, logprobs in zip(found, sampled, strict=True):
        assert row[: len(logprobs)].tolist() == pytest.approx(logprobs, abs=1e-4)


def test_top_k_acts_after_the_shaping() -> None:
    """The policy prefers token 2, the advantages token 0: of the two likeliest AFTER shaping, 2 is not one. Logits of
    16 bits are shaped in 32: with ln(2 + e) = 1.551445, they are 4 - 1.551445, 2 - 1.551445 and 1 - 8 - 1.551445."""
    logits, q = torch.tensor([[0.0, 0.0, 1.0]], dtype=torch.bfloat16), torch.tensor([[[1.0, 0.5, -2.0]]] * 2)
    shaped = shaped_logits(logits, q, torch.tensor([0.0]), beta=4.0)
    assert shaped[0].tolist() == pytest.approx([2.448555, 0.448555, -8.551445], abs=1e-5)
    assert adjusted_logits(shaped, Sampling(1, top_k=2)).isfinite().tolist() == [[True, True, False]]
    assert adjusted_logits(logits, Sampling(1, top_k=1)).isfinite().tolist() == [[False, False, True]]


def test_sampling_leaves_mode_and_hooks_as_they_were() -> None:
    model = ilql_model()
    for mode in (False, True):
        model.policy.train(mode)
        samples(ShapedPolicy(model, 1.0))
        assert model.policy.training is mode
    assert not model.policy.base_model._forward_hooks


@pytest.mark.parametrize("beta", [-1.0, float("inf"), float("nan")])
def test_a_beta_that_means_nothing_is_refused(beta: float) -> None:
    with pytest.raises(ValueError, match="expected a finite number >= 0"):
        ShapedPolicy(ilql_model(), beta)
