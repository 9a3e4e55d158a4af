"""Building, loading, saving; reward and value models; what plain transformers reads from the saved folders."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)

from accord.errors import ConfigError
from accord.models.heads import fill_head, scalar_head, shift_scores
from accord.models.layout import collate
from accord.models.load import (
    ModelShape,
    build_model,
    fresh_value_model,
    load_policy,
    load_reward_model,
    reward_model_from,
    save_model,
    value_model_from,
)
from accord.models.token_scores import last_hidden_states, score_completions, score_tokens
from models_support import EOS_ID, PAD_ID, VOCABULARY, tiny_model, token_group, word_tokenizer

SHAPE = ModelShape(hidden_size=32, layers=2, heads=4, max_positions=64)
GROUPS = [token_group("abcdefg", "hij", "klmno"), token_group("x", "pq")]


def built(shape: ModelShape = SHAPE, seed: int = 0) -> Any:
    return build_model(shape, vocab_size=VOCABULARY, pad_id=PAD_ID, eos_id=EOS_ID, seed=seed)


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same_weights(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return save_model(built(), word_tokenizer(), tmp_path / "policy")


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_built_model_depends_on_its_seed_alone(kind: Any) -> None:
    shape = ModelShape(hidden_size=32, layers=2, heads=4, max_positions=64, kind=kind)
    torch.manual_seed(7)
    first, state = built(shape, seed=1), torch.get_rng_state()
    torch.manual_seed(8)
    second = built(shape, seed=1)
    assert same_weights(weights(first), weights(second))
    assert not same_weights(weights(first), weights(built(shape, seed=2)))
    torch.manual_seed(7)
    assert torch.equal(torch.get_rng_state(), state), "building a model moved the global generator"


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_built_model_has_the_shape_asked_for(kind: Any) -> None:
    config = built(ModelShape(24, 3, 2, 40, kind, intermediate_size=56)).config
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (24, 3, 2)
    assert (config.max_position_embeddings, config.vocab_size) == (40, VOCABULARY)
    assert (config.n_inner if kind == "gpt2" else config.intermediate_size) == 56
    assert config.tie_word_embeddings


def test_a_hidden_size_that_does_not_divide_into_heads_is_refused() -> None:
    with pytest.raises(ConfigError, match="hidden_size 30 does not divide into 4 heads"):
        ModelShape(30, 2, 4, 64)


def test_a_saved_policy_loads_with_the_same_weights_and_template(saved: Path) -> None:
    model, tokenizer = load_policy(saved)
    assert same_weights(weights(model), weights(built()))
    assert not model.training
    assert tokenizer.chat_template == word_tokenizer().chat_template
    assert sorted(path.name for path in saved.parent.iterdir()) == ["policy"]
    assert not list(saved.glob("*.bin"))


def test_plain_transformers_reads_a_saved_policy(saved: Path) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(saved), AutoTokenizer.from_pretrained(saved)
    assert same_weights(weights(model), weights(built()))
    assert tokenizer.apply_chat_template([{"role": "user", "content": "w3 w4"}], tokenize=False) == "w3 w4 "
    assert (model.config.pad_token_id, tokenizer.pad_token_id) == (PAD_ID, PAD_ID)


@pytest.mark.parametrize("architecture", ["gpt2", "opt", "phi3", "llama"])
def test_a_loaded_model_has_no_dropout_even_in_training_mode(architecture: str, tmp_path: Path) -> None:
    model = tiny_model(architecture)
    for name, value in vars(model.config).items():
        if "drop" in name and isinstance(value, float):
            setattr(model.config, name, 0.5)
    save_model(model, word_tokenizer(), tmp_path / "model")
    noisy = AutoModelForCausalLM.from_pretrained(tmp_path / "model").train()
    quiet = load_policy(tmp_path / "model")[0].train()
    batch = collate(GROUPS, layout="plain", pad_id=PAD_ID)
    assert not torch.equal(score_tokens(noisy, batch).logprobs, score_tokens(noisy, batch).logprobs)
    torch.testing.assert_close(score_tokens(quiet, batch).logprobs, score_tokens(model, batch).logprobs)


def test_a_saved_model_names_its_tokenizers_padding(tmp_path: Path) -> None:
    reward_model = reward_model_from(tiny_model("llama", pad_token_id=None), seed=1)
    folder = save_model(reward_model, word_tokenizer(), tmp_path / "reward")
    assert AutoModelForSequenceClassification.from_pretrained(folder).config.pad_token_id == PAD_ID


def test_saving_replaces_an_older_model_and_leaves_nothing_beside_it(saved: Path) -> None:
    newer = built(seed=5)
    (saved / "stale.txt").write_text("from the older model")
    save_model(newer, word_tokenizer(), saved)
    assert same_weights(weights(load_policy(saved)[0]), weights(newer))
    assert not (saved / "stale.txt").exists()
    assert [path.name for path in saved.parent.iterdir()] == ["policy"]


def test_a_save_that_fails_halfway_leaves_the_older_model_whole(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = word_tokenizer()

    def fail(*args: Any, **options: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(type(tokenizer), "save_pretrained", fail)
    with pytest.raises(OSError, match="no space left"):
        save_model(built(seed=5), tokenizer, saved)
    monkeypatch.undo()
    (saved.parent / ".policy.partial" / "stale.txt").write_text("from the save that failed")
    assert same_weights(weights(load_policy(saved)[0]), weights(built()))
    save_model(built(seed=6), tokenizer, saved)
    assert same_weights(weights(load_policy(saved)[0]), weights(built(seed=6)))
    assert not (saved / "stale.txt").exists()


def test_weights_that_can_run_code_are_refused(saved: Path) -> None:
    torch.save(load_file(saved / "model.safetensors"), saved / "pytorch_model.bin")
    (saved / "model.safetensors").unlink()
    with pytest.raises(
        ConfigError, match=r"found only pytorch_model.bin, which can run code .* expected \*.safetensors"
    ):
        load_policy(saved)


def test_weights_that_can_run_code_are_refused_where_no_folder_can_be_looked_into(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As for a hub name, whose files only transformers sees."""
    torch.save(load_file(saved / "model.safetensors"), saved / "pytorch_model.bin")
    (saved / "model.safetensors").unlink()
    monkeypatch.setattr("accord.models.load.check_model_path", lambda path: None)
    with pytest.raises(ConfigError, match="cannot load a model"):
        load_policy(saved)


