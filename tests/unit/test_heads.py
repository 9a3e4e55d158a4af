"""Reward models with several heads on one trunk: saved, loaded, scored, centred, and turned into value models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from accord.data.templates import Template
from accord.errors import ConfigError
from accord.models.adapters import add_adapter, save_adapter
from accord.models.heads import scalar_head, score_head, shift_scores
from accord.models.layout import collate
from accord.models.load import load_reward_model, reward_model_from, save_model, value_model_from
from accord.models.scratch_tokenizer import train_tokenizer
from accord.models.token_scores import head_scores, last_hidden_states, score_completions, score_values
from accord.records import Message, ScoreRequest
from accord.rewards.scorers import ModelScorer
from models_support import PAD_ID, tiny_model, token_group, word_tokenizer

GROUPS = [token_group("abcdefg", "hij", "klmno"), token_group("x", "pq")]
BATCH = collate(GROUPS, layout="plain", pad_id=PAD_ID)


def ensemble(heads: int = 3, architecture: str = "llama") -> Any:
    return reward_model_from(tiny_model(architecture), seed=2, heads=heads)


@torch.no_grad()
def test_an_ensemble_is_a_plain_classifier_with_a_label_a_head_whose_score_is_their_mean(tmp_path: Path) -> None:
    folder = save_model(ensemble(), word_tokenizer(), tmp_path / "reward")
    theirs = AutoModelForSequenceClassification.from_pretrained(folder)
    loaded, _ = load_reward_model(folder)
    logits = theirs(input_ids=BATCH.input_ids, attention_mask=BATCH.attention_mask).logits
    assert (theirs.config.num_labels, logits.shape) == (3, (3, 3))
    torch.testing.assert_close(head_scores(loaded, BATCH), logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(score_completions(loaded, BATCH), logits.mean(1), rtol=0, atol=1e-5)
    assert logits.std(1).min() > 0.05, "the heads agree too much for the comparison to mean anything"


@torch.no_grad()
def test_the_mean_over_one_head_is_its_score_bit_for_bit() -> None:
    model = ensemble(heads=1)
    states = last_hidden_states(model, BATCH)
    assert torch.equal(score_completions(model, BATCH), scalar_head(model)(states)[:, 0])


def test_a_classifier_of_classes_is_no_ensemble() -> None:
    model = ensemble()
    model.config.problem_type = None
    with pytest.raises(ConfigError, match="LlamaForSequenceClassification has no scalar head"):
        score_head(model)


@torch.no_grad()
@pytest.mark.parametrize("bias", [False, True])
def test_every_head_is_centred_by_itself(bias: bool) -> None:
    model = ensemble()
    if bias:
        model.score = torch.nn.Linear(32, 3)
    states = last_hidden_states(model, BATCH)
    before = head_scores(model, BATCH).mean(0)
    shift_scores(model, states, states)
    assert before.abs().min() > 0.005
    torch.testing.assert_close(head_scores(model, BATCH).mean(0), torch.zeros(3), rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("sharing", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_a_value_model_from_an_ensemble_has_one_head_their_mean(sharing: bool, bias: bool) -> None:
    """The value before a token is the head on the state that predicts it; at a completion's last token the heads score
    the state that would predict the token after: one head on both must be the mean of three."""
    model = ensemble()
    if bias:
        model.score = torch.nn.Linear(32, 3)
    value = value_model_from(model, sharing=sharing)
    states = last_hidden_states(model, BATCH)
    torch.testing.assert_close(scalar_head(value)(states)[:, 0], score_head(model)(states).mean(1))
    assert score_values(value, BATCH).shape == BATCH.valid_mask.shape
    assert (value.config.num_labels, model.config.num_labels, score_head(model).out_features) == (1, 3, 3)
    assert scalar_head(value).weight.requires_grad


def test_an_adapter_is_saved_with_all_heads_and_plain_peft_reads_it(tmp_path: Path) -> None:
    from peft import PeftModel

    base = save_model(tiny_model("llama"), word_tokenizer(), tmp_path / "base")
    model = ensemble()
    add_adapter(model, rank=2, alpha=4, targets=(), seed=1)
    save_adapter(model, tmp_path / "adapter", base=str(base))
    plain = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3).eval()
    theirs: Any = PeftModel.from_pretrained(plain, str(tmp_path / "adapter")).eval()
    with torch.no_grad():
        logits = theirs(input_ids=BATCH.input_ids, attention_mask=BATCH.attention_mask).logits
        torch.testing.assert_close(logits, head_scores(model, BATCH), rtol=0, atol=1e-5)


@pytest.mark.parametrize("heads", [1, 3])
def test_the_scorer_gives_the_members_of_an_ensemble_and_their_mean(heads: int) -> None:
    tokenizer = train_tokenizer(["hello, how are you? fine, thanks"] * 3, vocab_size=300)
    model = reward_model_from(tiny_model("llama", vocab_size=300), 0, heads=heads)
    template = Template.of(tokenizer, "auto")
    scorer = ModelScorer(model, template, micro_batch_tokens=64, max_tokens=40, max_prompt_tokens=None, name="x")
    requests = [ScoreRequest((Message("user", "hello"),), answer) for answer in ("fine", "thanks", "xyz" * 30)]
    first, second, failed = scorer.score(requests)
    assert (failed.value, failed.members) == (None, ())
    for score in (first, second):
        assert len(score.members) == (heads if heads > 1 else 0)
        if score.members:
            assert score.value == pytest.approx(sum(score.members) / heads, abs=1e-6)
            assert len(set(score.members)) == heads
