"""The roles of an online stage on shared weights: the reference stays the initial policy, bit for bit, and what is
shared is one tensor."""

from __future__ import annotations

import copy
import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from accord.config import RLOOConfig, SFTConfig, recipe_from
from accord.data.templates import Template
from accord.errors import ConfigError
from accord.methods import learners
from accord.methods.context import Context, LoadedPolicy, adapt, save_trained, weights_hash
from accord.methods.corpus import Corpus
from accord.methods.online_trainer import OnlineTrainer
from accord.methods.reward_models import reward_model_beside, value_model_beside
from accord.methods.roles import rollout_models
from accord.models.adapters import adapters_off, add_adapter, has_adapter, load_trainable_state, trainable_state
from accord.models.blocks import train_top_blocks
from accord.models.layout import Layout, collate
from accord.models.load import fresh_value_model, load_policy, load_reward_model, reward_model_from, save_model
from accord.models.sharing import share_equal, sharing_copy
from accord.models.token_scores import score_completions, score_tokens, score_values
from accord.rewards.scorers import FunctionScorer
from accord.training.optim import Optimiser
from accord.training.runfolder import RunFolder
from models_support import ARCHITECTURES, PAD_ID, tiny_model, token_group, word_tokenizer
from online_support import prompts, uneven

GROUPS = [token_group("abc", "defg", "hi"), token_group("kl", "mnop", "qrstuv", "w")]
LAYOUTS: tuple[Layout, ...] = ("plain", "shared")
NUM_BLOCKS = 3


def model_of(kind: str, *, tied: bool = True, **changes: Any) -> Any:
    return tiny_model(kind, num_hidden_layers=NUM_BLOCKS, tie_word_embeddings=tied, **changes)


def said(model: Any, layout: Layout = "plain") -> Tensor:
    with torch.no_grad():
        return score_tokens(model, collate(GROUPS, layout=layout, pad_id=PAD_ID)).logprobs


def scores(model: Any) -> Tensor:
    with torch.no_grad():
        return score_completions(model, collate(GROUPS, layout="plain", pad_id=PAD_ID))


def values(model: Any) -> Tensor:
    with torch.no_grad():
        return score_values(model, collate(GROUPS, layout="plain", pad_id=PAD_ID))


def train(model: Any, steps: int = 4) -> None:
    optimiser = Optimiser(model, SFTConfig.model_validate({}))
    for _ in range(steps):
        score_tokens(model, collate(GROUPS, layout="plain", pad_id=PAD_ID)).logprobs.mean().backward()
        assert optimiser.update(0.02).applied


def context_of(folder: Path, **model: Any) -> tuple[Context, io.StringIO]:
    screen = io.StringIO()
    recipe = recipe_from({"model": {"path": "quickstart", **model}, "sft": {}, "out": str(folder)})
    return Context(recipe, Corpus(), Console(file=screen, width=1000)), screen


def places(model: Any) -> set[int]:
    return {p.data_ptr() for p in model.parameters()}


# --- the reference ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("count", range(1, NUM_BLOCKS + 1))
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_reference_is_the_initial_policy_before_and_after_training_the_top_blocks(
    kind: str, count: int, tied: bool
) -> None:
    """For every number of blocks, tied embeddings or not: trlX's reference skipped a block at one end and drifted with
    the embeddings at the other."""
    policy = model_of(kind, tied=tied)
    train_top_blocks(policy, count)
    before = {layout: said(policy, layout) for layout in LAYOUTS}
    reference = sharing_copy(policy).requires_grad_(False)
    for _ in range(2):
        assert all(torch.equal(said(reference, layout), before[layout]) for layout in LAYOUTS)
        train(policy)
        assert float((said(policy) - before["plain"]).abs().max()) > 0.1
    assert all(torch.equal(said(reference, layout), before[layout]) for layout in LAYOUTS)


@pytest.mark.parametrize("layout", ["separate", "hydra", "lora"])
def test_the_reference_of_a_stage_is_the_initial_policy_after_its_steps(layout: str, tmp_path: Path) -> None:
    """Through the roles and the trainer of an online stage: `ref_logprobs` of a batch before and after training."""
    settings = {"separate": {}, "hydra": {"trainable_blocks": 1}, "lora": {"adapter": {"rank": 4}}}[layout]
    context, _ = context_of(tmp_path, **settings)
    policy = LoadedPolicy(model_of("llama"), Template.of(word_tokenizer(), "auto"), tmp_path)
    before = said(policy.model)
    adapt(context, policy.model, "rloo")
    fields = {"prompts_per_step": 2, "samples_per_prompt": 3, "episodes": 18, "max_new_tokens": 6, "kl_coef": 0.1}
    section = RLOOConfig(**fields, learning_rate=0.02, schedule="constant", minibatches=2)
    some = prompts()
    scorer = FunctionScorer(uneven, "the test's reward")
    models = rollout_models(context, section, policy, scorer, None, [t for _, t in some])
    trainer = OnlineTrainer("rloo", models, some, section, learners.rloo(section), 0)
    for step in (1, 2, 3):
        with adapters_off(models.reference):
            assert torch.equal(said(models.reference), before)
        trainer.step(step)
    with adapters_off(models.reference):
        assert torch.equal(said(models.reference), before)
    assert float((said(policy.model) - before).abs().max()) > 0.01
    own = places(models.reference) - places(policy.model)
    assert len(own) == {"separate": len(places(policy.model)), "hydra": 10, "lora": 0}[layout]


