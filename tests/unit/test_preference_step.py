"""DPO and its kin, and ORPO: a step against a second computation, and items out of groups."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from accord.config import DPOConfig, OfflineFields, ORPOConfig, PairLoss
from accord.data.order import batch_indices
from accord.methods.offline import OfflineTrainer
from accord.methods.preference import (
    Pair,
    RankedAnswers,
    StepCounts,
    dpo_objective,
    orpo_objective,
    ranked_answers,
)
from accord.models import layout as layouts
from accord.models.layout import Layout
from accord.records import Group, TokenGroup
from models_support import PAD_ID, tiny_model, token_group
from stages_support import answers_to

# Two answers; two with a margin and a soft label; a ranking of four (first > second = third > fourth), whose pairs have
# margins of their own. Capital letters do not count. The reference's log-probabilities are invented.
ITEMS = [
    RankedAnswers(token_group("abc", "defg", "hij"), (Pair(1, 0),), (-9.5, -11.25)),
    RankedAnswers(token_group("ab", "klMNop", "qr"), (Pair(0, 1, 0.5, 0.75),), (-14.0, -6.5)),
    RankedAnswers(
        token_group("cdefg", "uvw", "RSt", "xy", "abcd"),
        (Pair(0, 1, 0.25), Pair(0, 2, 1.0), Pair(0, 3, 1.5), Pair(1, 3, 0.125), Pair(2, 3, 0.5)),
        (-10.0, -4.0, -7.5, -12.0),
    ),
    RankedAnswers(token_group("hi", "abcdefgh", "BCd"), (Pair(0, 1, 0.0, 0.625),), (-30.0, -3.5)),
]
SETTINGS: dict[str, Any] = {"learning_rate": 0.01, "batch_size": 3, "epochs": 2, "warmup_fraction": 0.0}
DPO: dict[str, Any] = {"beta": 0.5, "label_smoothing": 0.25, "target_margin": 0.75, "length_coef": 0.125}


def trainer(objective: Any, section: OfflineFields, layout: Layout, items: Any = ITEMS) -> tuple[Any, Any]:
    model = tiny_model("gpt2", dtype=torch.float64)
    made = OfflineTrainer(
        "dpo", model, items, section, section, objective,
        layout=layout, pad_id=PAD_ID, seed=0, evaluate=lambda: {},
    )  # fmt: skip
    return made, model


def dpo_trainer(layout: Layout = "shared", budget: int = 100_000, items: Any = ITEMS, **dpo: Any) -> tuple[Any, Any]:
    section = DPOConfig(**SETTINGS | dpo, micro_batch_tokens=budget)
    return trainer(dpo_objective(section), section, layout, items)


def orpo_trainer(layout: Layout = "shared", budget: int = 100_000, **orpo: Any) -> tuple[Any, Any]:
    section = ORPOConfig(**SETTINGS | orpo, micro_batch_tokens=budget)
    return trainer(orpo_objective(section), section, layout)


# --- a second computation, from plain rows without padding ------------------------------------------------------------


def log_loss(d: Tensor) -> Tensor:
    return torch.log(1 + torch.exp(-d))


def sigmoid(d: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-d))


Row = dict[str, Any]
B, EPS, GAMMA, ALPHA = DPO["beta"], DPO["label_smoothing"], DPO["target_margin"], DPO["length_coef"]


def either_way(loss: Callable[[Tensor], Tensor], d: Tensor, row: Row) -> Tensor:
    """The expected loss: with probability p the pair as it is, else with its answers, and so d and margin, swapped."""
    p = row["p"]
    return p * loss(d - row["m"]) + (1 - p) * loss(-(d - row["m"]))


# A pair's loss, from the log-probabilities W, L of the better and the worse answer, the reference's RW, RL, and the
# numbers of tokens NW, NL.
ORACLES: dict[str, Callable[[Row], Tensor]] = {
    "dpo": lambda r: either_way(log_loss, B * (r["W"] - r["RW"] - r["L"] + r["RL"]), r),
    "conservative": lambda r: either_way(
        lambda d: (1 - EPS) * log_loss(d) + EPS * log_loss(-d), B * (r["W"] - r["RW"] - r["L"] + r["RL"]), r
    ),
    "robust": lambda r: either_way(
        lambda d: ((1 - EPS) * log_loss(d) - EPS * log_loss(-d)) / (1 - 2 * EPS),
        B * (r["W"] - r["RW"] - r["L"] + r["RL"]),
        r,
    ),
    "ipo": lambda r: either_way(
        lambda d: (d - 1 / (2 * B)) ** 2, r["W"] - r["RW"] - r["L"] + r["RL"], {"p": r["p"], "m": 0.0}
    ),
    "hinge": lambda r: either_way(lambda d: (1 - d).clamp(min=0), B * (r["W"] - r["RW"] - r["L"] + r["RL"]), r),
    "rdpo": lambda r: either_way(log_loss, B * (r["W"] - r["RW"] - r["L"] + r["RL"]) + ALPHA * (r["NW"] - r["NL"]), r),
    "simpo": lambda r: either_way(lambda d: log_loss(d - GAMMA), B * (r["W"] - r["L"]), r),
    "cpo": lambda r: either_way(log_loss, B * (r["W"] - r["L"]), r),
    "apo_zero": lambda r: 1 - sigmoid(B * (r["W"] - r["RW"])) + sigmoid(B * (r["L"] - r["RL"])),
    "apo_down": lambda r: sigmoid(B * (r["W"] - r["RW"])) + 1 - sigmoid(B * (r["W"] - r["RW"] - r["L"] + r["RL"])),
}


def answer_logprobs(model: Any, tokens: TokenGroup, index: int) -> Tensor:
    """log p of every counted token of one answer, from one row without padding."""
    ids = tokens.prompt_ids + tokens.completions[index].ids
    logits = model(input_ids=torch.tensor([ids])).logits[0, len(tokens.prompt_ids) - 1 : -1]
    logprobs = logits.log_softmax(-1)
    counted = zip(tokens.completions[index].ids, tokens.completions[index].mask, strict=True)
    return torch.stack([logprobs[t, token] for t, (token, counts) in enumerate(counted) if counts])


def first_batch() -> list[RankedAnswers]:
    return [ITEMS[i] for i in batch_indices(1, len(ITEMS), 3, 0, "dpo")]


def rows_of(model: Any, items: list[RankedAnswers], average: bool) -> list[Row]:
    rows = []
    for item in items:
        said = [answer_logprobs(model, item.tokens, index) for index in range(len(item.tokens.completions))]
        for pair in item.pairs:
            w, l = said[pair.chosen], said[pair.rejected]
            nw, nl = (len(w), len(l)) if average else (1, 1)
            rows.append(
                {
                    "W": w.sum() / nw, "L": l.sum() / nl, "NW": len(w), "NL": len(l),
                    "RW": item.ref_logprobs[pair.chosen] / nw, "RL": item.ref_logprobs[pair.rejected] / nl,
                    "m": pair.margin, "p": pair.soft_label,
                }
            )  # fmt: skip
    return rows


def norm(model: Any) -> float:
    return math.sqrt(sum(float(p.grad.square().sum()) for p in model.parameters() if p.grad is not None))


BEST = ([1], [0], [0], [0])  # of each item, by hand


def best_answers(model: Any, items: list[RankedAnswers]) -> Tensor:
    """log p of every counted token of the items' best answers."""
    places = [(item, index) for item in items for index in BEST[ITEMS.index(item)]]
    return torch.cat([answer_logprobs(model, item.tokens, index) for item, index in places])


