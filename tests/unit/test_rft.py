"""Rejection sampling on tiny models: a step against a second computation, and what a pool must survive."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from accord.config import RFTConfig
from accord.data.order import batch_indices
from accord.data.templates import Template
from accord.methods.candidates import Drawing
from accord.methods.rft import RFTTrainer, cycle_prompts
from accord.records import Group, Message, SampledCompletion, TokenGroup
from accord.rewards.scorers import FunctionScorer
from accord.rollout.native import NativeSampler, PromptTokens
from accord.rollout.sampling import Sampling
from accord.training.checkpoint import Snapshot, load_latest, save_checkpoint
from accord.training.loop import Captured
from models_support import EOS_ID, PAD_ID, tiny_model, word_tokenizer

PROMPTS = ("w2 w3", "w4 w5 w6 w7", "w8", "w9 w10 w11", "w12 w13 w14 w15 w16")


def uneven(prompt: str, completion: str) -> float:
    """Scores in 0 ... 6 that follow nothing."""
    return float(len(completion) * 5 % 7)


def prompts() -> list[tuple[Group, TokenGroup]]:
    tokenizer = word_tokenizer()
    groups = [Group((Message("user", text),)) for text in PROMPTS]
    return [(g, TokenGroup(tuple(tokenizer.encode(t)), (), g.prompt_id)) for g, t in zip(groups, PROMPTS, strict=True)]


def section(**changes: Any) -> RFTConfig:
    fields: dict[str, Any] = {
        "cycles": 2, "improve_steps": 3, "samples_per_prompt": 8, "max_new_tokens": 6, "learning_rate": 0.001,
        "batch_size": 5, "epochs": 2, "start_quantile": 0.4, "end_quantile": 0.8, "samples_every": 2,
    }  # fmt: skip
    return RFTConfig(**(fields | changes))


def trainer(
    config: RFTConfig,
    *,
    function: Callable[..., float] = uneven,
    gold: Callable[..., float] | None = None,
    sampler: Any = None,
    seed: int = 0,
    **other: Any,
) -> tuple[RFTTrainer, Any]:
    """The trainer and its policy, in float64."""
    policy = tiny_model("gpt2", dtype=torch.float64, seed=1)
    drawing = Drawing(
        sampler or NativeSampler(policy, pad_id=PAD_ID),
        Template.of(word_tokenizer(), "auto"),
        FunctionScorer(function, "the test's reward"),
        None if gold is None else FunctionScorer(gold, "the truth"),
    )
    return RFTTrainer(policy, drawing, prompts(), config, layout="plain", seed=seed, **other), policy


def measured(outcome: Any) -> dict[str, float]:
    return {k: v for k, v in outcome.metrics.items() if not k.startswith(("time/", "system/"))}


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(value, b[name]) for name, value in a.items())


# --- one step against a second computation ---------------------------------------------------------------------------


def sampled_again(policy: Any, config: RFTConfig, cycle: int, seed: int = 0) -> list[tuple[SampledCompletion, ...]]:
    wanted = [PromptTokens(tokens.prompt_ids, tokens.prompt_id) for _, tokens in prompts()]
    sampling = Sampling(config.max_new_tokens, config.temperature, stop_ids=(EOS_ID,))
    return NativeSampler(policy, pad_id=PAD_ID).generate(
        wanted, config.samples_per_prompt, sampling, ("rft", seed, cycle)
    )


def chosen_again(
    samples: list[tuple[SampledCompletion, ...]], config: RFTConfig, quantile: float
) -> list[tuple[tuple[int, ...], tuple[int, ...], float]]:
    """(prompt, completion, score) of what is kept, in order, written out sample by sample."""
    template = Template.of(word_tokenizer(), "auto")
    kept = []
    for (_, tokens), row in zip(prompts(), samples, strict=True):
        raw = [uneven("", template.decode(s.ids)) for s in row]
        fined = [
            score - config.missing_eos_penalty * (s.finish_reason == "length")
            for score, s in zip(raw, row, strict=True)
        ]
        threshold = np.quantile(fined, quantile, method="higher")
        seen = set()
        for sample, score, fine in zip(row, raw, fined, strict=True):
            if fine >= threshold and fine > min(fined) and sample.ids not in seen:
                seen.add(sample.ids)
                kept.append((tokens.prompt_ids, sample.ids, score))
    return kept


def trained_again(policy: Any, kept: list[tuple[Any, Any, float]], config: RFTConfig, step: int) -> tuple[float, int]:
    """Plain SFT with the model's own logits, one completion at a time; (summed loss, tokens)."""
    adam = torch.optim.AdamW(policy.parameters(), lr=config.learning_rate, betas=(0.9, 0.95), eps=1e-8, weight_decay=0)
    updates = -(-len(kept) // config.batch_size) * config.epochs
    total, tokens = 0.0, 0
    for update in range(1, updates + 1):
        batch = [kept[i] for i in batch_indices(update, len(kept), config.batch_size, 0, "rft", step)]
        count = sum(len(ids) for _, ids, _ in batch)
        adam.zero_grad()
        for prompt, ids, _ in batch:
            row = torch.tensor([prompt + ids])
            logprobs = policy(input_ids=row).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            loss = -logprobs[range(len(ids)), ids].sum()
            (loss / count).backward()
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(policy.parameters(), config.max_grad_norm)
        adam.step()
        tokens += count
    return total, tokens


@pytest.mark.parametrize("budget", [16, 8192])
def test_a_step_is_sampling_selection_and_sft_done_one_by_one(budget: int) -> None:
    config = section(micro_batch_tokens=budget)
    made, policy = trainer(config)
    other = copy.deepcopy(policy)
    samples = sampled_again(other, config, 0)
    kept = chosen_again(samples, config, config.start_quantile)
    metrics = measured(made.step(1))
    loss, tokens = trained_again(other, kept, config, 1)
    assert 5 < len(kept) < 40
    assert metrics["train/loss"] == pytest.approx(loss / tokens, rel=1e-9)
    assert (metrics["train/tokens"], metrics["train/sequences"]) == (tokens, 2 * len(kept))
    assert metrics["rollout/selection_quantile"] == config.start_quantile
    for name, value in policy.state_dict().items():
        assert torch.allclose(value, other.state_dict()[name], rtol=0, atol=1e-9), name


def test_the_steps_of_a_cycle_choose_more_strictly_from_the_same_samples_and_the_next_cycle_samples_anew() -> None:
    config = section()
    made, policy = trainer(config)
    first = sampled_again(policy, config, 0)
    lengths = []
    for step, quantile in zip((1, 2, 3), (0.4, 0.6, 0.8), strict=True):
        before, kept = made.step(step), chosen_again(first, config, quantile)
        assert before.metrics["rollout/selection_quantile"] == pytest.approx(quantile)
        assert before.status.startswith(f"kept {len(kept)} of 40")
        assert ("rollout/score/mean" in before.metrics) == (step == 1)
        lengths.append(len(kept))
    assert lengths == sorted(lengths, reverse=True) and lengths[0] > lengths[2]
    second = sampled_again(policy, config, 1)
    outcome = made.step(4)
    template = Template.of(word_tokenizer(), "auto")
    scores = [uneven("", template.decode(s.ids)) for row in second for s in row]
    assert outcome.metrics["rollout/score/mean"] == pytest.approx(sum(scores) / 40)
    assert second != first
    assert outcome.status.startswith(f"kept {len(chosen_again(second, config, 0.4))} of 40")
    assert (outcome.metrics["rollout/samples"], outcome.metrics["rollout/prompts"]) == (80, 10)


# --- what is sampled and how it is told ------------------------------------------------------------------------------


class FixedSampler:
    """Hands out given completions for every prompt; the last token of a finished one is EOS."""

    def __init__(self, rows: list[tuple[int, ...]]) -> None:
        self._rows = rows

    def generate(
        self, prompts: Any, n: int, sampling: Sampling, key: tuple[int | str, ...]
    ) -> list[tuple[SampledCompletion, ...]]:
        assert n == len(self._rows)
        samples = tuple(
            SampledCompletion(ids, (0.0,) * len(ids), "stop" if ids[-1] == EOS_ID else "length") for ids in self._rows
        )
        return [samples for _ in prompts]


def by_first_word(prompt: str, completion: str) -> float:
    return float(completion.split()[0].removeprefix("w"))


def test_the_numbers_of_a_selection() -> None:
    """Scores 9 9 7 5, the two nines the same answer. Quantile .4 of four: the third lowest, 9; so two pass, one is
    kept, in each of five prompts."""
    rows = [(9, 3, EOS_ID), (9, 3, EOS_ID), (7, EOS_ID), (5, EOS_ID)]
    made, _ = trainer(section(samples_per_prompt=4), sampler=FixedSampler(rows), function=by_first_word)
    outcome = made.step(1)
    metrics = outcome.metrics
    assert metrics["rollout/score/mean"] == 7.5
    assert metrics["rollout/kept_fraction"] == 0.5
    assert metrics["rollout/kept_distinct_fraction"] == 0.5
    assert metrics["rollout/kept_score/mean"] == 9
    assert metrics["rollout/dropped_prompts"] == 0
    assert metrics["rollout/completion_tokens/mean"] == 2.5
    assert metrics["train/sequences"] == 2 * 5
    assert outcome.samples[0] == {"prompt": "w2 w3", "completion": "w9 w3", "score": 9.0, "finished": True}


@pytest.mark.parametrize(("penalty", "best"), [(1.0, "w9 w4"), (3.0, "w7")])
def test_a_completion_cut_by_length_is_kept_only_where_it_wins_after_the_penalty(penalty: float, best: str) -> None:
    """9 without an end against 7 with one: 9 - 1 wins and 9 - 3 does not. What is kept shows in the loss's tokens."""
    rows = [(9, 4), (7, EOS_ID), (5, EOS_ID)]
    config = section(samples_per_prompt=3, start_quantile=0.8, missing_eos_penalty=penalty, epochs=1)
    made, _ = trainer(config, sampler=FixedSampler(rows), function=by_first_word)
    outcome = made.step(1)
    assert outcome.samples[0]["completion"] == best
    assert outcome.metrics["rollout/truncated_fraction"] == pytest.approx(1 / 3)
    assert outcome.metrics["rollout/kept_score/mean"] == (9 if penalty == 1 else 7)


def test_where_all_scores_tie_nothing_is_learned_and_the_prompts_are_counted() -> None:
    made, policy = trainer(section(missing_eos_penalty=0.0), function=lambda p, c: 1.0)
    before = weights(policy)
    for step in range(1, 7):
        outcome = made.step(step)
        assert outcome.metrics["rollout/dropped_prompts"] == 5
        assert outcome.metrics["train/sequences"] == 0
        assert "train/loss" not in outcome.metrics
    assert same(before, policy.state_dict())
    assert outcome.status == "kept 0 of 40"


def test_the_truth_is_logged_and_changes_nothing() -> None:
    made, policy = trainer(section(), gold=lambda p, c: float(len(c)))
    plain, unseen = trainer(section())
    told = [measured(made.step(step)) for step in range(1, 5)]
    silent = [measured(plain.step(step)) for step in range(1, 5)]
    assert same(policy.state_dict(), unseen.state_dict())
    assert {k: v for k, v in told[0].items() if "gold" not in k} == silent[0]
    assert "rollout/gold_utility/mean" in told[0] and "rollout/gold_utility/mean" not in told[1]


# --- prompts of a cycle ----------------------------------------------------------------------------------------------


def test_a_cycle_takes_all_prompts_or_the_next_ones_of_shuffled_passes() -> None:
    assert cycle_prompts(3, 5, 5, seed=0) == [0, 1, 2, 3, 4]
    passes = [i for cycle in range(5) for i in cycle_prompts(cycle, 3, 5, seed=0)]
    assert [sorted(passes[p * 5 : (p + 1) * 5]) for p in range(3)] == [[0, 1, 2, 3, 4]] * 3
    assert passes[:5] != passes[5:10]
    assert passes != [i for cycle in range(5) for i in cycle_prompts(cycle, 3, 5, seed=1)]


def test_a_cycle_of_fewer_prompts_asks_those() -> None:
    made, _ = trainer(section(prompts_per_cycle=2))
    outcome = made.step(1)
    assert outcome.metrics["rollout/samples"] == 16
    asked = [prompts()[i][0].prompt[0].content for i in cycle_prompts(0, 2, 5, seed=0)]
    assert [sample["prompt"] for sample in outcome.samples] == asked


# --- resuming --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [1, 2, 3, 4])
def test_a_run_continued_from_any_step_of_a_cycle_ends_with_the_same_bits(stop: int, tmp_path: Any) -> None:
    """Through a checkpoint on disk, into a trainer that has sampled nothing: the pool comes with the state."""
    gold = uneven
    whole, policy = trainer(section(), gold=gold)
    rows = [measured(whole.step(step)) for step in range(1, 7)]
    first, _ = trainer(section(), gold=gold)
    for step in range(1, stop + 1):
        first.step(step)
    captured = first.capture()
    save_checkpoint(tmp_path, Snapshot(stop, captured.tensors, captured.values))
    snapshot = load_latest(tmp_path).snapshot
    assert snapshot is not None
    second, continued = trainer(section(), gold=gold)
    second.restore(Captured(snapshot.tensors, snapshot.values))
    assert [measured(second.step(step)) for step in range(stop + 1, 7)] == rows[stop:]
    assert same(policy.state_dict(), continued.state_dict())


def test_another_seed_is_another_run() -> None:
    rows = [measured(trainer(section(), seed=seed)[0].step(1)) for seed in (0, 1)]
    assert rows[0]["rollout/score/mean"] != rows[1]["rollout/score/mean"]
