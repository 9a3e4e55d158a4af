"""A whole online stage under guards: a reward that pays for brevity is caught, one that pays for nothing is not."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from accord.config import recipe_from
from accord.errors import GuardAlert
from accord.methods.context import Context
from accord.methods.corpus import Corpus, Part
from accord.models.load import load_policy, reward_model_from, save_model
from accord.pipeline import STAGES
from accord.training.runfolder import read_summary
from stages_support import answers_to, logged, saved_model, weights_of

GROUPS = [answers_to(f"say {n} things", ("one two three four five", {})) for n in range(20)]
SECTION: dict[str, Any] = {
    "prompts_per_step": 4, "samples_per_prompt": 4, "max_new_tokens": 24, "learning_rate": 5e-2,
    "schedule": "constant", "kl_coef": 0.0, "minibatches": 1, "checkpoint_every": 1, "keep_checkpoints": 12,
    "missing_eos_penalty": 0.0,
}  # fmt: skip
GUARDS: dict[str, Any] = {
    "baseline": 1, "window": 2, "shorter_ratio": [1.2, 1.4],
    "off": ["entropy", "diversity", "repetition", "word", "outliers", "duplicates"],
}  # fmt: skip


def brief(prompt: str, completion: str) -> float:
    """The untrained model hardly ever ends an answer by itself, so that answers can only become shorter."""
    return -float(len(completion))


def nothing(prompt: str, completion: str) -> float:
    return 0.0


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A policy, and a reward model on its trunk that is never trained on."""
    root = tmp_path_factory.mktemp("models")
    policy = saved_model(root / "policy", GROUPS, 0)
    model, tokenizer = load_policy(policy)
    save_model(reward_model_from(model, 1), tokenizer, root / "judge")
    return {"policy": policy, "judge": root / "judge"}


def stage(out: Path, folders: dict[str, Path], function: Any, steps: int = 14, **guards: Any) -> str:
    """Run (or continue) the stage; returns what it printed."""
    tree = {
        "model": {"path": str(folders["policy"])}, "threads": 1, "out": str(out), "seed": 1,
        "data": {"holdout": 0.0, "max_tokens": 64}, "guards": GUARDS | guards,
        "rloo": SECTION | {"episodes": 16 * steps, "holdout_reward_model": str(folders["judge"])},
    }  # fmt: skip
    screen = io.StringIO()
    corpus = Corpus(prompts=Part.of(GROUPS, "prompts"))
    STAGES["rloo"](
        Context(recipe_from(tree), corpus, Console(file=screen, width=1000), {"rloo.reward_function": function})
    )
    return screen.getvalue()


def test_a_reward_that_pays_for_brevity_stops_with_the_weights_from_before(
    tmp_path: Path, folders: dict[str, Path]
) -> None:
    printed = stage(tmp_path / "stopped", folders, brief, on_alert="stop")
    summary = read_summary(tmp_path / "stopped" / "rloo")
    assert summary is not None and "ALERT" in printed
    rows = logged(tmp_path / "stopped", "rloo")
    assert len(rows) < 14
    watched = {"rollout/holdout_score/mean", "rollout/outlier_fraction", "rollout/word_rise", "rollout/self_similarity"}
    assert watched <= rows[0].keys()
    (length,) = [row for row in summary["guards"] if row["guard"] == "length"]
    assert length["worst"] == "ALERT" and "shorter" in length["seen"]
    assert any("was at ALERT" in text for text in summary["warnings"])
    account = summary["account"][0]
    assert not any("Training stopped" in line for line in summary["account"][1:])
    assert account.startswith(f"Training stopped at step {len(rows)}") and "the guard length" in account
    ending, _, rest = account.partition("the weights are those of step ")[2].partition(". ")
    kept = int(ending)
    assert rest == "What follows is measured up to these."
    # The rollout after step `kept` is the last that its weights wrote; of fewer than 20 a tenth is one.
    found = {row["name"]: row["value"] for row in summary["headline"]}
    assert found["rollout/completion_tokens/mean"] == rows[kept]["rollout/completion_tokens/mean"]
    assert rows[kept]["step"] == kept + 1 < len(rows)
    alarms = [json.loads(line) for line in (tmp_path / "stopped/rloo/guards.jsonl").read_text().splitlines()]
    begun = next(row["begun"] for row in alarms if row.get("guard") == "length" and row["level"] == "ALERT")
    assert 0 < kept < begun - 1 or kept == 1  # the rollout of step `begun` was written by the weights before it
    # The same run with as many episodes as that ends with the same weights, bit for bit.
    stage(tmp_path / "short", folders, brief, steps=kept)
    assert weights_of(tmp_path / "short", "rloo") == weights_of(tmp_path / "stopped", "rloo")


def test_pausing_and_going_on_ends_as_if_there_had_been_no_guard(tmp_path: Path, folders: dict[str, Path]) -> None:
    with pytest.raises(GuardAlert, match="acknowledge"):
        stage(tmp_path / "paused", folders, brief, on_alert="pause")
    stage(tmp_path / "paused", folders, brief, on_alert="pause", acknowledge=["length"])
    stage(tmp_path / "free", folders, brief)
    assert weights_of(tmp_path / "paused", "rloo") == weights_of(tmp_path / "free", "rloo")


def test_a_reward_that_pays_for_nothing_raises_no_alert(tmp_path: Path, folders: dict[str, Path]) -> None:
    stage(tmp_path, folders, nothing, on_alert="stop", off=[*GUARDS["off"], "ceiling"])
    assert len(logged(tmp_path, "rloo")) == 14
