"""The Python interface: `accord.train` does what the commands do, with data and reward functions given as objects."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from accord.config import recipe_from
from accord.errors import ConfigError, DataError
from accord.methods import catalogue
from accord.methods.corpus import Corpus, Part
from accord.pipeline import STAGES, run_stages
from accord.records import Completion, Group, Message
from accord.rewards.scorers import RewardFunction

__all__ = ["METHODS", "TrainResult", "train"]

Prompt = str | Sequence[Mapping[str, str]]
METHODS = tuple(
    name for name in STAGES if catalogue.STAGES[name].data == "prompts" and catalogue.STAGES[name].leaves == "policy"
)


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
    method: str = "ppo",
    out: str | Path | None = None,
    seed: int = 0,
    quiet: bool = False,
    **sections: Any,
) -> TrainResult:
    """Train `model` by PPO (or another `method`) against `reward_fn` on `prompts`, or by SFT on `samples`.

        accord.train("my-model", reward_fn=lambda prompt, completion: -len(completion), prompts=["Say hello"])
        accord.train("my-model", reward_fn=..., prompts=[...], method="rloo", rloo={"samples_per_prompt": 8})
        accord.train("my-model", samples=[("What is 2 + 2?", "4"), ...], sft={"epochs": 2})

    Equal settings give the same weights as `accord ppo` and `accord sft` on the same data. Calling again with the same
    arguments continues an interrupted run, or returns the finished one.

    Args:
        model: folder or hub id of a causal language model, or "quickstart"; or the whole section of a recipe, for
            example {"path": "my-model", "template": "plain"}.
        reward_fn: f(prompt, completion) -> float; prompt is the text of a one-message prompt, else its messages. An
            exception in it stops the run and names the prompt.
        prompts: texts, or lists of {"role", "content"}.
        method: how to learn from `reward_fn`: one of METHODS.
        samples: (prompt, answer) pairs, lists of {"role", "content"} ending with the assistant, or plain texts.
        out: run folder; default runs/<method>.
        sections: recipe sections as dicts, for example ppo={"kl_coef": 0.1}, data={"max_tokens": 256}.
    Raises: ConfigError for arguments that do not go together; DataError for unusable rows; RewardError.
    """
    if (reward_fn is None) == (samples is None) or (samples is not None and prompts is not None):
        raise ConfigError("accord.train takes reward_fn= and prompts= (PPO), or samples= (SFT)")
    tree: dict[str, Any] = _yaml_like(sections)
    tree["seed"] = seed
    tree["model"] = _yaml_like(model if isinstance(model, Mapping) else {"path": model})
    tree.setdefault("data", {}).setdefault("holdout", 0.0)
    if samples is not None:
        stage, corpus = "sft", Corpus(sft=Part.of([_sample(s, i) for i, s in enumerate(samples)], "samples"))
    else:
        if method not in METHODS:
            raise ConfigError(f"accord.train(method={method!r}): expected one of {', '.join(METHODS)}")
        if not prompts:
            raise ConfigError("accord.train(reward_fn=...) needs prompts=[...], the texts the policy shall answer")
        groups = [Group(_messages(p, i)) for i, p in enumerate(prompts)]
        stage, corpus = method, Corpus(prompts=Part.of(groups, "prompts"))
        if method == "ppo":
            tree["ppo"] = {"value_init": "policy", **tree.get("ppo", {})}
    tree.setdefault(stage, {})
    tree["name"] = stage
    tree["out"] = str(out) if out is not None else None
    recipe = recipe_from(tree, source="accord.train")
    functions = {} if reward_fn is None else {f"{stage}.reward_function": reward_fn}
    summary = run_stages(recipe, corpus, [stage], Console(quiet=quiet), functions)[stage]
    folder = Path(recipe.out or f"runs/{stage}") / stage
    return TrainResult(folder, folder / "model", summary)


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
