"""KTO and BCO: a step against a second computation, mismatched pairs, weights, and what the stage says and refuses."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from accord.config import KTOConfig
from accord.data.order import batch_indices
from accord.errors import ConfigError, DataError
from accord.losses.kto import class_weights
from accord.methods.corpus import Corpus, Part
from accord.methods.kto import (
    JudgedAnswer,
    RewardShift,
    bco_objective,
    derangement,
    kto_objective,
    with_mismatched,
    with_reference,
)
from accord.methods.offline import OfflineTrainer
from accord.models.layout import Layout
from accord.records import Group, TokenGroup
from models_support import PAD_ID, tiny_model, token_group
from stages_support import answers_to, logged, run_stage_on, saved_model, weights_of

# Answers to four prompts, each with the answer to another prompt beside it. Capital letters do not count. The
# reference's log-probabilities are invented; those of the mismatched answers are low, so that the reference point is
# not 0.
ITEMS = [
    JudgedAnswer(token_group("abc", "defg"), True, token_group("abc", "qr"), -11.5, -16.0),
    JudgedAnswer(token_group("ab", "klMNop"), False, token_group("ab", "defg"), -12.0, -21.25),
    JudgedAnswer(token_group("cdefg", "uvw"), True, token_group("cdefg", "klMNop"), -10.0, -17.5),
    JudgedAnswer(token_group("hi", "qr"), False, token_group("hi", "uvw"), -3.5, -20.0),
    JudgedAnswer(token_group("ab", "xyzab"), True, token_group("ab", "cd"), -15.0, -14.0),
]
BETA = 0.5
WEIGHTS = (1.25, 0.75)
SETTINGS: dict[str, Any] = {
    "learning_rate": 0.01, "batch_size": 3, "epochs": 2, "warmup_fraction": 0.0, "beta": BETA,
}  # fmt: skip


def trainer(loss: str, layout: Layout = "plain", budget: int = 100_000, items: Any = ITEMS, **kto: Any) -> Any:
    """(trainer, model, BCO's memory)"""
    model = tiny_model("gpt2", dtype=torch.float64)
    section = KTOConfig(**SETTINGS | kto, micro_batch_tokens=budget)
    memory = RewardShift()
    objective = kto_objective(section, WEIGHTS) if loss == "kto" else bco_objective(section, memory)
    made = OfflineTrainer(
        "kto", model, items, section, section, objective,
        layout=layout, pad_id=PAD_ID, seed=0, evaluate=lambda: {}, memory=memory if loss == "bco" else None,
    )  # fmt: skip
    return made, model, memory


def logprob(model: Any, tokens: TokenGroup) -> Tensor:
    """log p of the counted tokens of a group's one answer, from one row without padding."""
    (completion,) = tokens.completions
    logits = model(input_ids=torch.tensor([tokens.prompt_ids + completion.ids])).logits[0]
    logprobs = logits[len(tokens.prompt_ids) - 1 : -1].log_softmax(-1)
    counted = zip(completion.ids, completion.mask, strict=True)
    return torch.stack([logprobs[t, token] for t, (token, counts) in enumerate(counted) if counts]).sum()


def batch(step: int) -> list[JudgedAnswer]:
    return [ITEMS[i] for i in batch_indices(step, len(ITEMS), 3, 0, "kto")]


def norm(model: Any) -> float:
    return math.sqrt(sum(float(p.grad.square().sum()) for p in model.parameters() if p.grad is not None))


def sigmoid(d: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-d))


def log_ratios(model: Any, items: list[JudgedAnswer]) -> list[Tensor]:
    return [logprob(model, item.tokens) - item.ref_logprob for item in items]


