"""A trunk in 4 bits: the numbers are NF4's, the gradients those of the weights they stand for, and what adapters
promise holds on it too."""

from __future__ import annotations

import copy
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from accord.config import SFTConfig, recipe_from
from accord.errors import ConfigError
from accord.methods.reference import _identity
from accord.models import extras
from accord.models.adapters import (
    adapters_off,
    add_adapter,
    fold_adapter,
    has_adapter,
    load_adapter,
    load_trainable_state,
    save_adapter,
    trainable_state,
)
from accord.models.layout import collate
from accord.models.load import fresh_value_model, load_policy, reward_model_from, save_model, value_model_from
from accord.models.quantise import dequantise, is_quantised, quantise, quantised_weight
from accord.models.self_check import check_layouts
from accord.models.sharing import sharing_copy
from accord.models.token_scores import score_completions, score_tokens
from accord.training.optim import Optimiser
from models_support import PAD_ID, tiny_model, token_group, word_tokenizer

needs_bitsandbytes = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")

GROUPS = [token_group("abc", "defg", "hi"), token_group("kl", "mnop", "qrstuv", "w")]
SHARED = collate(GROUPS, layout="shared", pad_id=PAD_ID)
# Table of the paper's appendix E.
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


def said(model: Any) -> Tensor:
    with torch.no_grad():
        return score_tokens(model, SHARED).logprobs


def scores(model: Any) -> Tensor:
    with torch.no_grad():
        return score_completions(model, SHARED)


def quantised(architecture: str = "llama", *, kind: Any = None, seed: int = 5) -> Any:
    model = tiny_model(architecture)
    quantise(model)
    if kind is not None:
        add_adapter(model, rank=4, alpha=8, targets=(), seed=seed, kind=kind)
    return model


def train(model: Any, optimiser: Optimiser | None = None, steps: int = 3) -> None:
    optimiser = optimiser or Optimiser(model, SFTConfig.model_validate({}))
    for _ in range(steps):
        score_tokens(model, SHARED).logprobs.mean().backward()
        assert optimiser.update(0.02).applied


@needs_bitsandbytes
def test_weights_are_the_nearest_of_nf4s_values_times_their_blocks_scale() -> None:
    """The scales are themselves of 8 bits, hence a little off; the block's largest weight says which scale was used."""
    plain, model = tiny_model("llama"), quantised()
    code = torch.tensor(NF4)
    for name in ("layers.0.self_attn.q_proj", "layers.1.mlp.down_proj"):
        before = plain.base_model.get_submodule(name).weight.detach().reshape(-1, 64)
        after = quantised_weight(model.base_model.get_submodule(name)).reshape(-1, 64)
        scale, ours = before.abs().amax(1, keepdim=True), after.abs().amax(1, keepdim=True)
        torch.testing.assert_close(ours, scale, rtol=0.02, atol=0)
        nearest = (before / scale).unsqueeze(-1).sub(code).abs().argmin(-1)
        torch.testing.assert_close(after / ours, code[nearest], rtol=1e-6, atol=1e-6)


@needs_bitsandbytes
def test_the_trunks_linear_layers_are_quantised_alike_every_time_and_nothing_else_is() -> None:
    model, plain = quantised(), tiny_model("llama")
    names = {name.rpartition(".")[2] for name, m in model.named_modules() if type(m).__name__ == "Linear4bit"}
    assert names == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    state, again, before = model.state_dict(), quantised().state_dict(), plain.state_dict()
    assert all(torch.equal(state[name], again[name]) for name in state)
    whole = [name for name in before if "_proj" not in name]
    assert len(whole) > 5 and all(torch.equal(state[name], before[name]) for name in whole)
    assert 0.01 < float((said(model) - said(plain)).abs().max())
    assert check_layouts(model, GROUPS, PAD_ID).layout == "shared"


@needs_bitsandbytes
@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_values_and_gradients_are_those_of_the_weights_they_stand_for(architecture: str, kind: Any) -> None:
    model, oracle = quantised(architecture), quantised(architecture)
    dequantise(oracle)
    assert not is_quantised(oracle)
    for each in (model, oracle):
        add_adapter(each, rank=4, alpha=8, targets=(), seed=5, kind=kind)
        with torch.no_grad():
            generator = torch.Generator().manual_seed(1)
            for parameter in (p for p in each.parameters() if p.requires_grad):
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
        score_tokens(each, SHARED).logprobs.sum().backward()
    torch.testing.assert_close(said(model), said(oracle), rtol=1e-4, atol=1e-4)
    theirs = {name: p.grad for name, p in oracle.named_parameters() if p.requires_grad}
    ours = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert ours.keys() == theirs.keys() != set()
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-3, atol=1e-3)