def test_a_path_that_holds_no_model_is_named(tmp_path: Path, saved: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere: no such folder"):
        load_policy(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"no config\.json"):
        load_policy(tmp_path)
    (saved / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="found no weights"):
        load_policy(saved)


def test_a_hub_model_that_cannot_be_reached_is_one_clear_error() -> None:
    with pytest.raises(ConfigError, match=r"cannot load a model from 'someone/some-model': .*already downloaded"):
        load_policy("someone/some-model")


def test_a_folder_that_lacks_weights_is_refused(saved: Path) -> None:
    tensors = load_file(saved / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, saved / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"lacks 1 of the weights of LlamaForCausalLM, such as 'model.norm.weight'"):
        load_policy(saved)


def test_a_tokenizer_larger_than_the_vocabulary_is_refused(saved: Path) -> None:
    tokenizer = word_tokenizer()
    tokenizer.add_tokens(["one", "too", "many"])
    tokenizer.save_pretrained(saved)
    with pytest.raises(
        ConfigError, match=f"tokenizer has {VOCABULARY + 3} tokens but the model's vocabulary {VOCABULARY}"
    ):
        load_policy(saved)


def test_a_folder_of_the_other_kind_is_refused(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"such as 'score.weight': it holds \['LlamaForCausalLM'\]"):
        load_reward_model(saved)
    reward = save_model(reward_model_from(built(), seed=1), word_tokenizer(), tmp_path / "reward")
    with pytest.raises(ConfigError, match="holds a reward model"):
        load_policy(reward)


@pytest.mark.parametrize("pad_token", [None, "<eos>"])
def test_padding_is_never_the_end_token(saved: Path, pad_token: str | None) -> None:
    tokenizer = AutoTokenizer.from_pretrained(saved)
    tokenizer.pad_token = pad_token
    tokenizer.save_pretrained(saved)
    model, loaded = load_policy(saved)
    assert loaded.pad_token == "<pad>", "a token named for padding comes first"
    assert model.config.pad_token_id == PAD_ID
    assert loaded.eos_token_id == EOS_ID


def test_a_tokenizer_with_no_token_to_pad_with_pads_with_its_last(tmp_path: Path) -> None:
    words = {"a": 0, "b": 1, "c": 2, "<eos>": 3}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words)), eos_token="<eos>")
    model = build_model(SHAPE, vocab_size=4, pad_id=3, eos_id=3, seed=0)
    policy, loaded = load_policy(save_model(model, tokenizer, tmp_path / "policy"))
    assert (loaded.pad_token, loaded.eos_token) == ("c", "<eos>")
    assert policy.config.pad_token_id == 2