@pytest.mark.parametrize(("layout", "budget"), [("shared", 16), ("plain", 100_000)])
def test_a_step_of_kto_compares_with_the_mismatched_pairs_of_the_whole_step(layout: Layout, budget: int) -> None:
    made, model, _ = trainer("kto", layout, budget)
    oracle = copy.deepcopy(model)
    items = batch(1)
    mismatched = [(logprob(oracle, i.mismatched) - i.mismatched_ref_logprob).item() for i in items if i.mismatched]
    point = max(0.0, sum(mismatched) / 3)
    assert point > 0.1
    losses = [
        WEIGHTS[0] * (1 - sigmoid(BETA * (ratio - point)))
        if item.desirable
        else WEIGHTS[1] * (1 - sigmoid(BETA * (point - ratio)))
        for item, ratio in zip(items, log_ratios(oracle, items), strict=True)
    ]
    loss = torch.stack(losses).mean()
    loss.backward()
    row = made.step(1).metrics
    assert row["train/kto_reference_point"] == pytest.approx(point, rel=1e-9)
    assert row["train/loss"] == pytest.approx(loss.item(), rel=1e-9)
    assert row["train/grad_norm"] == pytest.approx(norm(oracle), rel=1e-8)


@pytest.mark.parametrize(("layout", "budget"), [("shared", 16), ("plain", 100_000)])
def test_two_steps_of_bco_compare_with_the_mean_of_all_rewards_so_far(layout: Layout, budget: int) -> None:
    made, model, memory = trainer("bco", layout, budget)
    seen: list[float] = []
    for step, size in ((1, 3), (2, 2)):
        oracle = copy.deepcopy(model)
        items = batch(step)
        ratios = log_ratios(oracle, items)
        seen += [BETA * ratio.item() for ratio in ratios]
        shift = sum(seen) / len(seen)
        losses = [
            torch.log(1 + torch.exp(-(BETA * ratio - shift) if item.desirable else BETA * ratio - shift))
            for item, ratio in zip(items, ratios, strict=True)
        ]
        assert len(items) == size
        loss = torch.stack(losses).mean()
        loss.backward()
        row = made.step(step).metrics
        assert row["train/bco_reward_shift"] == pytest.approx(shift, rel=1e-9)
        assert row["train/loss"] == pytest.approx(loss.item(), rel=1e-9)
        assert row["train/grad_norm"] == pytest.approx(norm(oracle), rel=1e-8)
    assert memory.values() == {"sum": pytest.approx(sum(seen)), "count": 5}


def test_the_logged_rewards_are_means_over_their_own_kind() -> None:
    made, model, _ = trainer("kto")
    items = batch(1)
    ratios = [ratio.item() for ratio in log_ratios(copy.deepcopy(model), items)]
    row = made.step(1).metrics
    for kind, name in ((True, "desirable"), (False, "undesirable")):
        own = [i for i, item in enumerate(items) if item.desirable == kind]
        assert own
        assert row[f"train/{name}_reward/mean"] == pytest.approx(BETA * sum(ratios[i] for i in own) / len(own))
        said = [ratios[i] + items[i].ref_logprob for i in own]
        assert row[f"train/{name}_logprob/mean"] == pytest.approx(sum(said) / len(own))
    point = row["train/kto_reference_point"]
    right = [(ratio > point) == item.desirable for ratio, item in zip(ratios, items, strict=True)]
    assert row["train/accuracy"] == pytest.approx(sum(right) / 3)


@pytest.mark.parametrize("loss", ["kto", "bco"])
@pytest.mark.parametrize("kind", [True, False])
def test_a_step_with_one_kind_only_trains_and_the_other_kind_has_no_mean(loss: str, kind: bool) -> None:
    items = [item for item in ITEMS if item.desirable == kind][:2]
    made, _, _ = trainer(loss, items=items)
    row = made.step(1).metrics
    assert math.isfinite(row["train/loss"]) and row["train/grad_norm"] > 0
    present, absent = ("desirable", "undesirable") if kind else ("undesirable", "desirable")
    assert math.isfinite(row[f"train/{present}_reward/mean"]) and math.isnan(row[f"train/{absent}_reward/mean"])


def numbers(row: Any) -> dict[str, float]:
    """What does not depend on the clock, without the means of a kind that a step lacks."""
    return {n: v for n, v in row.items() if not n.startswith(("time/", "system/")) and not math.isnan(v)}


