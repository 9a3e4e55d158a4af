"""The reward stage with its options: what it saves, says, measures and refuses."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from accord.config import recipe_from
from accord.data.templates import Template
from accord.data.tokenise import tokenise_groups
from accord.errors import ConfigError, DataError
from accord.measures.statistics import pearson
from accord.methods.corpus import Part
from accord.methods.reward import Comparison, read_scores
from accord.models.load import load_reward_model
from accord.records import Group
from accord.report.stage import stage_report
from stages_support import answers_to, logged, run_stage_on, saved_model, weights_of


def pair(prompt: str, good: str, bad: str) -> Group:
    return answers_to(prompt, (good, {"rank": 0}), (bad, {"rank": 1}))


PAIRS = [pair(f"question {i}?", f"yes, it is {i}", f"no {i}" * (i % 3 + 1)) for i in range(24)]
PART = Part.of(PAIRS, "pairs")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_model(tmp_path_factory.mktemp("base") / "model", PAIRS, seed=0)


def labels(folder: Path) -> int:
    """What plain transformers makes of the folder, whose weights must fit."""
    model, report = AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    return model.config.num_labels


def test_an_ensemble_is_saved_with_its_heads_and_says_how_far_they_agree(base: Path, tmp_path: Path) -> None:
    summary = run_stage_on(tmp_path, base, PART, "reward", {"heads": 3})
    assert labels(tmp_path / "reward" / "model") == 3
    found = {row["name"]: row["value"] for row in summary["headline"]}
    names = ("eval/head_accuracy/min", "eval/head_accuracy/max", "eval/head_disagreement/mean")
    assert 0 <= found[names[0]] <= found[names[1]] <= 1 and found[names[2]] > 0
    assert any("It has 3 heads, each with a bootstrap" in text for text in summary["account"])
    assert any("By themselves the heads agree" in text for text in summary["account"])
    assert set(names) <= set(logged(tmp_path, "reward")[-1])
    assert "Mean head disagreement" in stage_report(tmp_path / "reward").read_text()


def test_every_head_gives_the_reference_answers_mean_zero(base: Path, tmp_path: Path) -> None:
    run_stage_on(tmp_path, base, PART, "reward", {"heads": 2}, holdout=0.0)
    model, tokenizer = load_reward_model(tmp_path / "reward" / "model")
    template = Template.of(tokenizer, "auto")
    chosen = [Group(group.prompt, group.completions[:1]) for group in PAIRS]
    tokens = tokenise_groups(chosen, template, max_tokens=64, max_prompt_tokens=None, loss_on="assistant").groups
    scores = read_scores(
        model, [Comparison(t, (0,)) for t in tokens], layout="plain", pad_id=template.pad_id, budget=512
    )
    torch.testing.assert_close(torch.cat(scores).mean(0), torch.zeros(2), rtol=0, atol=1e-5)


def test_the_length_head_trains_and_is_not_in_the_saved_model(base: Path, tmp_path: Path) -> None:
    summary = run_stage_on(tmp_path, base, PART, "reward", {"heads": 2, "length_decorrelation": 1.0})
    assert labels(tmp_path / "reward" / "model") == 2
    assert any("length was learned by a head of its own" in text for text in summary["account"])
    row = logged(tmp_path, "reward")[-1]
    assert -1 <= row["train/length_correlation"] <= 1 and -1 <= row["train/length_head_correlation"] <= 1


def test_the_span_loss_is_logged_beside_the_loss_of_whole_answers(base: Path, tmp_path: Path) -> None:
    run_stage_on(tmp_path / "span", base, PART, "reward", {"loss": "divergence_span"})
    run_stage_on(tmp_path / "pairs", base, PART, "reward", {})
    span, pairs = (logged(tmp_path / name, "reward") for name in ("span", "pairs"))
    assert span[0]["train/loss"] == pytest.approx(pairs[0]["train/loss"]), "the same model has learned nothing yet"
    assert span[0]["train/span_loss"] != pytest.approx(span[0]["train/loss"])
    assert "train/span_loss" not in pairs[0]
    assert weights_of(tmp_path / "span", "reward") != weights_of(tmp_path / "pairs", "reward")


def test_identical_answers_are_left_out_and_counted(base: Path, tmp_path: Path) -> None:
    same = [pair(f"same {i}?", "yes", "yes") for i in range(3)]
    summary = run_stage_on(tmp_path / "a", base, Part.of([*same, *PAIRS], "x"), "reward", {}, holdout=0.0)
    assert "3 of 27 comparisons are between identical answers and teach nothing: left out" in summary["printed"]
    with pytest.raises(DataError, match="the answers compared are all alike"):
        run_stage_on(tmp_path / "b", base, Part.of(same, "x"), "reward", {}, holdout=0.0)


def test_short_answers_are_left_out_and_counted(base: Path, tmp_path: Path) -> None:
    """Of the ranking one answer goes and two stay; a pair that loses one is gone."""
    ranking = answers_to("which?", ("this one here", {"rank": 0}), ("no", {"rank": 1}), ("that one then", {"rank": 2}))
    long = [pair(f"how {i}?", "as you like it", "not at all now") for i in range(4)]
    part = Part.of([*long, ranking, pair("why?", "because it is so", "well")], "x")
    summary = run_stage_on(tmp_path / "a", base, part, "reward", {"min_words": 3}, holdout=0.0)
    assert "2 answers of fewer than 3 words left out, and with them 1 comparisons" in summary["printed"]
    assert "5 comparisons, 0 held out" in summary["printed"]
    assert any("2 answers of fewer than 3 words" in text for text in summary["account"])
    with pytest.raises(DataError, match=r"`reward\.min_words` = 50 leaves none of 6 comparisons"):
        run_stage_on(tmp_path / "b", base, part, "reward", {"min_words": 50}, holdout=0.0)


def test_decorrelation_of_token_scores_is_refused() -> None:
    section = {"loss": "divergence_span", "length_decorrelation": 1.0}
    with pytest.raises(ConfigError, match=r"`reward\.length_decorrelation` splits the scores of whole answers"):
        recipe_from({"model": {"path": "quickstart"}, "reward": section})


# --- what decorrelation is for ---------------------------------------------------------------------------------------


def judged_by_length(count: int, seed: int) -> list[Group]:
    """Answers of one to eight fillers and a word that is good or bad. Annotators prefer good to bad, and of two alike
    the longer one: half of the comparisons teach length alone."""
    draw = random.Random(seed)
    groups = []
    for index in range(count):
        short, long = sorted(draw.sample(range(1, 9), 2))
        lengths = [short, long] if draw.random() < 0.5 else [long, short]
        words = ["good", "bad"] if index % 2 else [draw.choice(["good", "bad"])] * 2
        answers = [" ".join([word] + ["so"] * length) for word, length in zip(words, lengths, strict=True)]
        if words[0] == words[1] and lengths[0] < lengths[1]:
            answers.reverse()
        groups.append(pair(f"question {index}?", *answers))
    return groups


def test_decorrelation_takes_length_out_of_the_score_and_leaves_what_is_good(tmp_path: Path) -> None:
    """The control, without it, follows length; both must tell good from bad at equal length."""
    groups = judged_by_length(160, seed=1)
    model = saved_model(tmp_path / "model", groups, seed=0)
    section = {"max_steps": 60, "epochs": 20, "batch_size": 16, "learning_rate": 3e-3, "normalise_on": "none"}
    correlations, accuracies = [], []
    for weight in (0.0, 1.0):
        out = tmp_path / str(weight)
        run_stage_on(out, model, Part.of(groups, "x"), "reward", section | {"length_decorrelation": weight})
        trained, tokenizer = load_reward_model(out / "reward" / "model")
        template = Template.of(tokenizer, "auto")
        fresh = [pair("a new question?", f"good{' so' * n}", f"bad{' so' * n}") for n in range(1, 9)]
        limits: dict[str, Any] = {"max_tokens": 64, "max_prompt_tokens": None, "loss_on": "assistant"}
        tokens = tokenise_groups(fresh, template, **limits).groups
        items = [Comparison(t, (0, 1)) for t in tokens]
        scores = torch.cat(read_scores(trained, items, layout="plain", pad_id=template.pad_id, budget=512))[:, 0]
        lengths = [len(c.ids) for t in tokens for c in t.completions]
        correlations.append(pearson(lengths, scores.tolist()).value)
        accuracies.append(float((scores[0::2] > scores[1::2]).float().mean()))
    assert correlations[0] > 0.5
    assert abs(correlations[1]) < 0.25
    assert min(accuracies) == 1.0
