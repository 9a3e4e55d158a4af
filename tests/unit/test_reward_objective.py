"""One step of the reward model with several heads, with length decorrelation and with the span loss."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from accord.config import RewardConfig
from accord.data.order import batch_indices
from accord.losses import alignment_penalty, length_penalty
from accord.methods.offline import OfflineTrainer
from accord.methods.reward import Comparison, LengthDecorrelation, RewardObjective, bootstrap_weight, read_scores
from accord.models.heads import keep_heads
from accord.models.layout import Layout, collate
from accord.models.load import reward_model_from
from accord.models.token_scores import head_scores, score_completions, token_head_scores
from models_support import PAD_ID, tiny_model, token_group

COMPARISONS = [
    Comparison(token_group("abc", "defg", "hij"), (0, 1)),
    Comparison(token_group("ab", "klmnop", "q"), (1, 0), margin=0.5),
    Comparison(token_group("cdefg", "rst", "rvw"), (0, 1), soft_label=0.75),
    Comparison(token_group("hi", "abcdefgh", "bcd"), (1, 0)),
    Comparison(token_group("xy", "a", "bcd", "ef"), (1, 0, 2)),
]
ITEMS = [replace(item, tokens=replace(item.tokens, prompt_id=index)) for index, item in enumerate(COMPARISONS)]
SEED = 0
VARIANTS: dict[str, dict[str, Any]] = {
    "heads": {"heads": 3},
    "length": {"length_decorrelation": 0.7},
    "heads and length": {"heads": 2, "length_decorrelation": 0.7},
    "heads and span": {"heads": 2, "loss": "divergence_span"},
}
every_variant = pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS.keys())


def trainer(variant: dict[str, Any], layout: Layout, budget: int) -> tuple[OfflineTrainer[Any], Any]:
    section = RewardConfig(learning_rate=0.01, batch_size=3, epochs=2, micro_batch_tokens=budget, **variant)
    extra = 1 if section.length_decorrelation else 0
    model = reward_model_from(tiny_model("gpt2", dtype=torch.float64), 0, heads=section.heads + extra)
    length = None
    if extra:
        reading: dict[str, Any] = {"layout": layout, "pad_id": PAD_ID, "budget": budget}
        length = LengthDecorrelation(section.length_decorrelation, lambda items: read_scores(model, items, **reading))
    objective = RewardObjective(0.1, heads=section.heads, seed=SEED, loss=section.loss, length=length)
    return OfflineTrainer(
        "reward", model, ITEMS, section, section, objective,
        layout=layout, pad_id=PAD_ID, seed=SEED, evaluate=lambda: {"eval/loss": 1.5},
    ), model  # fmt: skip


def numbers(row: Any) -> dict[str, float]:
    return {k: v for k, v in row.items() if not k.startswith(("time/", "system/"))}


@every_variant
def test_neither_layout_nor_micro_batches_change_weights_or_metrics(variant: dict[str, Any]) -> None:
    """float64, so that what remains is the order of summation. The correlations with length are of the whole step."""
    runs = []
    for layout, budget in (("plain", 100_000), ("plain", 16), ("shared", 24)):
        made, model = trainer(variant, layout, budget)  # type: ignore[arg-type]
        rows = [numbers(made.step(step).metrics) for step in range(1, made.total_steps + 1)]
        runs.append((model.state_dict(), rows))
    weights, rows = runs[0]
    for other_weights, other_rows in runs[1:]:
        for name, value in weights.items():
            torch.testing.assert_close(other_weights[name], value, rtol=0, atol=1e-9)
        for row, other in zip(rows, other_rows, strict=True):
            assert other == pytest.approx(row, rel=1e-8, abs=1e-9)


@every_variant
def test_a_captured_trainer_goes_on_as_the_old_one_bit_for_bit(variant: dict[str, Any]) -> None:
    old, old_model = trainer(variant, "shared", 32)
    old.step(1)
    captured = old.capture()
    for part in captured.tensors:
        captured.tensors[part] = {name: value.clone() for name, value in captured.tensors[part].items()}
    first = numbers(old.step(2).metrics)
    new, new_model = trainer(variant, "shared", 32)
    new.restore(captured)
    assert numbers(new.step(2).metrics) == first
    assert all(torch.equal(v, new_model.state_dict()[name]) for name, v in old_model.state_dict().items())


def first_batch() -> list[Comparison]:
    return [ITEMS[i] for i in batch_indices(1, len(ITEMS), 3, SEED, "reward")]


def pair_loss(item: Comparison, scores: torch.Tensor) -> torch.Tensor:
    """(), of one head's scores of an item's answers, as the objective's docstring has it."""
    p, losses = item.soft_label, []
    for i, rank in enumerate(item.ranks):
        for j, other in enumerate(item.ranks):
            if rank < other:
                d = scores[i] - scores[j] - item.margin
                losses.append(-p * torch.log(torch.sigmoid(d)) - (1 - p) * torch.log(torch.sigmoid(-d)))
    return torch.stack(losses).mean()