def test_the_heads_numbers_have_the_spread_asked_for_and_depend_on_the_seed() -> None:
    """512 numbers with standard deviation 1/sqrt(513) = 0.0442; its estimate's own deviation is 0.0442/sqrt(1024)."""
    model = reward_model_from(built(ModelShape(512, 1, 4, 16)), seed=3)
    first = scalar_head(model).weight.detach().clone()
    assert abs(first.std().item() - 0.0442) < 3 * 0.0014
    fill_head(model, 4)
    assert not torch.equal(first, scalar_head(model).weight)
    fill_head(model, 3)
    assert torch.equal(first, scalar_head(model).weight)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt", "gemma3_text"])
def test_a_reward_model_starts_from_the_policys_trunk(architecture: str) -> None:
    policy = tiny_model(architecture)
    generator = torch.get_rng_state()
    reward_model = reward_model_from(policy, seed=1)
    assert torch.equal(torch.get_rng_state(), generator)
    assert same_weights(weights(reward_model.base_model), weights(policy.base_model))
    with torch.no_grad():
        reward_model.base_model.get_input_embeddings().weight.zero_()
    assert policy.get_input_embeddings().weight.any(), "the trunk is shared, not copied"


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt", "gemma2"])
def test_plain_transformers_scores_a_padded_batch_as_we_do(architecture: str, tmp_path: Path) -> None:
    reward_model = reward_model_from(tiny_model(architecture), seed=2)
    folder = save_model(reward_model, word_tokenizer(), tmp_path / "reward")
    plain = collate(GROUPS, layout="plain", pad_id=PAD_ID)
    theirs = AutoModelForSequenceClassification.from_pretrained(folder)
    loaded, _ = load_reward_model(folder)
    assert (theirs.config.num_labels, theirs.config.problem_type) == (1, "regression")
    with torch.no_grad():
        logits = theirs(input_ids=plain.input_ids, attention_mask=plain.attention_mask).logits
        ours = score_completions(loaded, plain)
        shared = score_completions(loaded, collate(GROUPS, layout="shared", pad_id=PAD_ID))
    assert logits.shape == (3, 1)
    torch.testing.assert_close(ours, logits[:, 0], rtol=0, atol=1e-5)
    torch.testing.assert_close(shared, logits[:, 0], rtol=0, atol=1e-5)
    assert ours.std() > 0.05, "the scores are too much alike for the comparison to mean anything"


def test_a_value_model_is_an_independent_trainable_copy() -> None:
    reward_model = reward_model_from(built(), seed=1).requires_grad_(False)
    value_model = value_model_from(reward_model)
    assert same_weights(weights(value_model), weights(reward_model))
    assert all(parameter.requires_grad for parameter in value_model.parameters())
    with torch.no_grad():
        scalar_head(value_model).weight.add_(1)
    assert not torch.equal(scalar_head(value_model).weight, scalar_head(reward_model).weight)
    assert not any(parameter.requires_grad for parameter in reward_model.parameters())


def test_a_fresh_value_model_predicts_0_everywhere_from_the_policys_trunk_and_can_learn() -> None:
    policy = built()
    value_model = fresh_value_model(policy)
    assert not scalar_head(value_model).weight.any()
    assert same_weights(weights(value_model.base_model), weights(policy.base_model))
    assert all(parameter.requires_grad for parameter in value_model.parameters())
    with torch.no_grad():
        next(value_model.base_model.parameters()).add_(1)
    assert not same_weights(weights(value_model.base_model), weights(policy.base_model))


