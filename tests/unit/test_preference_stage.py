"""The dpo and orpo stages: every option changes the outcome, and what they say, measure and refuse."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from accord.config import DPOConfig, ORPOConfig
from accord.errors import ConfigError, DataError
from accord.methods import likelihood, preference_stage
from accord.methods.corpus import Part
from accord.methods.likelihood import LikelihoodChange
from accord.records import Group
from stages_support import answers_to, logged, run_stage_on, saved_model, weights_of


def answer(text: str, rank: int | None, score: float | None = None) -> tuple[str, dict[str, Any]]:
    return text, {"rank": rank, "score": score}


def group(*answers: tuple[str, dict[str, Any]], prompt: str = "ask", **rest: Any) -> Group:
    return answers_to(prompt, *answers, **rest)


def words(i: int) -> list[Group]:
    """A pair with a margin, one with answers of other lengths, and a ranking of three."""
    return [
        group(answer(f"yes {i}", 0), answer("no no no", 1), prompt=f"shall I {i}?", margin=2.0),
        group(answer(f"certainly, I will do {i}", 0), answer("no", 1), prompt=f"will you {i}?"),
        group(answer("maybe", 1), answer(f"yes please, {i}", 0), answer("never", 2), prompt=f"who wants {i}?"),
    ]


PAIRS = Part.of([made for i in range(8) for made in words(i)], "pairs")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_model(tmp_path_factory.mktemp("model") / "start", PAIRS.groups, 0)


def run(out: Path, model: Path, stage: str = "dpo", part: Part = PAIRS, **section: Any) -> dict[str, Any]:
    return run_stage_on(out, model, part, stage, section)


# What each option is changed to, and what must be set beside it to be read.
OPTIONS: dict[str, tuple[Any, dict[str, Any]]] = {
    "loss": ("ipo", {}),
    "beta": (0.5, {}),
    "learning_rate": (2e-3, {}),
    "warmup_fraction": (1.0, {}),
    "init": ("OTHER", {}),
    "logprobs": ("average", {}),
    "label_smoothing": (0.3, {"loss": "robust"}),
    "target_margin": (0.25, {"loss": "simpo"}),
    "length_coef": (1.0, {"loss": "rdpo"}),
    "sft_coef": (0.5, {}),
    "use_margins": (True, {}),
    "epochs": (2, {"max_steps": None, "batch_size": 32}),
    "max_steps": (1, {}),
    "batch_size": (4, {}),
    "schedule": ("constant", {}),
    "weight_decay": (0.1, {}),
    "adam_beta1": (0.5, {}),
    "adam_beta2": (0.5, {}),
    "adam_epsilon": (1e-3, {}),
    "max_grad_norm": (1e-4, {"adam_epsilon": 1e-3}),
}
# `optimiser` names another library's AdamW: tests/unit/test_optim.py.
NEUTRAL = {"micro_batch_tokens", "checkpoint_every", "keep_checkpoints", "eval_every", "optimiser"}


def test_every_option_is_tried() -> None:
    assert OPTIONS.keys() | NEUTRAL == DPOConfig.model_fields.keys()
    assert ORPOConfig.model_fields.keys() <= {*DPOConfig.model_fields, "odds_ratio_coef"}


@pytest.fixture(scope="module")
def without(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[dict[str, Any]], bytes]:
    """Weights of a run with these settings, each trained once."""
    known: dict[str, bytes] = {}

    def trained(settings: dict[str, Any]) -> bytes:
        key = str(settings)
        if key not in known:
            out = tmp_path_factory.mktemp("without")
            run_stage_on(out, model, PAIRS, "dpo", settings)
            known[key] = weights_of(out, "dpo")
        return known[key]

    return trained


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_of_dpo_changes_the_outcome(
    option: str, model: Path, without: Callable[[dict[str, Any]], bytes], tmp_path: Path
) -> None:
    value, beside = OPTIONS[option]
    if value == "OTHER":
        value = str(saved_model(tmp_path / "other", PAIRS.groups, 1))
    run_stage_on(tmp_path, model, PAIRS, "dpo", beside | {option: value})
    assert weights_of(tmp_path, "dpo") != without(beside)


def test_the_weight_of_the_odds_ratio_changes_the_outcome(model: Path, tmp_path: Path) -> None:
    for coef in (0.1, 0.2):
        run(tmp_path / str(coef), model, "orpo", odds_ratio_coef=coef)
    assert weights_of(tmp_path / "0.1", "orpo") != weights_of(tmp_path / "0.2", "orpo")


@pytest.mark.parametrize(
    ("loss", "at_the_reference"),
    [("dpo", math.log(2)), ("hinge", 1.0), ("ipo", 25.0), ("apo_zero", 1.0), ("apo_down", 1.0)],
)
def test_training_begins_at_the_reference(loss: str, at_the_reference: float, model: Path, tmp_path: Path) -> None:
    """The policy is its own reference: all rewards are 0. IPO: (1 / (2 * 0.1))^2 = 25."""
    summary = run(tmp_path, model, loss=loss, learning_rate=0.0)
    for row in logged(tmp_path, "dpo"):
        assert row["train/loss"] == pytest.approx(at_the_reference, abs=1e-4)
        assert row["train/margin/mean"] == pytest.approx(0, abs=1e-5)
        assert row["train/chosen_reward/mean"] == pytest.approx(0, abs=1e-5)
    assert any("not tell chosen from rejected" in warning for warning in summary["warnings"])


@pytest.mark.parametrize(("stage", "section"), [("dpo", {"loss": "simpo"}), ("dpo", {"loss": "cpo"}), ("orpo", {})])
def test_losses_without_a_reference_compute_none(
    stage: str, section: dict[str, Any], model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> Tensor:
        raise AssertionError("a reference was computed")

    monkeypatch.setattr(likelihood, "reference_logprobs", refuse)
    summary = run(tmp_path, model, stage, **section)
    assert "without a reference" in summary["account"][0]
    assert not (tmp_path / stage / "reference").exists()
    with pytest.raises(AssertionError, match="a reference was computed"):
        run(tmp_path / "with", model)


def test_the_account_counts_prompts_pairs_and_what_changed(model: Path, tmp_path: Path) -> None:
    summary = run(tmp_path, model)
    names = [row["name"] for row in summary["headline"]]
    assert names[:2] == ["eval/accuracy", "eval/margin/mean"]
    assert [name for name in names if "log-probability" in name] == [
        "change of the chosen answers' log-probability", "change of the rejected answers' log-probability"
    ]  # fmt: skip
    assert all("low" in row for row in summary["headline"])
    assert "reference" in summary["account"][0] and "held-out pairs" in summary["account"][1]
    last = logged(tmp_path, "dpo")[-1]
    assert last["eval/chosen_logprob/mean"] < 0 and "eval/rejected_logprob/mean" in last


def test_without_a_held_out_part_the_summary_says_so(model: Path, tmp_path: Path) -> None:
    summary = run_stage_on(tmp_path, model, PAIRS, "dpo", {}, holdout=0.0)
    assert summary["headline"] == [] and "set `data.holdout`" in summary["warnings"][0]


def test_rated_lists_are_ranked_and_that_is_said(model: Path, tmp_path: Path) -> None:
    lists = [group(answer(f"good {i}", None, 3.0), answer("bad", None, 1.0), prompt=f"p{i}") for i in range(12)]
    printed = run(tmp_path, model, part=Part.of(lists, "lists"))["printed"]
    assert "12 lists of rated answers are ranked by score or label" in printed
    assert "the margins of 12 pairs are not used: `dpo.use_margins` is off" in printed


def test_pairs_that_are_there_in_both_orders_are_counted(model: Path, tmp_path: Path) -> None:
    """Twice the same judgement is none, nor is the same pair of answers to another prompt."""
    pairs = [("p", "a", "b"), ("p", "b", "a"), ("p", "a", "b"), ("q", "b", "c"), ("r", "c", "b"), ("q", "d", "e")]
    groups = [group(answer(first, 0), answer(second, 1), prompt=prompt) for prompt, first, second in pairs]
    printed = run(tmp_path / "both", model, part=Part.of([*groups, *PAIRS.groups], "both"))["printed"]
    assert "1 pairs are there in both orders: each teaches against the other" in printed
    assert "in both orders" not in run(tmp_path / "clean", model)["printed"]


@pytest.mark.parametrize(("stage", "section"), [("dpo", {"loss": "ipo"}), ("orpo", {})])
def test_margins_that_a_loss_has_no_place_for_are_named(
    stage: str, section: dict[str, Any], model: Path, tmp_path: Path
) -> None:
    printed = run(tmp_path, model, stage, **section)["printed"]
    loss = section.get("loss", stage)
    assert f"the margins of 8 pairs are not used: the {loss} loss has no place for them" in printed


@pytest.mark.parametrize(
    ("stage", "section"), [("dpo", {"loss": "apo_zero"}), ("dpo", {"loss": "apo_down"}), ("orpo", {})]
)
def test_soft_labels_that_a_loss_would_ignore_are_refused_before_anything_is_written(
    stage: str, section: dict[str, Any], model: Path, tmp_path: Path
) -> None:
    soft = [group(answer("a", 0), answer("b", 1), prompt=f"p{i}", soft_label=0.75) for i in range(12)]
    with pytest.raises(ConfigError, match=r"12 comparisons have soft labels.* takes every label as certain"):
        run(tmp_path / "run", model, stage, part=Part.of(soft, "soft"), **section)
    assert not (tmp_path / "run").exists()
    run(tmp_path / "fine", model, part=Part.of(soft, "soft"))


def test_comparisons_of_equal_answers_are_left_out_or_refused(model: Path, tmp_path: Path) -> None:
    same = [group(answer("same", 0), answer("same", 1), prompt=f"p{i}") for i in range(12)]
    with pytest.raises(DataError, match="no pair to learn from"):
        run(tmp_path / "same", model, part=Part.of(same, "same"))
    both = Part.of([*same, *PAIRS.groups], "both")
    assert "compare equal answers: left out" in run(tmp_path / "both", model, part=both)["printed"]


def test_chosen_answers_that_became_much_less_likely_are_a_warning() -> None:
    prompts = list(range(20))
    far = LikelihoodChange.of("chosen", [-3.0 - i / 10 for i in prompts], prompts, 200)
    assert far.fell_far and far.warning("do this").endswith("0.40 nats a token: do this.")
    assert not LikelihoodChange.of("chosen", [-3.0 - i / 10 for i in prompts], prompts, 2000).fell_far
    assert not LikelihoodChange.of("chosen", [-40.0 + 5 * i for i in prompts], prompts, 20).fell_far
    assert not LikelihoodChange.of("chosen", [3.0 + i / 10 for i in prompts], prompts, 200).fell_far


def test_the_warning_of_a_stage_names_the_keys_that_help(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preference_stage.LikelihoodChange, "fell_far", property(lambda self: True))
    assert "`dpo.sft_coef`" in " ".join(run(tmp_path / "a", model)["warnings"])
    assert "`orpo.odds_ratio_coef`" in " ".join(run(tmp_path / "b", model, "orpo")["warnings"])
