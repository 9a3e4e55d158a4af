"""Each method learns what it should on a tiny model built from nothing; a control that cannot learn does not pass."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from accord.config import recipe_from
from accord.data.templates import Template
from accord.methods.corpus import Corpus, Part, split_holdout
from accord.models.load import load_policy, load_reward_model
from accord.pipeline import run_stages
from accord.randomness import generator
from accord.records import Completion, Group, Message, ScoreRequest
from accord.rewards.scorers import ModelScorer, values_of
from accord.rollout.native import NativeSampler, PromptTokens
from accord.rollout.sampling import Sampling

MODEL = {"scratch": {"hidden_size": 32, "layers": 2, "heads": 2, "vocab_size": 300, "max_positions": 64}}
OFTEN = {"checkpoint_every": 1000, "eval_every": 1000, "warmup_fraction": 0.0, "schedule": "constant"}


def demonstration(prompt: str, answer: str) -> Group:
    return Group((Message("user", prompt),), (Completion((Message("assistant", answer),)),))


def pair(prompt: str, chosen: str, rejected: str) -> Group:
    answers = tuple(Completion((Message("assistant", text),), rank=r) for r, text in enumerate((chosen, rejected)))
    return Group((Message("user", prompt),), answers)


def run(
    out: Path, corpus: Corpus, functions: dict[str, Callable[..., float]] | None = None, **sections: Any
) -> dict[str, dict[str, Any]]:
    stages = [stage for stage in ("sft", "reward", "ppo") if stage in sections]
    data = {"holdout": 0.0, "max_tokens": 64} | sections.pop("data", {})
    recipe = recipe_from({"model": MODEL, "threads": 1, "out": str(out), "data": data, **sections})
    return run_stages(recipe, corpus, stages, Console(quiet=True), functions)


def metric(out: Path, stage: str, name: str) -> list[float]:
    return [json.loads(line)[name] for line in (out / stage / "metrics.jsonl").read_text().splitlines()]


# --- SFT -------------------------------------------------------------------------------------------------------------

LINES = {
    "colour of grass": "green", "colour of snow": "white", "sound of a cow": "moo", "legs of a spider": "eight",
    "capital of France": "Paris", "opposite of hot": "cold", "days in a week": "seven", "two plus two": "four",
}  # fmt: skip


def recited(folder: Path) -> int:
    """How many of the lines the model completes word for word, and then stops."""
    model, tokenizer = load_policy(folder)
    template = Template.of(tokenizer, "auto")
    prompts = [
        PromptTokens(tuple(template.prompt_ids((Message("user", prompt),))), index)
        for index, prompt in enumerate(LINES)
    ]
    sampler = NativeSampler(model, pad_id=template.pad_id)
    samples = sampler.generate(prompts, 1, Sampling(12, temperature=0, stop_ids=template.stop_ids), ("recite",))
    return sum(
        template.decode(sample.ids) == answer and sample.finish_reason == "stop"
        for (sample,), answer in zip(samples, LINES.values(), strict=True)
    )


@pytest.mark.parametrize(("learning_rate", "expected"), [(0.01, len(LINES)), (0.0, 0)])
def test_sft_learns_eight_lines_by_heart_and_none_without_a_learning_rate(
    learning_rate: float, expected: int, tmp_path: Path
) -> None:
    lines = Part.of([demonstration(*line) for line in LINES.items()], "lines")
    run(tmp_path, Corpus(sft=lines), sft={"epochs": 60, "batch_size": 8, "learning_rate": learning_rate, **OFTEN})
    losses = metric(tmp_path, "sft", "train/loss")
    assert (losses[-1] < 0.05) == (learning_rate > 0)
    assert recited(tmp_path / "sft" / "model") == expected


# --- the reward model ------------------------------------------------------------------------------------------------


def comparisons(*, shuffled: bool) -> Part:
    """Polite answers are preferred to rude ones; shuffled, to each other by the toss of a coin."""
    groups = []
    for i in range(160):
        draw = generator("comparisons", i)
        polite, rude = f"yes, {i} please", f"no, {int(draw.integers(99))} never"
        swap = shuffled and draw.random() < 0.5
        groups.append(pair(f"shall I take {i}?", *((rude, polite) if swap else (polite, rude))))
    return Part.of(groups, f"shuffled={shuffled}")


REWARD = {"epochs": 2, "batch_size": 16, "learning_rate": 3e-3, **OFTEN}


def held_out_accuracy(summary: dict[str, Any]) -> dict[str, Any]:
    return next(row for row in summary["headline"] if row["name"] == "eval/accuracy")


@pytest.fixture(scope="module")
def reward_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("reward")
    summary = run(out, Corpus(preferences=comparisons(shuffled=False)), reward=REWARD, data={"holdout": 0.3})
    return out / "reward" / "model", summary["reward"]


def test_a_reward_model_learns_separable_comparisons(reward_run: tuple[Path, dict[str, Any]]) -> None:
    accuracy = held_out_accuracy(reward_run[1])
    assert accuracy["value"] > 0.95 and accuracy["low"] > 0.8 and accuracy["n"] > 30
    assert reward_run[1]["warnings"] == []


def test_a_reward_model_learns_nothing_from_shuffled_labels_and_says_so(tmp_path: Path) -> None:
    corpus = Corpus(preferences=comparisons(shuffled=True))
    summary = run(tmp_path, corpus, reward=REWARD, data={"holdout": 0.3})["reward"]
    assert held_out_accuracy(summary)["value"] < 0.75
    assert "not distinguishable from guessing" in " ".join(summary["warnings"])


def plain_scores(folder: Path, dialogues: list[tuple[str, str]]) -> list[float]:
    """What transformers alone says of finished answers, in one padded batch."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    turns = [
        [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}] for prompt, answer in dialogues
    ]
    batch = tokenizer.apply_chat_template(turns, padding=True, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    assert logits.shape == (len(dialogues), 1)
    return logits[:, 0].tolist()


def accord_scores(folder: Path, dialogues: list[tuple[str, str]]) -> list[float]:
    model, tokenizer = load_reward_model(folder)
    template = Template.of(tokenizer, "auto")
    scorer = ModelScorer(model, template, micro_batch_tokens=256, max_tokens=64, max_prompt_tokens=None, name="saved")
    return values_of(scorer, [ScoreRequest((Message("user", prompt),), answer) for prompt, answer in dialogues])


def test_plain_transformers_reads_the_same_scores_and_references_score_0(
    reward_run: tuple[Path, dict[str, Any]],
) -> None:
    """The references are the chosen answers that were trained on, since there are no demonstrations."""
    folder, _ = reward_run
    trained, _ = split_holdout(comparisons(shuffled=False).groups, 0.3)
    chosen = [(g.prompt[0].content, g.completions[0].text) for g in trained]
    rejected = [(g.prompt[0].content, g.completions[1].text) for g in trained]
    scores = plain_scores(folder, chosen)
    assert sum(scores) / len(scores) == pytest.approx(0, abs=1e-4)
    assert max(plain_scores(folder, rejected)) < min(scores)
    assert accord_scores(folder, chosen) == pytest.approx(scores, abs=1e-4)


# --- PPO -------------------------------------------------------------------------------------------------------------


def letters() -> Corpus:
    """Answers of six letters, a or b by the toss of a coin."""
    words = ["".join("ab"[int(x)] for x in generator("letters", i).integers(2, size=6)) for i in range(64)]
    return Corpus(sft=Part.of([demonstration(f"word {i}", word) for i, word in enumerate(words)], "letters"))


def a_count(prompt: str, completion: str) -> float:
    """About 3 for the answers it was shown; more by more a's, or by never stopping."""
    return float(completion.count("a"))


SFT = {"epochs": 15, "batch_size": 16, "learning_rate": 5e-3, **OFTEN}
PPO = {
    "prompts_per_step": 8, "samples_per_prompt": 4, "episodes": 32 * 15, "max_new_tokens": 8, "update_epochs": 2,
    "minibatches": 2, "learning_rate": 3e-3, "kl_coef": 0.0, "value_init": "policy", "checkpoint_every": 1000,
    "schedule": "constant",
}  # fmt: skip


def rule_scores(out: Path, reward: Callable[..., float], **ppo: Any) -> tuple[float, float]:
    """Mean number of a's in the first rollout and in the last three, whatever the reward was."""
    functions = {"ppo.reward_function": reward, "ppo.gold_function": a_count}
    run(out, letters(), functions, sft=SFT, ppo=PPO | ppo)
    counts = metric(out, "ppo", "rollout/gold_utility/mean")
    return counts[0], sum(counts[-3:]) / 3


@pytest.mark.parametrize("trunk", ["own", "policy"])
def test_ppo_raises_a_reward_that_counts_a_letter(trunk: str, tmp_path: Path) -> None:
    before, after = rule_scores(tmp_path, a_count, value_trunk=trunk)
    assert 2 < before < 4
    assert after > 8


@pytest.mark.parametrize(
    ("reward", "changes"),
    [(lambda prompt, completion: 0.5, {}), (a_count, {"learning_rate": 0.0})],
    ids=["constant reward", "learning rate 0"],
)
def test_ppo_raises_nothing_without_a_signal_or_a_learning_rate(
    reward: Callable[..., float], changes: dict[str, Any], tmp_path: Path
) -> None:
    """Without a signal the policy wanders, by noise in the advantages, but not to more of the letter."""
    _, after = rule_scores(tmp_path, reward, **changes)
    assert after < 4


def test_a_kl_price_keeps_the_policy_nearer_to_the_reference(tmp_path: Path) -> None:
    distances = []
    for kl_coef in (0.0, 1.0):
        rule_scores(tmp_path / str(kl_coef), a_count, kl_coef=kl_coef)
        distances.append(metric(tmp_path / str(kl_coef), "ppo", "rollout/kl_per_sequence_nats")[-1])
    assert distances[1] < 0.5 * distances[0]
