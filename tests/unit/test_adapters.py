"""Adapters: nothing changes until they train, only they train, and without them the model is what it was."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from accord.config import SFTConfig
from accord.errors import ConfigError, TrainingError
from accord.models.adapters import (
    adapters_off,
    add_adapter,
    fold_adapter,
    has_adapter,
    load_trainable_state,
    save_adapter,
    trainable_state,
)
from accord.models.ilql import ILQLModel
from accord.models.layout import Layout, collate
from accord.models.load import (
    fresh_value_model,
    load_policy,
    load_reward_model,
    reward_model_from,
    save_model,
    value_model_from,
)
from accord.models.token_scores import score_completions, score_tokens
from accord.training.optim import Optimiser
from models_support import ARCHITECTURES, PAD_ID, tiny_model, token_group, word_tokenizer

LAYOUTS: tuple[Layout, ...] = ("plain", "shared")
GROUPS = [token_group("abc", "defg", "hi"), token_group("kl", "mnop", "qrstuv", "w")]
FAMILIES = ("llama", "qwen2", "gpt2")


def logprobs(model: Any, layout: Layout = "plain") -> Tensor:
    return score_tokens(model, collate(GROUPS, layout=layout, pad_id=PAD_ID)).logprobs


def said(model: Any, layout: Layout = "plain") -> Tensor:
    with torch.no_grad():
        return logprobs(model, layout)


def adapted(architecture: str, seed: int = 5, **changes: Any) -> Any:
    model = tiny_model(architecture, **changes)
    add_adapter(model, rank=4, alpha=8, targets=(), seed=seed)
    return model


def train(model: Any, steps: int = 5) -> None:
    """Lets the model forget what it says of `GROUPS`, fast."""
    optimiser = Optimiser(model, SFTConfig.model_validate({}))
    for _ in range(steps):
        logprobs(model).mean().backward()
        assert optimiser.update(0.02).applied


def merged(model: Any) -> Any:
    """A plain copy; the model itself is left as it is, to be compared with."""
    plain = copy.deepcopy(model)
    fold_adapter(plain)
    return plain


def adapter_names(model: Any) -> set[str]:
    return {name for name, _ in model.named_parameters() if ".lora_A." in name or ".lora_B." in name}


# --- a fresh adapter -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_fresh_adapter_changes_no_bit(architecture: str, layout: Layout) -> None:
    model = tiny_model(architecture)
    before, kind = said(model, layout), type(model)
    add_adapter(model, rank=4, alpha=8, targets=(), seed=0)
    assert type(model) is kind and has_adapter(model)
    assert torch.equal(said(model, layout), before)


def test_a_fresh_adapter_depends_on_its_seed_alone() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = trainable_state(adapted("llama", seed=5))
    assert torch.equal(torch.get_rng_state(), before), "the global generator was touched"
    torch.manual_seed(2)
    again, other = trainable_state(adapted("llama", seed=5)), trainable_state(adapted("llama", seed=6))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert all(torch.equal(first[name], other[name]) == (".lora_B." in name) for name in first)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gradient_reaches_every_matrix_of_the_adapter_and_nothing_else(architecture: str) -> None:
    model = adapted(architecture)
    train(model, steps=1)  # B is zero at first, and then A's gradient is zero too
    logprobs(model, "shared").sum().backward()
    moved = {name for name, p in model.named_parameters() if p.grad is not None and bool((p.grad != 0).any())}
    assert moved == adapter_names(model) == {name for name, p in model.named_parameters() if p.requires_grad}


def test_rank_and_alpha_are_those_of_the_formula() -> None:
    """W' = W + (alpha / rank) B A, computed here; GPT-2 keeps its weights transposed."""
    for architecture, name in (("llama", "model.layers.1.mlp.up_proj"), ("gpt2", "transformer.h.1.mlp.c_fc")):
        model = tiny_model(architecture)
        add_adapter(model, rank=2, alpha=3.5, targets=(), seed=0)
        train(model)
        weights = model.state_dict()
        a, b = weights[f"{name}.lora_A.default.weight"], weights[f"{name}.lora_B.default.weight"]
        before = weights[f"{name}.base_layer.weight"]
        assert a.shape[0] == b.shape[1] == 2
        change = 1.75 * b @ a
        expected = before + (change.t() if architecture == "gpt2" else change)
        found = merged(model).get_submodule(name).weight
        assert float((expected - before).abs().max()) > 1e-3
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_weights_of_an_adapter_are_float32_in_a_16_bit_model_too() -> None:
    model = tiny_model("llama", dtype=torch.bfloat16)
    before = said(model)
    add_adapter(model, rank=4, alpha=8, targets=(), seed=0)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert torch.equal(said(model), before)
    train(model)
    assert not torch.equal(said(model), before)
    assert {p.dtype for p in merged(model).parameters()} == {torch.bfloat16}