@pytest.mark.parametrize("variant", [VARIANTS["heads"], VARIANTS["heads and length"]])
def test_the_gradient_of_a_step_is_that_of_the_equation_over_the_undivided_step(variant: dict[str, Any]) -> None:
    """Two micro-batches against one graph: each head on its bootstrap, the mean over heads, the sum with the length
    head in the comparisons, the quality alone in the penalty of means, and the length terms over all answers."""
    made, model = trainer(variant, "plain", 24)
    heads, weight = variant["heads"], variant.get("length_decorrelation", 0.0)
    batch = first_batch()
    scores = head_scores(model, collate([item.tokens for item in batch], layout="plain", pad_id=PAD_ID))
    parts = scores.split([len(item.ranks) for item in batch])
    losses = []
    for item, part in zip(batch, parts, strict=True):
        for head in range(heads):
            judged = part[:, head] + (part[:, heads] if weight else 0.0)
            own = pair_loss(item, judged) + 0.1 * (2 * part[:, head].mean()) ** 2
            losses.append(bootstrap_weight(SEED, head, item.tokens.prompt_id) * own)
    loss = torch.stack(losses).sum() / heads / len(batch)
    if weight:
        lengths = torch.tensor([len(c.ids) for item in batch for c in item.tokens.completions])
        rows = model.score.weight
        length = length_penalty(scores[:, :heads], scores[:, heads], lengths).loss
        loss = loss + weight * (length + alignment_penalty(rows[:heads], rows[heads]))
    gradients = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    expected = math.sqrt(sum(float(g.square().sum()) for g in gradients if g is not None))
    assert made.step(1).metrics["train/grad_norm"] == pytest.approx(expected, rel=1e-8)


def test_scores_by_token_end_in_the_score_of_the_answer_in_both_layouts() -> None:
    model = reward_model_from(tiny_model("gpt2", dtype=torch.float64), 0, heads=2)
    groups = [item.tokens for item in ITEMS]
    plain, shared = (collate(groups, layout=layout, pad_id=PAD_ID) for layout in ("plain", "shared"))
    with torch.no_grad():
        by_token = token_head_scores(model, plain)
        torch.testing.assert_close(token_head_scores(model, shared), by_token, rtol=0, atol=1e-9)
        last = by_token[torch.arange(len(by_token)), plain.valid_mask.sum(1) - 1]
        torch.testing.assert_close(last, head_scores(model, plain))
        torch.testing.assert_close(last.mean(1), score_completions(model, plain))
        first = model(input_ids=torch.tensor([ITEMS[0].tokens.prompt_ids + ITEMS[0].tokens.completions[0].ids[:2]]))
        torch.testing.assert_close(by_token[0, 1], first.logits[0])
    assert not by_token[~plain.valid_mask].any()


def test_the_bootstrap_is_a_function_of_seed_head_and_prompt_and_poisson() -> None:
    """4,000 draws: mean 1 with standard error .016, variance 1 with standard error about sqrt(3 / 4000) = .027; two
    heads are independent, so their correlation has standard error .016."""
    first, second = (
        torch.tensor([float(bootstrap_weight(7, head, prompt)) for prompt in range(4000)]) for head in (0, 1)
    )
    assert bootstrap_weight(7, 1, 3999) == second[-1]
    assert abs(first.mean() - 1) < 0.05 and abs(first.var() - 1) < 0.09
    assert abs(torch.corrcoef(torch.stack([first, second]))[0, 1]) < 0.05
    assert [bootstrap_weight(8, 0, p) for p in range(20)] != first[:20].tolist()


def test_a_single_head_sees_the_data_as_it_is_whatever_the_seed() -> None:
    models = []
    for seed in (0, 1):
        made, model = trainer({}, "plain", 100)
        made._objective._seed = seed  # type: ignore[attr-defined]
        made.step(1)
        models.append(model.state_dict())
    assert all(torch.equal(value, models[1][name]) for name, value in models[0].items())


def test_heads_learn_from_different_samples() -> None:
    """A head's gradient is 0 for a prompt its bootstrap does not draw, and not for one that it draws."""
    model = reward_model_from(tiny_model("gpt2", dtype=torch.float64), 0, heads=4)
    objective = RewardObjective(0.0, heads=4, seed=SEED)
    drawn = []
    for item in ITEMS:
        model.zero_grad()
        batch = collate([item.tokens], layout="plain", pad_id=PAD_ID)
        loss, _ = objective.loss(model, [item], batch, objective.begin([item], lambda groups: torch.zeros(0)))
        loss.backward()
        counts = [bootstrap_weight(SEED, head, item.tokens.prompt_id) for head in range(4)]
        assert (model.score.weight.grad.abs().amax(1) > 0).tolist() == [count > 0 for count in counts]
        drawn += counts
    assert 0 in drawn and max(drawn) > 1


def test_dropping_the_length_head_leaves_the_others_as_they_were() -> None:
    model = reward_model_from(tiny_model("gpt2", dtype=torch.float64), 0, heads=3)
    batch = collate([item.tokens for item in ITEMS], layout="plain", pad_id=PAD_ID)
    with torch.no_grad():
        before = head_scores(model, batch)
        keep_heads(model, 2)
        torch.testing.assert_close(head_scores(model, batch), before[:, :2], rtol=1e-12, atol=0)
        keep_heads(model, 5)
    assert (model.config.num_labels, model.num_labels, model.score.out_features) == (2, 2, 2)