# --- what is trained -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_top_blocks_and_what_runs_after_them_are_trained_and_nothing_else(architecture: str) -> None:
    model = tiny_model(architecture)
    train_top_blocks(model, 1)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    parts = {next((n for n in name.split(".") if n.isdigit()), name.rpartition(".")[0]) for name in trained}
    norms = parts - {"1"}
    assert parts - norms == {"1"} and all("norm" in name or "ln_f" in name or "project_out" in name for name in norms)
    assert norms, "the final norm"
    score_tokens(model, collate(GROUPS, layout="plain", pad_id=PAD_ID)).logprobs.sum().backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == trained
    assert trainable_state(model).keys() == trained


@pytest.mark.parametrize("count", [0, NUM_BLOCKS + 1])
def test_a_number_of_blocks_the_model_has_not_is_refused(count: int) -> None:
    with pytest.raises(ConfigError, match=f"= {count}: LlamaForCausalLM has 3 blocks; choose 1 to 3"):
        train_top_blocks(model_of("llama"), count)


def test_a_model_whose_blocks_cannot_be_told_is_refused_by_name() -> None:
    model = model_of("llama")
    model.config.num_hidden_layers = 7
    with pytest.raises(ConfigError, match="LlamaForCausalLM has 0 lists of 7 blocks in its trunk, expected one"):
        train_top_blocks(model, 1)


def test_blocks_and_adapters_are_a_contradiction_and_so_are_more_blocks_than_there_are(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"`model.adapter` and `model.trainable_blocks` are both set"):
        context_of(tmp_path, adapter={}, trainable_blocks=1)
    with pytest.raises(ConfigError, match=r"trainable_blocks"):
        context_of(tmp_path, trainable_blocks=0)
    scratch = {"path": None, "scratch": {"layers": 2}, "trainable_blocks": 3}
    with pytest.raises(ConfigError, match=r"= 3 is more than `model.scratch.layers` = 2"):
        context_of(tmp_path, **scratch)


def test_what_was_trained_is_put_back_into_a_model_that_was_loaded_anew() -> None:
    model, again = model_of("gpt2"), model_of("gpt2")
    for each in (model, again):
        train_top_blocks(each, 2)
    train(model)
    load_trainable_state(again, {name: tensor.clone() for name, tensor in trainable_state(model).items()})
    assert torch.equal(said(again), said(model))


# --- reward and value models -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "gpt2", "gpt_neox", "opt"])
def test_a_fresh_value_model_has_the_policys_frozen_weights_and_a_top_of_its_own(architecture: str) -> None:
    policy = tiny_model(architecture)
    train_top_blocks(policy, 1)
    value = fresh_value_model(policy)
    train_top_blocks(value, 1)
    frozen = {p.data_ptr() for p in policy.base_model.parameters() if not p.requires_grad}
    assert {p.data_ptr() for p in value.parameters() if not p.requires_grad} == frozen
    assert not places(policy) & {p.data_ptr() for p in value.parameters() if p.requires_grad}
    assert not values(value).any()


def trained_reward_model(policy: Any, prepare: Any) -> Any:
    """A reward model from the policy's weights, two steps on."""
    model = reward_model_from(policy, seed=1)
    prepare(model)
    optimiser = Optimiser(model, SFTConfig.model_validate({}))
    for _ in range(2):
        score_completions(model, collate(GROUPS, layout="plain", pad_id=PAD_ID)).sum().backward()
        assert optimiser.update(0.02).applied
    return model


def test_a_reward_model_of_the_same_trunk_takes_the_policys_frozen_weights_and_says_what_it_said(
    tmp_path: Path,
) -> None:
    reward_model = trained_reward_model(model_of("llama"), lambda model: train_top_blocks(model, 1))
    expected = scores(reward_model)
    save_model(reward_model, word_tokenizer(), tmp_path / "model")
    save_model(model_of("llama"), word_tokenizer(), tmp_path / "base")
    context, screen = context_of(tmp_path, trainable_blocks=1)
    policy = LoadedPolicy.to_train(context, tmp_path / "base", "ppo")
    found, _ = reward_model_beside(context, policy, tmp_path / "model")
    assert torch.equal(scores(found), expected)
    assert places(found) & places(policy.model) == {p.data_ptr() for p in policy.model.model.parameters()} - {
        p.data_ptr() for p in policy.model.parameters() if p.requires_grad
    }
    assert "the reward model shares 69% of its weights with the policy" in screen.getvalue()
    value = value_model_beside(context, found)
    assert torch.equal(values(value)[:, 0], values(found)[:, 0])
    train(policy.model)
    assert torch.equal(scores(found), expected)
    assert not {p.data_ptr() for p in value.parameters() if p.requires_grad} & (places(found) | places(policy.model))