@pytest.mark.parametrize(("layout", "budget"), [("shared", 24), ("plain", 100_000)])
@pytest.mark.parametrize(
    ("loss", "changes"),
    [
        *((loss, {}) for loss in get_args(PairLoss)),
        ("dpo", {"logprobs": "average", "sft_coef": 0.5}),
        ("ipo", {"logprobs": "average"}),
        ("simpo", {"logprobs": "sum"}),
        ("cpo", {"sft_coef": 0.0}),
    ],
)
def test_a_step_of_dpo_is_the_mean_over_all_pairs_of_its_batch(
    loss: str, changes: dict[str, Any], layout: Layout, budget: int
) -> None:
    average = changes.get("logprobs") == "average" or (loss == "simpo" and "logprobs" not in changes)
    imitation = changes.get("sft_coef", float(loss == "cpo"))
    made, model = dpo_trainer(layout, budget, loss=loss, **DPO, **changes)
    oracle = copy.deepcopy(model)
    rows = rows_of(oracle, first_batch(), average)
    nll = -best_answers(oracle, first_batch()).mean()
    total = torch.stack([ORACLES[loss](row) for row in rows]).mean() + imitation * nll
    total.backward()
    row = made.step(1).metrics
    assert row["train/loss"] == pytest.approx(total.item(), rel=1e-9)
    assert row["train/grad_norm"] == pytest.approx(norm(oracle), rel=1e-8)
    assert row.get("train/imitation_loss", 0.0) == pytest.approx(nll.item() if imitation else 0.0, rel=1e-9)


