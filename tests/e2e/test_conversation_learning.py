"""PPO learns what only a second turn can earn; without a learning rate it does not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from accord.config import recipe_from
from accord.methods.corpus import Corpus, Part
from accord.pipeline import run_stages
from accord.records import Completion, Group, Message
from accord.tasks.missing_detail import BEST, BEST_WITHOUT_ASKING, DETAILS

MODEL = {"scratch": {"hidden_size": 32, "layers": 2, "heads": 2, "vocab_size": 320, "max_positions": 64}}
OFTEN = {"checkpoint_every": 1000, "warmup_fraction": 0.0, "schedule": "constant"}
SFT = OFTEN | {"max_steps": 100, "epochs": 100, "batch_size": 24, "learning_rate": 0.01, "eval_every": 1000}
PPO = OFTEN | {
    "environment": "accord.tasks.missing_detail:MissingDetail", "max_turns": 2, "max_new_tokens": 12,
    "prompts_per_step": 24, "samples_per_prompt": 4, "minibatches": 1, "update_epochs": 2, "kl_coef": 0.02,
    "gae_lambda": 1.0, "value_learning_rate": 0.003, "value_init": "policy",
}  # fmt: skip
ORDERS = [
    f"{size} {drink}"
    for size in ("hot", "cold", "big", "small")
    for drink in ("tea", "juice", "soda", "cocoa", "rum", "mate")
]


def demonstration(order: str, number: int) -> Group:
    """Two guests in three are served at once, as chance has it; the third is asked, and gets what it wants."""
    wanted = DETAILS[number // 3 % 2]
    served = Message("assistant", f"with {wanted}")
    asked = (Message("assistant", "milk or lemon?"), Message("user", f"{wanted}, please"))
    return Group((Message("user", order),), (Completion((served,) if number % 3 else (*asked, served)),))


def scores(out: Path, corpus: Corpus, steps: int, learning_rate: float) -> list[dict[str, float]]:
    sections: dict[str, Any] = {
        "model": MODEL, "threads": 1, "out": str(out), "data": {"holdout": 0.0, "max_tokens": 64}, "sft": SFT,
        "ppo": PPO | {"learning_rate": learning_rate, "episodes": 96 * steps},
    }  # fmt: skip
    run_stages(recipe_from(sections), corpus, ["sft", "ppo"], Console(quiet=True))
    return [json.loads(line) for line in (out / "ppo" / "metrics.jsonl").read_text().splitlines()]


def mean(rows: list[dict[str, float]], name: str) -> float:
    return sum(row[name] for row in rows) / len(rows)


@pytest.mark.parametrize(("learning_rate", "steps"), [(0.001, 16), (0.0, 4)])
def test_ppo_learns_to_ask_for_the_missing_detail(learning_rate: float, steps: int, tmp_path: Path) -> None:
    demonstrations = [demonstration(order, 6 * n + k) for n, order in enumerate(ORDERS) for k in range(6)]
    corpus = Corpus(
        sft=Part.of(demonstrations, "demonstrations"),
        prompts=Part.of([Group((Message("user", order),)) for order in ORDERS], "orders"),
    )
    rows = scores(tmp_path, corpus, steps, learning_rate)
    assert mean(rows[:2], "rollout/turns/mean") - 1 < 0.5
    asked = mean(rows[-4:], "rollout/turns/mean") - 1
    score = mean(rows[-4:], "rollout/score/mean")
    learned = score > BEST - 0.14 and asked > 0.75
    assert learned == (learning_rate > 0), (score, asked)
    assert BEST - 0.14 > BEST_WITHOUT_ASKING  # what no single turn can earn
    assert max(row["train/ratio_max_deviation"] for row in rows) < 1e-5