@pytest.mark.parametrize("loss", ["kto", "bco"])
def test_neither_layout_nor_micro_batches_change_weights_or_metrics(loss: str) -> None:
    runs = []
    for layout, budget in (("plain", 100_000), ("plain", 16), ("shared", 16)):
        made, model, _ = trainer(loss, layout, budget)  # type: ignore[arg-type]
        rows = [numbers(made.step(step).metrics) for step in range(1, made.total_steps + 1)]
        runs.append((model.state_dict(), rows))
    weights, rows = runs[0]
    assert len(rows) == 4
    for other_weights, other_rows in runs[1:]:
        for name, value in weights.items():
            torch.testing.assert_close(other_weights[name], value, rtol=0, atol=1e-9)
        for row, other in zip(rows, other_rows, strict=True):
            assert other == pytest.approx(row, rel=1e-8, abs=1e-9)


def test_bcos_shift_survives_a_restart() -> None:
    old, _, _ = trainer("bco")
    old.step(1)
    captured = old.capture()
    assert captured.values["memory"]["count"] == 3
    captured.tensors["model"] = {name: value.clone() for name, value in captured.tensors["model"].items()}
    captured.tensors["optimiser"] = {name: value.clone() for name, value in captured.tensors["optimiser"].items()}
    expected = numbers(old.step(2).metrics)
    new, _, _ = trainer("bco")
    new.restore(captured)
    assert numbers(new.step(2).metrics) == expected
    forgotten, _, memory = trainer("bco")
    forgotten.restore(captured)
    memory.restore({"sum": 0.0, "count": 0})
    assert forgotten.step(2).metrics["train/bco_reward_shift"] != expected["train/bco_reward_shift"]


def test_measuring_held_out_answers_leaves_bcos_shift_alone() -> None:
    memory = RewardShift()
    objective = bco_objective(KTOConfig.model_validate({"beta": BETA}), memory)
    memory.include(torch.tensor([1.0, 3.0]))
    step = objective.held_out(ITEMS, lambda groups: torch.zeros(len(groups)))
    assert float(step.point) == 2.0 and memory.values() == {"sum": 4.0, "count": 2}
    assert float(objective.begin(ITEMS[:2], lambda groups: torch.zeros(len(groups))).point) != 2.0


# --- mismatched pairs -------------------------------------------------------------------------------------------------


@settings(max_examples=100, derandomize=True, deadline=None)
@given(st.lists(st.integers(0, 6), min_size=2, max_size=30), st.integers(0, 5))
def test_every_answer_is_set_against_one_other_prompt_whenever_that_is_possible(prompts: list[int], seed: int) -> None:
    """Possible exactly when no prompt has more than half of the answers (Hall's theorem)."""
    if 2 * max(Counter(prompts).values()) > len(prompts):
        with pytest.raises(DataError, match=r"belong to one prompt.*`kto.loss` = bco"):
            derangement(prompts, seed)
        return
    others = derangement(prompts, seed)
    assert sorted(others) == list(range(len(prompts)))
    assert all(prompts[i] != prompts[j] for i, j in enumerate(others))


def test_who_is_set_against_whom_follows_from_the_seed() -> None:
    prompts = list(range(20))
    assert derangement(prompts, 1) == derangement(prompts, 1) != derangement(prompts, 2)


def test_an_answer_behind_a_longer_prompt_is_cut_to_what_fits() -> None:
    items = [JudgedAnswer(token_group("abcdef", "g"), True), JudgedAnswer(token_group("a", "hIjkl"), False)]
    made, cut = with_mismatched(items, [items[1].tokens.completions[0], items[0].tokens.completions[0]], 8)
    assert cut == 1
    assert made[0].mismatched == token_group("abcdef", "hI") and made[1].mismatched == token_group("a", "g")
    assert [item.groups for item in made] == [(item.tokens, item.mismatched) for item in made]


def test_reference_numbers_go_to_the_answers_they_are_of() -> None:
    bare = [JudgedAnswer(item.tokens, item.desirable, item.mismatched) for item in ITEMS[:2]]
    made = with_reference(bare, [-1.0, -2.0, -3.0, -4.0])
    assert [(item.ref_logprob, item.mismatched_ref_logprob) for item in made] == [(-1.0, -2.0), (-3.0, -4.0)]
    alone = with_reference([JudgedAnswer(item.tokens, item.desirable) for item in ITEMS[:2]], [-1.0, -2.0])
    assert [item.ref_logprob for item in alone] == [-1.0, -2.0]


