"""What is refused before anything is trained, and what makes a run another run."""

from __future__ import annotations

import pytest

from accord.config import recipe_from
from accord.errors import ConfigError
from accord.methods.corpus import Corpus, Part
from accord.methods.plan import check_sizes
from accord.records import Completion, Group, Message
from accord.rewards.scorers import FunctionScorer


def corpus() -> Corpus:
    answers = (Completion((Message("assistant", "yes"),), rank=0), Completion((Message("assistant", "no"),), rank=1))
    groups = [Group((Message("user", f"question {i}"),), answers) for i in range(40)]
    return Corpus(preferences=Part.of(groups, "pairs"))


def test_an_evaluation_without_held_out_prompts_is_refused_before_training() -> None:
    stages = ["reward", "evaluate"]
    sections = {"model": {"path": "quickstart"}, "reward": {}, "evaluate": {}}
    check_sizes(recipe_from({**sections, "data": {"holdout": 0.3}}), corpus(), stages)
    with pytest.raises(ConfigError, match=r"raise `data.holdout`"):
        check_sizes(recipe_from({**sections, "data": {"holdout": 0.0}}), corpus(), stages)


def test_an_edited_reward_function_is_another_one() -> None:
    def ones(prompt: str, completion: str) -> float:
        return 1.0

    def twos(prompt: str, completion: str) -> float:
        return 2.0

    assert FunctionScorer(ones, "f").fingerprint == FunctionScorer(ones, "g").fingerprint
    assert FunctionScorer(ones, "f").fingerprint != FunctionScorer(twos, "f").fingerprint