# --- what is adapted -------------------------------------------------------------------------------------------------


def test_all_linear_layers_of_the_trunk_are_adapted_but_no_output_embedding_and_no_head() -> None:
    """Tied embeddings make the output embedding the input embedding: adapting one would tear them apart."""
    for tied in (True, False):
        names = adapter_names(adapted("llama", tie_word_embeddings=tied))
        assert {name.split(".")[-4] for name in names} == {
            "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
        }  # fmt: skip
        assert len(names) == 2 * 7 * 2
    assert {name.split(".")[-4] for name in adapter_names(adapted("gpt2"))} == {"c_attn", "c_proj", "c_fc"}
    reward_model = reward_model_from(tiny_model("llama"), seed=0)
    add_adapter(reward_model, rank=4, alpha=8, targets=(), seed=0)
    assert not [name for name in adapter_names(reward_model) if "score" in name]


def test_targets_are_the_last_parts_of_names() -> None:
    model = tiny_model("llama")
    add_adapter(model, rank=4, alpha=8, targets=["q_proj", "mlp.up_proj"], seed=0)
    assert {name.rpartition(".lora_")[0] for name in adapter_names(model)} == {
        f"model.layers.{layer}.{name}" for layer in (0, 1) for name in ("self_attn.q_proj", "mlp.up_proj")
    }


@pytest.mark.parametrize("target", ["lm_head", "_proj", "layers", "q-proj"])
def test_a_target_that_is_no_linear_layer_of_the_trunk_is_an_error_that_names_those_there_are(target: str) -> None:
    with pytest.raises(ConfigError, match=rf"'{target}' names no linear layer of LlamaForCausalLM.*down_proj, gate"):
        add_adapter(tiny_model("llama"), rank=4, alpha=8, targets=["q_proj", target], seed=0)


def test_a_model_that_peft_cannot_adapt_is_an_error_that_names_it() -> None:
    with pytest.raises(ConfigError, match="no adapter can be put into MambaForCausalLM"):
        adapted("mamba")


# --- the reference ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("architecture", FAMILIES)
def test_without_its_adapter_the_model_is_what_it_was_before_and_after_training(
    architecture: str, layout: Layout
) -> None:
    plain = tiny_model(architecture)
    model = adapted(architecture)
    before = said(plain, layout)
    for _ in range(3):
        with adapters_off(model):
            assert torch.equal(said(model, layout), before)
        train(model, steps=2)
        assert float((said(model, layout) - before).abs().max()) > 0.1


def test_the_reference_may_be_asked_between_a_forward_pass_and_its_backward_pass() -> None:
    """The switch must not cut the graph of a loss that is already there."""
    model, other = adapted("llama"), adapted("llama")
    for each in (model, other):
        loss = logprobs(each).mean()
        if each is model:
            with adapters_off(model):
                said(model)
        loss.backward()
    gradients = {name: p.grad for name, p in other.named_parameters() if p.requires_grad}
    assert gradients
    assert all(torch.equal(p.grad, gradients[n]) for n, p in model.named_parameters() if p.requires_grad)


def test_the_switch_turns_back_after_an_error_and_may_be_nested() -> None:
    model = adapted("llama")
    train(model)
    on = said(model)
    with pytest.raises(RuntimeError), adapters_off(model):
        raise RuntimeError
    assert torch.equal(said(model), on)
    with adapters_off(model):
        off = said(model)
        with adapters_off(model):
            assert torch.equal(said(model), off)
        assert torch.equal(said(model), off)
    assert torch.equal(said(model), on) and not torch.equal(off, on)
    assert {p.requires_grad for n, p in model.named_parameters() if n in adapter_names(model)} == {True}


def test_the_switch_of_a_model_without_adapter_does_nothing() -> None:
    model = tiny_model("llama")
    before = said(model)
    with adapters_off(model):
        assert torch.equal(said(model), before)
    assert not has_adapter(model)


