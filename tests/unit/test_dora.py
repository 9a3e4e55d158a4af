"""DoRA, and ranks by name: the maths, and that everything adapters promise holds for them too."""

from __future__ import annotations

import copy
from math import sqrt
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from accord.config import SFTConfig, recipe_from
from accord.errors import ConfigError
from accord.models.adapters import (
    adapter_settings,
    adapters_off,
    add_adapter,
    fold_adapter,
    load_adapter,
    load_trainable_state,
    save_adapter,
    trainable_state,
)
from accord.models.layout import collate
from accord.models.load import reward_model_from, save_model, value_model_from
from accord.models.token_scores import score_completions, score_tokens
from accord.training.optim import Optimiser
from models_support import PAD_ID, tiny_model, token_group, word_tokenizer

GROUPS = [token_group("abc", "defg", "hi"), token_group("kl", "mnop", "qrstuv", "w")]
FAMILIES = ("llama", "qwen2", "gpt2")  # without biases, with them, with transposed weights
SHARED = collate(GROUPS, layout="shared", pad_id=PAD_ID)


def said(model: Any) -> Tensor:
    with torch.no_grad():
        return score_tokens(model, SHARED).logprobs


def scores(model: Any) -> Tensor:
    with torch.no_grad():
        return score_completions(model, SHARED)


def adapted(architecture: str, **settings: Any) -> Any:
    model = tiny_model(architecture, dtype=settings.pop("dtype", torch.float32))
    add_adapter(model, **({"rank": 4, "alpha": 8, "targets": (), "seed": 5, "kind": "dora"} | settings))
    return model


def train(model: Any, steps: int = 4) -> None:
    optimiser = Optimiser(model, SFTConfig.model_validate({}))
    for _ in range(steps):
        score_tokens(model, SHARED).logprobs.mean().backward()
        assert optimiser.update(0.02).applied


