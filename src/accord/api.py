"""The Python interface: `accord.train` does what the commands do, with data and reward functions given as objects."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from pathlib import Path
from typing import Any

from rich.console import Console

from accord.config import recipe_from
from accord.errors import ConfigError, DataError
from accord.methods.corpus import Corpus, Part
from accord.pipeline import run_stages
from accord.records import Completion, Group, Message
from accord.rewards.scorers import RewardFunction

__all__ = ["TrainResult", "train"]

Prompt = str | Sequence[Mapping[str, str]]
Reward = float | Sequence[float]


@dataclass(frozen=True, slots=True)
class TrainResult:
    """What training left: the stage's folder, the model's folder (Hugging Face format) and the summary."""

    folder: Path
    model: Path
    summary: Mapping[str, Any]


def train(
    model: str | Path | Mapping[str, Any],
    *,
    reward_fn: RewardFunction | None = None,
    prompts: Sequence[Prompt] | None = None,
    samples: Sequence[Any] | None = None,
    rewards: Sequence[Reward] | None = None,
    out: str | Path | None = None,
    seed: int = 0,
    quiet: bool = False,
    **sections: Any,
) -> TrainResult:
    """Train `model` by PPO against `reward_fn` on `prompts`, by SFT on `samples`, or by ILQL on them with `rewards`.

        accord.train("my-model", reward_fn=lambda prompt, completion: -len(completion), prompts=["Say hello"])
        accord.train("my-model", samples=[("What is 2 + 2?", "4"), ...], sft={"epochs": 2})
        accord.train("my-model", samples=[("What is 2 + 2?", "4"), ("What is 2 + 2?", "5"), ...], rewards=[1, -1, ...])

    Equal settings give the same weights as `accord ppo`, `accord sft` and `accord ilql` on the same data. Calling again
    with the same arguments continues an interrupted run, or returns the finished one.

    Args:
        model: folder or hub id of a causal language model, or "quickstart"; or the whole section of a recipe, for
            example {"path": "my-model", "template": "plain"}.
        reward_fn: f(prompt, completion) -> float; prompt is the text of a one-message prompt, else its messages. An
            exception in it stops the run and names the prompt.
        prompts: texts, or lists of {"role", "content"}.
        samples: (prompt, answer) pairs, lists of {"role", "content"} ending with the assistant, or plain texts.
        rewards: for each sample a number, its return; or a list of numbers, one for each token the assistant wrote (in
            the model's tokenizer, end token included), which add up to its return.
        out: run folder; default runs/<method>.
        sections: recipe sections as dicts, for example ppo={"kl_coef": 0.1}, data={"max_tokens": 256}.
    Raises: ConfigError for arguments that do not go together; DataError for unusable rows; RewardError.
    """
    stage, corpus = _task(reward_fn, prompts, samples, rewards)
    tree: dict[str, Any] = _yaml_like(sections)
    tree["seed"] = seed
    tree["model"] = _yaml_like(model if isinstance(model, Mapping) else {"path": model})
    tree.setdefault("data", {}).setdefault("holdout", 0.0)
    if stage == "ppo":
        tree["ppo"] = {"value_init": "policy", **tree.get("ppo", {})}
    tree.setdefault(stage, {})
    tree["name"] = stage
    tree["out"] = str(out) if out is not None else None
    recipe = recipe_from(tree, source="accord.train")
    functions = {} if reward_fn is None else {"ppo.reward_function": reward_fn}
    summary = run_stages(recipe, corpus, [stage], Console(quiet=quiet), functions)[stage]
    folder = Path(recipe.out or f"runs/{stage}") / stage
    return TrainResult(folder, folder / "model", summary)


def _task(
    reward_fn: RewardFunction | None,
    prompts: Sequence[Prompt] | None,
    samples: Sequence[Any] | None,
    rewards: Sequence[Reward] | None,
) -> tuple[str, Corpus]:
    """The stage that these arguments ask for, and its data."""
    if (reward_fn is None) == (samples is None) or (samples is not None and prompts is not None):
        raise ConfigError("accord.train takes reward_fn= and prompts= (PPO), or samples= (SFT), with rewards= (ILQL)")
    if samples is not None and rewards is not None:
        return "ilql", Corpus(preferences=Part.of(_rewarded(samples, rewards), "samples"))
    if samples is not None:
        return "sft", Corpus(sft=Part.of([_sample(s, i) for i, s in enumerate(samples)], "samples"))
    if rewards is not None:
        raise ConfigError("rewards= go with samples=, one for each; PPO asks reward_fn= for its rewards")
    if not prompts:
        raise ConfigError("accord.train(reward_fn=...) needs prompts=[...], the texts the policy shall answer")
    return "ppo", Corpus(prompts=Part.of([Group(_messages(p, i)) for i, p in enumerate(prompts)], "prompts"))


def _yaml_like(value: Any) -> Any:
    """Sections as a recipe file would give them: fresh dicts and lists, paths as text."""
    if isinstance(value, Mapping):
        return {key: _yaml_like(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_yaml_like(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _messages(prompt: Prompt, index: int) -> tuple[Message, ...]:
    if isinstance(prompt, str):
        return (Message("user", prompt),)
    try:
        return tuple(Message(m["role"], m["content"]) for m in prompt)
    except (KeyError, TypeError) as error:
        raise DataError(
            f"prompts[{index}] is {prompt!r}: expected a text or a list of {{'role', 'content'}} messages"
        ) from error


def _sample(sample: Any, index: int) -> Group:
    if isinstance(sample, str):
        return Group((), (Completion((Message("assistant", sample),)),))
    if isinstance(sample, tuple) and len(sample) == 2 and all(isinstance(part, str) for part in sample):
        return Group((Message("user", sample[0]),), (Completion((Message("assistant", sample[1]),)),))
    if isinstance(sample, list):
        messages = _messages(sample, index)
        first = next((i for i, m in enumerate(messages) if m.role == "assistant"), None)
        if first is not None:
            return Group(messages[:first], (Completion(messages[first:]),))
    raise DataError(
        f"samples[{index}] is {sample!r}: expected a text, a (prompt, answer) pair of texts, or a list of messages "
        f"with an "
        "assistant turn"
    )


def _rewarded(samples: Sequence[Any], rewards: Sequence[Reward]) -> list[Group]:
    if len(samples) != len(rewards):
        raise DataError(f"there are {len(samples)} samples and {len(rewards)} rewards: give one for each sample")
    groups = []
    for index, (sample, reward) in enumerate(zip(samples, rewards, strict=True)):
        group = _sample(sample, index)
        of_tokens = isinstance(reward, list | tuple)
        given: list[Any] = list(reward) if of_tokens else [reward]
        if not given or not all(isinstance(x, Real) and math.isfinite(x) for x in given):
            raise DataError(
                f"rewards[{index}] is {reward!r}: expected a finite number, or a list of them, one for each token"
            )
        numbers = tuple(map(float, given))
        answer = replace(group.completions[0], score=math.fsum(numbers), rewards=numbers if of_tokens else None)
        groups.append(replace(group, completions=(answer,)))
    return groups