@needs_bitsandbytes
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_a_fresh_adapter_changes_no_bit_and_the_reference_never_moves(kind: Any) -> None:
    before, model = said(quantised()), quantised(kind=kind)
    assert torch.equal(said(model), before)
    train(model)
    assert float((said(model) - before).abs().max()) > 0.1
    with adapters_off(model):
        assert torch.equal(said(model), before)


@needs_bitsandbytes
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_folding_gives_a_plain_model_that_says_the_same_and_is_saved_like_any_other(kind: Any, tmp_path: Path) -> None:
    model = quantised("qwen2", kind=kind)
    train(model)
    trained = said(model)
    fold_adapter(model)
    assert not has_adapter(model) and not is_quantised(model)
    assert model.state_dict().keys() == tiny_model("qwen2").state_dict().keys()
    torch.testing.assert_close(said(model), trained, rtol=1e-4, atol=1e-4)
    save_model(model, word_tokenizer(), tmp_path / "model")
    assert torch.equal(said(load_policy(tmp_path / "model")[0]), said(model))


@needs_bitsandbytes
def test_a_checkpoint_holds_the_adapter_alone_and_training_goes_on_to_the_same_bits() -> None:
    model = quantised(kind="lora")
    optimiser = Optimiser(model, SFTConfig.model_validate({}))
    train(model, optimiser, 2)
    state, moments, counters = copy.deepcopy((trainable_state(model), optimiser.tensors(), optimiser.counters()))
    assert state.keys() == {name for name, _ in model.named_parameters() if ".lora_" in name}
    train(model, optimiser, 2)
    other = quantised(kind="lora", seed=77)
    load_trainable_state(other, state)
    restored = Optimiser(other, SFTConfig.model_validate({}))
    restored.restore(moments, counters)
    train(other, restored, 2)
    assert torch.equal(said(other), said(model))


@needs_bitsandbytes
def test_all_roles_share_the_quantised_weights(tmp_path: Path) -> None:
    policy = quantised(kind="lora")
    reward_model = reward_model_from(policy, seed=3)
    add_adapter(reward_model, rank=4, alpha=8, targets=(), seed=1)
    save_adapter(reward_model, tmp_path / "adapter", base="base")
    read = reward_model_from(policy, seed=4)
    load_adapter(read, tmp_path / "adapter")
    assert torch.equal(scores(read), scores(reward_model))
    value, fresh = value_model_from(read, sharing=True), fresh_value_model(policy)
    trunks = [
        {p.data_ptr() for name, p in m.named_parameters() if not p.requires_grad and "_proj" in name}
        for m in (policy, reward_model, read, value, sharing_copy(policy))
    ]
    assert len(trunks[0]) == 14 and all(trunk == trunks[0] for trunk in trunks)
    assert {id(m.weight.quant_state) for m in policy.modules() if hasattr(m, "quant_state")} == {
        id(m.weight.quant_state) for m in fresh.modules() if hasattr(m, "quant_state")
    }


@needs_bitsandbytes
def test_reference_numbers_of_a_quantised_model_are_kept_apart() -> None:
    assert _identity(quantised(), "w") != _identity(tiny_model("llama"), "w")


@needs_bitsandbytes
def test_a_model_without_linear_layers_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"`model.quantise`: GPT2LMHeadModel keeps its weights in other layers"):
        quantise(tiny_model("gpt2"))


def test_without_an_adapter_it_is_a_contradiction_and_without_the_package_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(ConfigError, match=r"`model.quantise` = nf4 needs `model.adapter`"):
        recipe_from({"model": {"path": "quickstart", "quantise": "nf4"}})
    recipe_from({"model": {"path": "quickstart", "quantise": "nf4", "adapter": {}}})
    monkeypatch.setattr(extras, "find_spec", lambda name: None)
    with pytest.raises(
        ConfigError, match=r"`model.quantise` needs bitsandbytes, .* pip install 'accord-rlhf\[quant\]'"
    ):
        quantise(tiny_model("llama"))