# --- data -------------------------------------------------------------------------------------------------------------


def marked(prompt: str, text: str, label: bool) -> Group:
    return answers_to(prompt, (text, {"label": label}))


def scored(prompt: str, text: str, score: float) -> Group:
    return answers_to(prompt, (text, {"score": score}))


def pair(prompt: str, chosen: str, rejected: str, **rest: Any) -> Group:
    return answers_to(prompt, (chosen, {"rank": 0}), (rejected, {"rank": 1}), **rest)


def labels(part: Part) -> list[tuple[str, bool | None]]:
    return [(c.text, c.label) for g in part.groups for c in g.completions]


def test_labels_are_single_answers_and_what_was_converted_or_left_out_is_said() -> None:
    groups = [marked("a", "good", True), pair("b", "yes", "no", soft_label=0.75), scored("c", "fine", 0.5)]
    found = Corpus(preferences=Part.of(groups, "mixed")).labelled()
    assert labels(found) == [("good", True), ("yes", True), ("no", False)]
    assert all(len(g.completions) == 1 for g in found.groups)
    said = "; ".join(found.notes)
    assert "1 pairs give a desirable and an undesirable answer each" in said
    assert "1 answers with a score and no label left out" in said
    assert "1 soft labels of pairs are taken as certain" in said


def test_scores_alone_are_refused_with_the_method_that_reads_them() -> None:
    corpus = Corpus(preferences=Part.of([scored("a", "x", 1.0), scored("b", "y", 2.0)], "scores"))
    with pytest.raises(DataError, match=r"kto learns from marks.*`label`.*or use ilql"):
        corpus.labelled()


def test_rankings_are_refused_with_the_methods_that_read_them() -> None:
    ranking = answers_to("a", *((text, {"rank": rank}) for rank, text in enumerate("xyz")))
    with pytest.raises(DataError, match="Rankings are for reward, dpo and orpo"):
        Corpus(preferences=Part.of([ranking], "rankings")).labelled()


def test_single_answers_are_refused_by_dpo_with_the_methods_that_read_them() -> None:
    with pytest.raises(DataError, match="Single answers with labels are for kto or ilql"):
        Corpus(preferences=Part.of([marked("a", "good", True)], "labels")).comparisons()


# --- the stage --------------------------------------------------------------------------------------------------------