def test_nothing_is_shared_with_other_weights() -> None:
    policy, other = model_of("llama"), reward_model_from(model_of("llama", seed=9), seed=1)
    train_top_blocks(policy, 2)
    norms = sum(p.numel() for n, p in other.base_model.layers[0].named_parameters() if p.dim() == 1)
    total = sum(p.numel() for p in other.parameters())
    assert share_equal(other, policy) == norms / total, "norms of new models are all ones"


@pytest.fixture
def reward_run(tmp_path: Path) -> Path:
    """A run folder with a base model, and a reward stage that trained an adapter on it."""
    context, _ = context_of(tmp_path, adapter={"rank": 4, "alpha": 8})
    base = save_model(model_of("llama"), word_tokenizer(), tmp_path / "base")
    with RunFolder.open(tmp_path / "reward", resolved_config={}, fingerprints=weights_hash(base)):
        policy, tokenizer = load_policy(base)
        model = trained_reward_model(policy, lambda model: adapt(context, model, "reward"))
        save_trained(model, tokenizer, tmp_path / "reward" / "model", start=base, card="")
    return tmp_path


def test_a_reward_model_trained_as_an_adapter_is_one_on_the_policys_trunk(reward_run: Path) -> None:
    context, screen = context_of(reward_run, adapter={"rank": 4, "alpha": 8})
    shutil.copytree(reward_run / "base", reward_run / "elsewhere")  # the content counts, not the path
    policy = LoadedPolicy.to_train(context, reward_run / "elsewhere", "ppo")
    found, tokenizer = reward_model_beside(context, policy, reward_run / "reward" / "model")
    merged, _ = load_reward_model(reward_run / "reward" / "model")
    torch.testing.assert_close(scores(found), scores(merged), rtol=1e-5, atol=1e-5)
    assert float((scores(found) - scores(reward_model_from(policy.model, seed=1))).abs().max()) > 0.1
    assert tokenizer.pad_token_id == PAD_ID and found.config.pad_token_id == PAD_ID
    assert "one trunk for all roles" in screen.getvalue()
    value = value_model_beside(context, found)
    trunk = {p.data_ptr() for p in policy.model.parameters() if not p.requires_grad}
    assert all(trunk == {p.data_ptr() for p in m.parameters() if not p.requires_grad} for m in (found, value))
    assert torch.equal(values(value), values(found))
    before = scores(found), values(value)
    train(policy.model)
    assert torch.equal(scores(found), before[0]) and torch.equal(values(value), before[1])
    optimiser = Optimiser(value, SFTConfig.model_validate({}))
    score_values(value, collate(GROUPS, layout="plain", pad_id=PAD_ID)).sum().backward()
    optimiser.update(0.1)
    assert torch.equal(scores(found), before[0]) and not torch.equal(values(value), before[1])


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        ("no adapter", "there is no adapter in"),
        ("other weights", "not trained on the weights that the policy starts from"),
        ("no record", "not trained on the weights that the policy starts from"),
        ("other bits", "its adapter was trained with `model.quantise` = nf4, and now that is None"),
        ("other rank", "its adapter is lora of rank 4 and alpha 8 on "),
    ],
)
def test_otherwise_it_has_weights_of_its_own_and_the_reason_is_said(spoil: str, reason: str, reward_run: Path) -> None:
    start = reward_run / "base"
    if spoil == "no adapter":
        shutil.rmtree(reward_run / "reward" / "adapter")
    elif spoil == "other weights":
        save_model(model_of("llama", seed=9), word_tokenizer(), start)
    elif spoil == "no record":
        (reward_run / "reward" / "run.json").unlink()
    elif spoil == "other bits":
        record = json.loads((reward_run / "reward" / "run.json").read_text())
        record["config"] = {"model": {"quantise": "nf4"}}
        (reward_run / "reward" / "run.json").write_text(json.dumps(record))
    context, screen = context_of(reward_run, adapter={"rank": 2 if spoil == "other rank" else 4, "alpha": 8})
    policy = LoadedPolicy.to_train(context, start, "ppo")
    found, _ = reward_model_beside(context, policy, reward_run / "reward" / "model")
    assert reason in screen.getvalue() and "weights of its own" in screen.getvalue()
    assert not has_adapter(found) and not places(found) & places(policy.model)
    value = value_model_beside(context, found)
    assert has_adapter(value) and places(found) - places(value) == {found.score.weight.data_ptr()}
    assert torch.equal(values(value), values(copy.deepcopy(found)))


def test_an_adapter_beside_top_blocks_of_another_run_is_loaded_merged(reward_run: Path) -> None:
    context, _ = context_of(reward_run, trainable_blocks=1)
    policy = LoadedPolicy.to_train(context, reward_run / "base", "ppo")
    found, _ = reward_model_beside(context, policy, reward_run / "reward" / "model")
    assert not has_adapter(found)
    add_adapter(policy.model, rank=1, alpha=1, targets=(), seed=0)
    assert torch.equal(scores(found), scores(load_reward_model(reward_run / "reward" / "model")[0]))