@pytest.mark.parametrize(("loss", "has_reference"), [("dpo", True), ("ipo", True), ("simpo", False), ("cpo", False)])
def test_the_logged_rewards_and_likelihoods_are_means_over_pairs(loss: str, has_reference: bool) -> None:
    """Rewards: beta times the log-ratio, or times the log-probability without a reference, per token for simpo."""
    made, model = dpo_trainer(loss=loss, **DPO)
    rows = rows_of(copy.deepcopy(model), first_batch(), average=loss == "simpo")
    sums = rows_of(copy.deepcopy(model), first_batch(), average=False)
    chosen = [B * (row["W"].item() - (row["RW"] if has_reference else 0)) for row in rows]
    rejected = [B * (row["L"].item() - (row["RL"] if has_reference else 0)) for row in rows]
    n = len(rows)
    row = made.step(1).metrics
    expected = {
        "chosen_reward/mean": sum(chosen) / n,
        "rejected_reward/mean": sum(rejected) / n,
        "margin/mean": (sum(chosen) - sum(rejected)) / n,
        "accuracy": sum(a > b for a, b in zip(chosen, rejected, strict=True)) / n,
        "chosen_logprob/mean": sum(row["W"].item() for row in sums) / n,
        "rejected_logprob/mean": sum(row["L"].item() for row in sums) / n,
    }
    assert 0 < expected["accuracy"] < 1
    assert {name: row[f"train/{name}"] for name in expected} == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("layout", "budget"), [("shared", 24), ("plain", 100_000)])
def test_a_step_of_orpo_is_imitation_and_odds_ratio_over_all_pairs_of_its_batch(layout: Layout, budget: int) -> None:
    made, model = orpo_trainer(layout, budget, odds_ratio_coef=0.25)
    oracle = copy.deepcopy(model)
    rows = rows_of(oracle, first_batch(), average=True)

    def log_odds(a: Tensor) -> Tensor:
        return torch.log(torch.exp(a) / (1 - torch.exp(a)))

    nll = torch.stack([-row["W"] for row in rows]).mean()
    odds = torch.stack([log_loss(log_odds(row["W"]) - log_odds(row["L"])) for row in rows]).mean()
    (nll + 0.25 * odds).backward()
    row = made.step(1).metrics
    assert row["train/loss"] == pytest.approx((nll + 0.25 * odds).item(), rel=1e-9)
    assert row["train/imitation_loss"] == pytest.approx(nll.item(), rel=1e-9)
    assert row["train/odds_ratio_loss"] == pytest.approx(odds.item(), rel=1e-9)
    assert row["train/grad_norm"] == pytest.approx(norm(oracle), rel=1e-8)


def numbers(row: Any) -> dict[str, float]:
    return {name: value for name, value in row.items() if not name.startswith(("time/", "system/"))}