# --- the merged model ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_merged_model_says_what_the_adapted_one_says(architecture: str) -> None:
    model = adapted(architecture, dtype=torch.float64)
    train(model)
    assert float((said(model) - said(tiny_model(architecture, dtype=torch.float64))).abs().max()) > 0.1
    torch.testing.assert_close(said(merged(model)), said(model), rtol=0, atol=1e-5)


def test_folding_gives_a_plain_model_in_the_memory_of_the_adapted_one() -> None:
    model = adapted("gpt2")
    train(model)
    places = {p.data_ptr() for name, p in model.named_parameters() if ".lora_" not in name}
    fold_adapter(model)
    assert not has_adapter(model)
    assert model.state_dict().keys() == tiny_model("gpt2").state_dict().keys()
    assert {p.data_ptr() for p in model.parameters()} == places
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


@pytest.mark.parametrize("architecture", FAMILIES)
def test_a_merged_model_is_saved_and_loaded_like_any_other(architecture: str, tmp_path: Path) -> None:
    model = adapted(architecture)
    train(model)
    save_model(merged(model), word_tokenizer(), tmp_path / "model")
    loaded, _ = load_policy(tmp_path / "model")
    assert sorted(p.name for p in (tmp_path / "model").glob("adapter*")) == []
    torch.testing.assert_close(said(loaded), said(model), rtol=1e-5, atol=1e-5)


# --- models with a scalar head ---------------------------------------------------------------------------------------


def scores(model: Any) -> Tensor:
    with torch.no_grad():
        return score_completions(model, collate(GROUPS, layout="shared", pad_id=PAD_ID))


def train_scores(model: Any) -> None:
    optimiser = Optimiser(model, SFTConfig.model_validate({}))
    for _ in range(3):
        score_completions(model, collate(GROUPS, layout="shared", pad_id=PAD_ID)).sum().backward()
        assert optimiser.update(0.01).applied


@pytest.mark.parametrize("architecture", FAMILIES)
def test_a_reward_model_trains_its_adapter_and_its_head(architecture: str, tmp_path: Path) -> None:
    model = reward_model_from(tiny_model(architecture), seed=0)
    before = scores(model)
    add_adapter(model, rank=4, alpha=8, targets=(), seed=0)
    assert torch.equal(scores(model), before)
    assert trainable_state(model).keys() == adapter_names(model) | {"score.weight"}
    train_scores(model)
    save_model(merged(model), word_tokenizer(), tmp_path / "model")
    loaded, _ = load_reward_model(tmp_path / "model")
    assert float((scores(model) - before).abs().max()) > 0.1
    torch.testing.assert_close(scores(loaded), scores(model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("architecture", FAMILIES)
def test_a_reward_model_of_an_adapted_policy_is_that_of_the_policy_without_adapter(architecture: str) -> None:
    policy = adapted(architecture)
    train(policy)
    model = reward_model_from(policy, seed=3)
    assert not has_adapter(model)
    assert torch.equal(scores(model), scores(reward_model_from(tiny_model(architecture), seed=3)))


def test_a_value_model_that_shares_the_reward_models_weights_learns_without_changing_its_scores() -> None:
    reward_model = reward_model_from(tiny_model("gpt2"), seed=0).requires_grad_(False)
    reward_model.score.requires_grad_(True)
    value_model = value_model_from(reward_model, sharing=True)
    add_adapter(value_model, rank=4, alpha=8, targets=(), seed=0)
    before = scores(reward_model)
    assert torch.equal(scores(value_model), before)
    train_scores(value_model)
    assert torch.equal(scores(reward_model), before)
    assert float((scores(value_model) - before).abs().max()) > 0.1
    addresses = [
        {p.data_ptr() for p in m.base_model.parameters() if not p.requires_grad} for m in (reward_model, value_model)
    ]
    assert addresses[0] == addresses[1] != set()
    assert reward_model.score.weight.data_ptr() != value_model.score.weight.data_ptr()


def test_a_fresh_value_model_of_an_adapted_policy_shares_its_weights_and_neither_moves_the_other() -> None:
    policy = adapted("llama")
    value_model = fresh_value_model(policy)
    add_adapter(value_model, rank=4, alpha=8, targets=(), seed=0)
    trunk = value_model.base_model.embed_tokens.weight
    assert trunk.data_ptr() == policy.base_model.embed_tokens.weight.data_ptr() and not trunk.requires_grad
    said_before = said(policy)
    train_scores(value_model)
    assert torch.equal(said(policy), said_before)
    scores_before = scores(value_model)
    train(policy)
    assert torch.equal(scores(value_model), scores_before)
    assert float(scores_before.abs().max()) > 0


# --- peft's own format -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", FAMILIES)
def test_peft_loads_a_policys_adapter_on_top_of_the_model_it_was_trained_on(architecture: str, tmp_path: Path) -> None:
    base = save_model(tiny_model(architecture), word_tokenizer(), tmp_path / "base")
    model = adapted(architecture)
    train(model)
    save_adapter(model, tmp_path / "adapter", base=str(base))
    assert sorted(p.name for p in (tmp_path / "adapter").glob("adapter*")) == [
        "adapter_config.json", "adapter_model.safetensors",
    ]  # fmt: skip
    loaded = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert torch.equal(said(loaded.base_model.model), said(model))
    assert float((said(model) - said(load_policy(base)[0])).abs().max()) > 0.1


@pytest.mark.parametrize("architecture", FAMILIES)
def test_peft_loads_a_reward_models_adapter_with_its_head(architecture: str, tmp_path: Path) -> None:
    base = save_model(tiny_model(architecture), word_tokenizer(), tmp_path / "base")
    model = reward_model_from(tiny_model(architecture), seed=0)
    add_adapter(model, rank=4, alpha=8, targets=(), seed=0)
    train_scores(model)
    save_adapter(model, tmp_path / "adapter", base=str(base))
    plain = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1).eval()
    loaded = peft.PeftModel.from_pretrained(plain, tmp_path / "adapter")
    inputs = torch.tensor([[3, 4, 5]])
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=inputs).logits, model(input_ids=inputs).logits)