class Toy(nn.Module):
    """One linear layer where adapters look for a trunk and a causal language model."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.base_model = nn.Module()
        self.base_model.layer = layer
        self.config = {"model_type": "toy"}

    def get_output_embeddings(self) -> bool:
        return True


# --- the maths -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["linear", "transposed"])
def test_values_and_gradients_by_hand(kind: str) -> None:
    """W = [[3, 4], [0, 2]], so m = |W| = (5, 2). A = [1, 0], B = (1/2, 1), s = 2: s B A = [[1, 0], [2, 0]], and
    V = W + s B A = [[4, 4], [2, 2]] with |V| = (4 r, 2 r), r = sqrt 2. For x = (1, 1), V x = (8, 4):

        y = m V x / |V| = (10 / r, 2 r)

    and, |V| being a constant, the gradient of y1 + y2 is

        m: V x / |V| = (r, r)          B: m s (A x) / |V| = (5 / (2 r), r)
        A: s sum of m B / |V|, times x = 2 (5 / (8 r) + 1 / r) (1, 1) = 13 / (4 r) (1, 1)
    """
    r = sqrt(2)
    weight = torch.tensor([[3.0, 4.0], [0.0, 2.0]], dtype=torch.float64)
    layer: Any = nn.Linear(2, 2, bias=False) if kind == "linear" else Conv1D(2, 2)
    layer = layer.double()
    with torch.no_grad():
        layer.weight.copy_(weight if kind == "linear" else weight.t())
    toy: Any = Toy(layer)
    add_adapter(toy, rank=1, alpha=2, targets=(), seed=0, kind="dora")
    adapter = toy.base_model.layer
    a, b = adapter.lora_A.default.weight, adapter.lora_B.default.weight
    m = adapter.lora_magnitude_vector.default.weight
    torch.testing.assert_close(m.detach(), torch.tensor([5.0, 2.0], dtype=torch.float64))
    with torch.no_grad():
        a.copy_(torch.tensor([[1.0, 0.0]]))
        b.copy_(torch.tensor([[0.5], [1.0]]))
    y = adapter(torch.ones(2, dtype=torch.float64))
    y.sum().backward()
    found = [y.detach().flatten(), m.grad, b.grad.flatten(), a.grad.flatten()]
    expected = [(10 / r, 2 * r), (r, r), (5 / (2 * r), r), (13 / (4 * r), 13 / (4 * r))]
    for ours, by_hand in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, torch.tensor(by_hand, dtype=torch.float64), rtol=1e-12, atol=0)


@pytest.mark.parametrize("architecture", FAMILIES)
def test_a_model_and_its_gradients_are_those_of_the_plain_formula(architecture: str) -> None:
    """The oracle is the model without adapter whose weights are m (W + s B A) / |W + s B A|, in float64."""
    model = adapted(architecture, dtype=torch.float64, ranks={"c_attn": 2} if architecture == "gpt2" else {"q_proj": 2})
    train(model)
    oracle = tiny_model(architecture, dtype=torch.float64)
    leaves: dict[str, Tensor] = {}
    weights: dict[str, Tensor] = {}
    for name, layer in model.named_modules():
        if hasattr(layer, "lora_A"):
            a, b = layer.lora_A.default.weight, layer.lora_B.default.weight
            m = layer.lora_magnitude_vector.default.weight
            named = zip("abm", (a, b, m), strict=True)
            parts = {f"{name}.{part}": p.detach().clone().requires_grad_() for part, p in named}
            leaves |= parts
            a, b, m = parts.values()
            plain = oracle.get_submodule(name).weight.detach()
            changed = (plain.t() if architecture == "gpt2" else plain) + 2.0 * b @ a
            new = m[:, None] * changed / changed.detach().norm(dim=1, keepdim=True)
            weights[f"{name}.weight"] = new.t() if architecture == "gpt2" else new
    inside = [n for n, _ in model.named_parameters() if ".lora_" in n]
    assert len(leaves) == len(inside) > 12
    # the trunk alone, and the output embedding by hand
    ids = torch.tensor([[3, 4, 5, 6, 7, 8, 9]])

    def loss(hidden: Tensor) -> Tensor:
        return (hidden @ oracle.get_output_embeddings().weight.detach().t()).log_softmax(-1)[..., 11].sum()

    expected = torch.func.functional_call(oracle, weights, kwargs={"input_ids": ids, "output_hidden_states": True})
    theirs = loss(expected.hidden_states[-1])
    ours = loss(model(input_ids=ids, output_hidden_states=True).hidden_states[-1])
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    gradients = torch.autograd.grad(theirs, list(leaves.values()))
    ours.backward()
    for name, gradient in zip(leaves, gradients, strict=True):
        layer, part = model.get_submodule(name[:-2]), name[-1]
        found = {"a": layer.lora_A, "b": layer.lora_B, "m": layer.lora_magnitude_vector}[part].default.weight.grad
        torch.testing.assert_close(found, gradient, rtol=1e-8, atol=1e-9)
    fold_adapter(model)
    for name, weight in weights.items():
        torch.testing.assert_close(model.state_dict()[name], weight.detach(), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", FAMILIES)
def test_a_fresh_one_changes_no_bit_and_switched_off_none_ever(architecture: str, dtype: torch.dtype) -> None:
    """In 16 bits too, where lengths in the weights' own number format would not be those of the forward pass."""
    before, model = said(tiny_model(architecture, dtype=dtype)), adapted(architecture, dtype=dtype)
    assert torch.equal(said(model), before)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    train(model)
    assert float((said(model) - before).abs().max()) > 0.1
    with adapters_off(model):
        assert torch.equal(said(model), before)


# --- ranks by name ---------------------------------------------------------------------------------------------------


def test_ranks_by_name_and_the_longest_ending_counts() -> None:
    model = adapted("llama", kind="lora", ranks={"q_proj": 3, "o_proj": 2, "1.self_attn.q_proj": 5})
    layers = {name: m for name, m in model.named_modules() if hasattr(m, "lora_A")}
    ranks = {name.removeprefix("model.layers."): m.lora_A.default.weight.shape[0] for name, m in layers.items()}
    assert {m.scaling["default"] for m in layers.values()} == {2.0}
    assert ranks["0.self_attn.q_proj"] == 3 and ranks["1.self_attn.q_proj"] == 5
    assert {rank for name, rank in ranks.items() if name.endswith("o_proj")} == {2}
    assert {rank for name, rank in ranks.items() if not name.endswith(("q_proj", "o_proj"))} == {4}
    assert dict(adapter_settings(model).ranks)["model.layers.1.self_attn.q_proj"] == 5