LABELLED = Part.of(
    [
        made
        for i in range(14)
        for made in (
            marked(f"shall I {i}?", f"yes {i}", True),
            marked(f"will you {i}?", "no, never, no", False),
            marked(f"who wants {i}?", f"certainly, please {i}", True),
        )
    ],
    "labelled",
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_model(tmp_path_factory.mktemp("model") / "start", LABELLED.groups, 0)


def run(out: Path, model: Path, part: Part = LABELLED, **section: Any) -> dict[str, Any]:
    return run_stage_on(out, model, part, "kto", section)


OPTIONS: dict[str, tuple[Any, dict[str, Any]]] = {
    "loss": ("bco", {}),
    "beta": (0.5, {}),
    "learning_rate": (2e-3, {}),
    "warmup_fraction": (1.0, {}),
    "init": ("OTHER", {}),
    "desirable_weight": (2.0, {}),
    "undesirable_weight": (3.0, {}),
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
    assert OPTIONS.keys() | NEUTRAL == KTOConfig.model_fields.keys()


@pytest.fixture(scope="module")
def without(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[dict[str, Any]], bytes]:
    """Weights of a run with these settings, each trained once."""
    known: dict[str, bytes] = {}

    def trained(section: dict[str, Any]) -> bytes:
        key = str(section)
        if key not in known:
            out = tmp_path_factory.mktemp("without")
            run_stage_on(out, model, LABELLED, "kto", section)
            known[key] = weights_of(out, "kto")
        return known[key]

    return trained


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_changes_the_outcome(
    option: str, model: Path, without: Callable[[dict[str, Any]], bytes], tmp_path: Path
) -> None:
    value, beside = OPTIONS[option]
    if value == "OTHER":
        value = str(saved_model(tmp_path / "other", LABELLED.groups, 1))
    run_stage_on(tmp_path, model, LABELLED, "kto", beside | {option: value})
    assert weights_of(tmp_path, "kto") != without(beside)


@pytest.mark.parametrize(("loss", "at_the_reference"), [("kto", 0.5), ("bco", math.log(2))])
def test_training_begins_at_the_reference(loss: str, at_the_reference: float, model: Path, tmp_path: Path) -> None:
    """All rewards are 0: an answer costs half its weight (KTO), or ln 2 (BCO)."""
    section: dict[str, Any] = {"loss": loss, "learning_rate": 0.0}
    if loss == "kto":
        section |= {"desirable_weight": 1.0, "undesirable_weight": 1.0}
    summary = run_stage_on(tmp_path, model, LABELLED, "kto", section)
    for row in logged(tmp_path, "kto"):
        assert row["train/loss"] == pytest.approx(at_the_reference, abs=1e-5)
        assert row["train/desirable_reward/mean"] == pytest.approx(0, abs=1e-5)
        assert row["train/" + ("kto_reference_point" if loss == "kto" else "bco_reward_shift")] < 1e-5
    assert any("no better than always saying the commoner mark" in warning for warning in summary["warnings"])


def test_weights_balance_the_two_kinds_and_are_said(model: Path, tmp_path: Path) -> None:
    """Twice as many desirable answers: undesirable ones weigh 2 * 3/4 = 1.5, the end of the interval [1, 4/3]."""
    printed = run(tmp_path, model)["printed"]
    desirable, undesirable = (int(n) for n in _counted(printed))
    expected = class_weights(desirable, undesirable)
    assert f"weights: desirable answers {expected[0]:.3g}, undesirable {expected[1]:.3g}" in printed
    assert expected[1] > 1


def _counted(printed: str) -> tuple[str, str]:
    words = printed.split("The policy learned from ")[1].split()
    return words[0], words[3]


@pytest.mark.parametrize("kind", [True, False])
def test_data_of_one_kind_is_refused_unless_the_weights_are_given(kind: bool, model: Path, tmp_path: Path) -> None:
    one = Part.of([g for g in LABELLED.groups if g.completions[0].label == kind], "one")
    missing = "undesirable" if kind else "desirable"
    with pytest.raises(ConfigError, match=rf"answers to learn from is {missing}, so there is nothing to tell apart"):
        run(tmp_path / "refused", model, part=one)
    run(tmp_path / "given", model, part=one, desirable_weight=1.0, undesirable_weight=1.0)
    with pytest.raises(ConfigError, match="so there is nothing to tell apart"):
        run(tmp_path / "bco", model, part=one, loss="bco")


def test_the_account_says_what_the_marks_alone_would_give(model: Path, tmp_path: Path) -> None:
    summary = run(tmp_path, model)
    names = [row["name"] for row in summary["headline"]]
    assert names == [
        "eval/accuracy",
        "change of the desirable answers' log-probability",
        "change of the undesirable answers' log-probability",
    ]
    assert "always saying the commoner mark" in summary["account"][1]
    last = logged(tmp_path, "kto")[-1]
    assert {"eval/loss", "eval/accuracy", "eval/kto_reference_point", "eval/desirable_reward/mean"} <= last.keys()


def test_bco_needs_no_mismatched_answers(model: Path, tmp_path: Path) -> None:
    """All answers to one prompt: KTO has nothing to compare with, BCO does not care."""
    one = Part.of([marked("ask", f"yes {i}", i % 2 == 0) for i in range(10)], "one prompt")
    with pytest.raises(DataError, match="belong to one prompt"):
        run_stage_on(tmp_path / "kto", model, one, "kto", {}, holdout=0.0)
    run_stage_on(tmp_path / "bco", model, one, "kto", {"loss": "bco"}, holdout=0.0)


def test_weights_are_refused_beside_bco(model: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"`kto\.desirable_weight` is read only by `kto\.loss` = kto, and `kto\.loss` is bco"
    ):
        run(tmp_path, model, loss="bco", desirable_weight=2.0)