def test_an_adapter_without_its_model_is_refused_and_so_is_a_model_with_one_beside_it(tmp_path: Path) -> None:
    """transformers would put the adapter in, and training would go on with it."""
    save_adapter(adapted("llama"), tmp_path / "adapter", base="base")
    with pytest.raises(ConfigError, match="name the folder `model`"):
        load_policy(tmp_path / "adapter")
    both = save_model(tiny_model("llama"), word_tokenizer(), tmp_path / "both")
    for file in (tmp_path / "adapter").iterdir():
        shutil.copy(file, both)
    with pytest.raises(ConfigError, match="holds an adapter"):
        load_policy(both)


def test_the_files_of_an_adapter_are_equal_in_every_process(tmp_path: Path) -> None:
    """A set of texts has another order in every process; here it is given another order."""
    model = adapted("llama")
    save_adapter(model, tmp_path / "first", base="base")
    config = model.peft_config["default"]
    config.target_modules = list(config.target_modules)[::-1]
    save_adapter(model, tmp_path / "second", base="base")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


# --- what a checkpoint holds -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", FAMILIES)
def test_when_everything_trains_everything_is_kept_under_every_name(architecture: str) -> None:
    model = tiny_model(architecture, tie_word_embeddings=True)
    state = trainable_state(model)
    assert state.keys() == model.state_dict().keys() and "lm_head.weight" in state
    kept = copy.deepcopy(state)
    train(model)
    load_trainable_state(model, kept)
    assert torch.equal(said(model), said(tiny_model(architecture, tie_word_embeddings=True)))


@pytest.mark.parametrize("architecture", FAMILIES)
def test_with_an_adapter_the_adapter_alone_is_kept_and_brings_the_model_back(architecture: str) -> None:
    model = adapted(architecture)
    train(model)
    kept, trained = copy.deepcopy(trainable_state(model)), said(model)
    assert kept.keys() == adapter_names(model)
    fresh = adapted(architecture, seed=77)
    load_trainable_state(fresh, kept)
    assert torch.equal(said(fresh), trained)


def test_what_stands_beside_a_frozen_trunk_is_kept_whether_it_is_trained_or_moved_otherwise() -> None:
    """ILQL's target heads are no parameters, and lag behind those that are."""
    model = ILQLModel(adapted("llama"), seed=0)
    others = {name for name in trainable_state(model) if ".lora_" not in name}
    assert {name.partition(".")[0] for name in others} == {"q_heads", "target_heads", "value_head"}
    assert others == {name for name in model.state_dict() if not name.startswith("policy.")}


def test_tensors_of_another_training_are_refused() -> None:
    plain, model = tiny_model("llama"), adapted("llama")
    for receiver, tensors in ((plain, trainable_state(model)), (model, trainable_state(plain)), (model, {})):
        with pytest.raises(TrainingError, match="delete the stage's folder"):
            load_trainable_state(receiver, tensors)