@pytest.mark.parametrize(
    "make",
    [
        lambda layout, budget: dpo_trainer(layout, budget, sft_coef=0.5),
        lambda layout, budget: dpo_trainer(layout, budget, loss="simpo"),
        orpo_trainer,
    ],
    ids=["dpo", "simpo", "orpo"],
)
def test_neither_layout_nor_micro_batches_change_weights_or_metrics(
    make: Callable[..., tuple[Any, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows are packed wherever their lengths differ."""
    monkeypatch.setattr(layouts, "ROW_TOKENS", 0)
    runs = []
    for layout, budget in (
        ("plain", 100_000), ("plain", 16), ("shared", 16), ("shared", 40), ("shared_packed", 40), ("plain_packed", 40),
    ):  # fmt: skip
        made, model = make(layout, budget)
        rows = [numbers(made.step(step).metrics) for step in range(1, made.total_steps + 1)]
        runs.append((model.state_dict(), rows))
    weights, rows = runs[0]
    assert len(rows) == 4 and any(not torch.equal(v, tiny_weights()[name]) for name, v in weights.items())
    for other_weights, other_rows in runs[1:]:
        for name, value in weights.items():
            torch.testing.assert_close(other_weights[name], value, rtol=0, atol=1e-9)
        for row, other in zip(rows, other_rows, strict=True):
            assert other == pytest.approx(row, rel=1e-8, abs=1e-9)


def tiny_weights() -> dict[str, Tensor]:
    return tiny_model("gpt2", dtype=torch.float64).state_dict()


def test_a_ranking_of_four_runs_each_answer_once_and_learns_from_its_five_pairs() -> None:
    """The same loss and gradient as its pairs give one by one in a batch, in which answers are run ten times."""
    ranking = ITEMS[2]
    apart = [
        RankedAnswers(
            TokenGroup(
                ranking.tokens.prompt_ids,
                (ranking.tokens.completions[pair.chosen], ranking.tokens.completions[pair.rejected]),
            ),
            (Pair(0, 1, pair.margin, pair.soft_label),),
            (ranking.ref_logprobs[pair.chosen], ranking.ref_logprobs[pair.rejected]),
        )
        for pair in ranking.pairs
    ]
    together, one_by_one = (
        dpo_trainer(items=items, batch_size=5, **DPO)[0].step(1).metrics for items in ([ranking], apart)
    )
    assert (together["train/sequences"], one_by_one["train/sequences"]) == (4, 10)
    for name in ("train/loss", "train/grad_norm", "train/margin/mean", "train/chosen_logprob/mean"):
        assert together[name] == pytest.approx(one_by_one[name], rel=1e-9)


def test_the_margins_of_held_out_pairs_are_the_losss_own() -> None:
    objective = dpo_objective(DPOConfig(**DPO))
    logprobs = torch.arange(-1.0, -11.0, -1.0)
    margins = objective.margins(ITEMS, logprobs)
    _, sums = objective.loss_of(ITEMS, logprobs, StepCounts.of(ITEMS))
    assert len(margins) == sums["pairs"] == 8
    assert sum(margins) == pytest.approx(sums["margin"], rel=1e-6)
    assert margins[0] == pytest.approx(B * ((-2 + 11.25) - (-1 + 9.5)), rel=1e-6)


# --- items out of groups ----------------------------------------------------------------------------------------------


def answer(text: str, rank: int | None, score: float | None = None) -> tuple[str, dict[str, Any]]:
    return text, {"rank": rank, "score": score}


def group(*answers: tuple[str, dict[str, Any]], prompt: str = "ask", **rest: Any) -> Group:
    return answers_to(prompt, *answers, **rest)


def test_equal_ranks_and_equal_answers_make_no_pair_and_scores_make_margins() -> None:
    ranked = group(answer("c", 2, 1.0), answer("a", 0, 4.0), answer("b", 1, 2.5), answer("a", 1, 2.5))
    tokens = token_group("x", "c", "a", "b", "a")
    made = ranked_answers(ranked, tokens, use_margins=True)
    assert made.pairs == (Pair(1, 0, 3.0), Pair(2, 0, 1.5), Pair(3, 0, 1.5), Pair(1, 2, 1.5))
    plain = ranked_answers(ranked, tokens, use_margins=False)
    assert {pair.margin for pair in plain.pairs} == {0.0}


def test_the_best_answers_are_those_that_none_beats() -> None:
    assert [list(item.best) for item in ITEMS] == list(BEST)
    tied = ranked_answers(
        group(answer("a", 0), answer("b", 0), answer("c", 1)), token_group("x", "a", "b", "c"), use_margins=False
    )
    assert tied.best == (0, 1)


def test_a_pair_keeps_its_margin_and_soft_label() -> None:
    pair = group(answer("a", 0, 5.0), answer("b", 1, 1.0), margin=0.5, soft_label=0.75)
    made = ranked_answers(pair, token_group("x", "a", "b"), use_margins=True)
    assert made.pairs == (Pair(0, 1, 0.5, 0.75),)