@pytest.mark.parametrize(("targets", "wrong"), [((), "qproj"), (("k_proj",), "q_proj")])
def test_a_rank_for_a_layer_that_is_not_adapted_is_an_error(targets: tuple[str, ...], wrong: str) -> None:
    with pytest.raises(ConfigError, match=rf"`model.adapter.ranks`: '{wrong}' names no adapted layer of Llama.*k_proj"):
        adapted("llama", targets=targets, ranks={"k_proj": 2, wrong: 2})


def test_a_rank_outside_the_targets_is_a_contradiction_and_one_within_is_none() -> None:
    adapter = {"targets": ["q_proj", "mlp.up_proj"], "ranks": {"self_attn.q_proj": 2, "up_proj": 3}}
    recipe_from({"model": {"path": "quickstart", "adapter": adapter}})
    with pytest.raises(ConfigError, match=r"`model.adapter.ranks` names v_proj, which is no layer that"):
        recipe_from({"model": {"path": "quickstart", "adapter": adapter | {"ranks": {"v_proj": 2}}}})


# --- files, copies, checkpoints --------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", FAMILIES)
def test_peft_loads_it_to_the_bit_on_top_of_the_model_it_was_trained_on(architecture: str, tmp_path: Path) -> None:
    base = save_model(tiny_model(architecture), word_tokenizer(), tmp_path / "base")
    model = adapted(architecture, ranks={"c_proj": 2} if architecture == "gpt2" else {"down_proj": 2})
    train(model)
    save_adapter(model, tmp_path / "adapter", base=str(base))
    loaded = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert torch.equal(said(loaded.base_model.model), said(model))


@pytest.mark.parametrize("architecture", FAMILIES)
def test_a_reward_models_one_is_read_back_to_the_bit_and_its_settings_with_it(
    architecture: str, tmp_path: Path
) -> None:
    ranks = {"c_fc": 3} if architecture == "gpt2" else {"up_proj": 3}
    settings: dict[str, Any] = {"rank": 4, "alpha": 0.3, "targets": (), "kind": "dora", "ranks": ranks, "seed": 1}
    model = reward_model_from(tiny_model(architecture), seed=0)
    add_adapter(model, **settings)
    optimiser = Optimiser(model, SFTConfig.model_validate({}))
    for _ in range(3):
        score_completions(model, SHARED).sum().backward()
        assert optimiser.update(0.01).applied
    save_adapter(model, tmp_path / "adapter", base="base")
    loaded = reward_model_from(tiny_model(architecture), seed=9)
    load_adapter(loaded, tmp_path / "adapter")
    assert torch.equal(scores(loaded), scores(model))
    assert adapter_settings(loaded) == adapter_settings(model) == adapter_settings(tmp_path / "adapter")
    value = value_model_from(loaded, sharing=True)
    frozen = [{p.data_ptr() for p in m.parameters() if not p.requires_grad} for m in (loaded, value)]
    assert frozen[0] == frozen[1] and torch.equal(scores(value), scores(model))


def test_a_checkpoint_holds_the_lengths_too_and_training_goes_on_to_the_same_bits() -> None:
    model = adapted("llama")
    optimiser = Optimiser(model, SFTConfig.model_validate({}))

    def steps(model: Any, optimiser: Optimiser) -> None:
        for _ in range(2):
            score_tokens(model, SHARED).logprobs.mean().backward()
            optimiser.update(0.02)

    steps(model, optimiser)
    kept = copy.deepcopy((trainable_state(model), optimiser.tensors(), optimiser.counters()))
    assert sum("lora_magnitude_vector" in name for name in kept[0]) == 14
    steps(model, optimiser)
    other = adapted("llama", seed=77)
    load_trainable_state(other, kept[0])
    restored = Optimiser(other, SFTConfig.model_validate({}))
    restored.restore(*kept[1:])
    steps(other, restored)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))