def test_shifted_scores_of_reference_answers_have_mean_zero_for_any_reader(tmp_path: Path) -> None:
    reward_model = reward_model_from(tiny_model("llama"), seed=2)
    batch = collate(GROUPS, layout="plain", pad_id=PAD_ID)
    with torch.no_grad():
        before = score_completions(reward_model, batch)
        states = last_hidden_states(reward_model, batch)
        shift_scores(reward_model, states, states)
    folder = save_model(reward_model, word_tokenizer(), tmp_path / "reward")
    theirs = AutoModelForSequenceClassification.from_pretrained(folder)
    with torch.no_grad():
        scores = theirs(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits[:, 0]
    assert abs(before.mean()) > 0.1
    assert abs(scores.mean()) < 1e-6


def hidden_states(count: int, seed: int) -> torch.Tensor:
    """(count, 32) states around a mean of ones, ten times more spread in the first half of the directions."""
    spread = torch.cat([torch.ones(16), torch.full((16,), 0.1)])
    return 1 + spread * torch.randn(count, 32, generator=torch.Generator().manual_seed(seed))


def test_shifting_moves_new_answers_almost_alike() -> None:
    """With covariance diag(1 x 16, .01 x 16) and mean 1, d = S^-1 m / (m' S^-1 m) has d'Sd = 1/(m' S^-1 m)
    = 1/(16 + 16 * 100): moves of mean mu spread by about |mu|/40. The ridge (0.1% of .505) makes this a little more."""
    reward_model = reward_model_from(built(), seed=2)
    head = scalar_head(reward_model)
    reference, others = hidden_states(2000, seed=1), hidden_states(2000, seed=2)
    mean = head(reference).mean().item()
    before = head(others)[:, 0].detach()
    residual = shift_scores(reward_model, reference, reference)
    moves = head(others)[:, 0].detach() - before
    assert head(reference).mean().abs() < 1e-6
    assert moves.mean().item() == pytest.approx(-mean, rel=0.02)
    assert abs(mean) / 40 < residual < abs(mean) / 30
    assert moves.std().item() == pytest.approx(residual, rel=0.1)


def test_shifting_on_good_answers_keeps_their_distance_from_bad_ones() -> None:
    """Good answers around ones, bad ones ten units away along the head's own direction, which hardly varies within
    either kind. Taken over the good answers alone, that direction would be the cheapest to move along."""
    reward_model = reward_model_from(built(), seed=2)
    head = scalar_head(reward_model)
    direction = (head.weight[0] / head.weight[0].norm()).detach()
    with torch.no_grad():
        head.weight.copy_(direction[None])

    def without_own_variation(states: torch.Tensor) -> torch.Tensor:
        centred = states - 1
        return 1 + centred - (centred @ direction)[:, None] * direction * 0.99

    good = without_own_variation(hidden_states(500, seed=1)) + 5 * direction
    bad = without_own_variation(hidden_states(500, seed=2)) - 5 * direction
    margin = (head(good).mean() - head(bad).mean()).item()
    residual = shift_scores(reward_model, good, torch.cat([good, bad]))
    assert head(good).mean().abs() < 1e-5
    assert (head(good).mean() - head(bad).mean()).item() == pytest.approx(margin, rel=0.02)
    assert residual < 0.2


def test_a_head_with_a_bias_is_shifted_by_the_bias_alone() -> None:
    reward_model = reward_model_from(built(), seed=2)
    reward_model.score = torch.nn.Linear(32, 1)
    weight = reward_model.score.weight.detach().clone()
    assert shift_scores(reward_model, hidden_states(50, seed=1), hidden_states(50, seed=2)) == 0.0
    assert reward_model.score(hidden_states(50, seed=1)).mean().abs() < 1e-6
    assert torch.equal(reward_model.score.weight, weight)


def test_states_that_cannot_be_centred_are_refused() -> None:
    reward_model = reward_model_from(built(), seed=2)
    with pytest.raises(ValueError, match=r"shape \(0, 32\)"):
        shift_scores(reward_model, torch.zeros(0, 32), torch.zeros(0, 32))
    with pytest.raises(ValueError, match="all zero"):
        shift_scores(reward_model, torch.zeros(5, 32), torch.zeros(5, 32))


def test_one_reference_answer_is_enough_to_centre_its_score() -> None:
    reward_model = reward_model_from(built(), seed=2)
    state = hidden_states(1, seed=1)
    assert shift_scores(reward_model, state, state) == pytest.approx(0.0)
    assert scalar_head(reward_model)(state).abs().item() < 1e-6


def test_models_without_a_scalar_head_are_named() -> None:
    model = copy.deepcopy(reward_model_from(built(), seed=2))
    model.score = torch.nn.Linear(32, 3)
    with pytest.raises(ConfigError, match="LlamaForSequenceClassification has no scalar head"):
        scalar_head(model)
    with pytest.raises(ConfigError, match="LlamaForCausalLM has no scalar head"):
        scalar_head(built())


def test_a_policy_without_a_classification_kind_makes_no_reward_model() -> None:
    with pytest.raises(ConfigError, match="MambaForCausalLM has no sequence-classification kind"):
        reward_model_from(tiny_model("mamba"), seed=1)
