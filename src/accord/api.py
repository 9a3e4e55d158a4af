"""The Python interface: `accord.train` does what the commands do, with data and reward functions given as objects."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence, Sized
from dataclasses import dataclass, replace
from difflib import get_close_matches
from numbers import Real
from pathlib import Path
from typing import Any

from rich.console import Console

from accord import pipeline
from accord.config import recipe_from
from accord.data.read import left_out_notes, read_row
from accord.errors import ConfigError, DataError
from accord.methods.catalogue import POLICY_STAGES, STAGES
from accord.methods.corpus import Corpus, Part
from accord.methods.plan import check_sizes
from accord.records import Completion, Group, Message
from accord.rewards.scorers import RewardFunction
from accord.rollout.environment import EnvironmentFactory

__all__ = ["TrainResult", "train"]

Prompt = str | Sequence[Mapping[str, str]]
Reward = float | Sequence[float]


@dataclass(frozen=True, slots=True)
class TrainResult:
    """What training left: the stage's folder, the model's folder (Hugging Face format) and the summary."""

    folder: Path
    model: Path
    summary: Mapping[str, Any]


# What each method learns from: the arguments it takes, together; some take one or another. The first method that takes
# what is given is the one that is used unless another is named.
_ONLINE = [name for name in POLICY_STAGES if STAGES[name].data == "prompts" and name in pipeline.STAGES]
_ALONE = (("reward_fn", "prompts"),)
_TALKING = (*_ALONE, ("environment", "prompts"), ("environment", "reward_fn", "prompts"))
_TAKES: dict[str, tuple[tuple[str, ...], ...]] = {
    **{name: _ALONE if name == "rft" else _TALKING for name in _ONLINE},
    "sft": (("samples",),),
    "dpo": (("pairs",),),
    "orpo": (("pairs",),),
    "kto": (("pairs",), ("samples",)),
    "ilql": (("samples", "rewards"), ("pairs",)),
    "reward": (("pairs",),),
}


def train(
    model: str | Path | Mapping[str, Any],
    *,
    method: str | None = None,
    reward_fn: RewardFunction | None = None,
    environment: EnvironmentFactory | None = None,
    prompts: Sequence[Prompt] | None = None,
    samples: Sequence[Any] | None = None,
    rewards: Sequence[Reward] | None = None,
    pairs: Sequence[Any] | None = None,
    out: str | Path | None = None,
    seed: int = 0,
    quiet: bool = False,
    **sections: Any,
) -> TrainResult:
    """Train `model`: against `reward_fn` on `prompts`, or in conversations with an `environment`, by imitation of
    `samples`, by what their `rewards` say, or on preferences as `pairs`.

        accord.train("my-model", reward_fn=lambda prompt, completion: -len(completion), prompts=["Say hello"])
        accord.train("my-model", reward_fn=..., prompts=[...], method="rloo", rloo={"samples_per_prompt": 8})
        accord.train("my-model", samples=[("What is 2 + 2?", "4"), ...], sft={"epochs": 2})
        accord.train("my-model", samples=[("What is 2 + 2?", "4"), ("What is 2 + 2?", "5"), ...], rewards=[1, -1, ...])
        accord.train("my-model", pairs=[("What is 2 + 2?", "4", "5"), ...], method="dpo", dpo={"beta": 0.1})

    Equal settings give the same weights as the method's command on the same data. Calling again with the same
    arguments continues an interrupted run, or returns the finished one.

    Args:
        model: folder or hub id of a causal language model, or "quickstart"; or the whole section of a recipe, for
            example {"path": "my-model", "template": "plain"}.
        method: a stage's name. Unset: ppo for a reward function, sft for samples, dpo for pairs. Pairs are also for
            orpo, kto and reward; a reward function also for the other methods that sample, such as grpo.
        reward_fn: f(prompt, completion) -> float; prompt is the text of a one-message prompt, else its messages. An
            exception in it stops the run and names the prompt.
        environment: a class (or a function without arguments) that makes whom the policy talks with over several turns,
            one object a conversation; the method's section needs max_turns. With or without a reward_fn.
        prompts: texts, or lists of {"role", "content"}.
        samples: (prompt, answer) pairs, lists of {"role", "content"} ending with the assistant, plain texts, or dicts
            with the fields of a row in a data file; for kto such dicts with a label.
        rewards: for each sample a number, its return; or a list of numbers, one for each token the assistant wrote (in
            the model's tokenizer, end token included), which add up to its return.
        pairs: (prompt, chosen, rejected), or dicts with the fields of a row in a data file (rankings, too).
        out: run folder; default runs/<method>.
        sections: recipe sections as dicts, for example ppo={"kl_coef": 0.1}, data={"max_tokens": 256}.
    Raises: ConfigError for arguments that do not go together; DataError for unusable rows; RewardError.
    """
    for name, value in (("prompts", prompts), ("samples", samples), ("pairs", pairs), ("rewards", rewards)):
        if isinstance(value, str | bytes | Mapping):
            raise DataError(f"{name} is {value!r}: expected a list with one item for each of the {name}")
        if isinstance(value, Sized) and len(value) == 0:
            raise DataError(f"{name} is empty: there is nothing to train on")
    if reward_fn is not None and not callable(reward_fn):
        raise ConfigError(f"reward_fn is {reward_fn!r}: expected a function f(prompt, completion) -> float")
    if environment is not None and not callable(environment):
        raise ConfigError(f"environment is {environment!r}: expected a class, or a function that makes an environment")
    given = {
        "reward_fn": reward_fn,
        "environment": environment,
        "prompts": prompts,
        "samples": samples,
        "rewards": rewards,
        "pairs": pairs,
    }
    stage = _method(method, {name for name, value in given.items() if value is not None})
    tree: dict[str, Any] = _yaml_like(sections)
    tree["seed"] = seed
    tree["model"] = _yaml_like(model if isinstance(model, Mapping) else {"path": model})
    tree.setdefault("data", {}).setdefault("holdout", 0.0)
    if prompts is not None:
        groups = [Group(_messages(prompt, f"prompts[{index}]")) for index, prompt in enumerate(prompts)]
        corpus = Corpus(prompts=Part.of(groups, "prompts"))
    elif pairs is not None:
        corpus = Corpus(preferences=_rows(pairs, "pairs", _pair))
    else:
        part = _rows(samples or (), "samples", _sample)
        if rewards is not None:
            part = _rewarded(part, samples or (), rewards)
        corpus = Corpus(sft=part) if stage == "sft" else Corpus(preferences=part)
    section = tree.get(stage, {})
    tree[stage] = {"value_init": "policy", **section} if stage == "ppo" and isinstance(section, dict) else section
    if environment is not None and isinstance(tree[stage], dict):
        tree[stage]["environment"] = _name(environment)
    tree["name"] = stage
    tree["out"] = str(out) if out is not None else None
    recipe = recipe_from(tree, source="accord.train")
    functions: dict[str, Callable[..., Any]] = {}
    if reward_fn is not None:
        functions[f"{stage}.reward_function"] = reward_fn
    if environment is not None:
        functions[f"{stage}.environment"] = environment
    check_sizes(recipe, corpus, [stage])
    summary = pipeline.run_stages(recipe, corpus, [stage], Console(quiet=quiet), functions)[stage]
    folder = recipe.root / stage
    return TrainResult(folder, folder / "model", summary)


def _method(method: str | None, given: set[str]) -> str:
    """The method that is named, or the first that takes what is given. Raises ConfigError where they do not fit."""
    if method is not None and method not in _TAKES:
        near = get_close_matches(method, _TAKES, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise ConfigError(f"accord.train: method={method!r}{hint} is none of {', '.join(_TAKES)}")
    candidates = _TAKES if method is None else {method: _TAKES[method]}
    for name, alternatives in candidates.items():
        if given in map(set, alternatives):
            return name
    if given and given <= {"reward_fn", "environment"} and (method is None or method in _ONLINE):
        raise ConfigError(f"accord.train({min(given)}=...) needs prompts=[...], the texts the policy shall answer")
    if "rewards" in given and "samples" not in given:
        raise ConfigError(
            "rewards= go with samples=, one for each; methods that sample ask reward_fn= for their rewards"
        )
    found = " and ".join(f"{name}=" for name in sorted(given)) or "nothing"
    if method is None:
        raise ConfigError(
            "accord.train takes reward_fn= and prompts= (PPO), or samples= (SFT), with rewards= (ILQL), or pairs= "
            f"(DPO); it was given {found}"
        )
    takes = " or ".join(" and ".join(f"{name}=" for name in names) for names in _TAKES[method])
    raise ConfigError(f"accord.train(method={method!r}) takes {takes}; it was given {found}")


def _name(factory: EnvironmentFactory) -> str:
    """What a recipe would say, for the record: what is given here need not be found by it."""
    return f"{getattr(factory, '__module__', '')}:{getattr(factory, '__qualname__', type(factory).__qualname__)}"


def _yaml_like(value: Any) -> Any:
    """Sections as a recipe file would give them: fresh dicts and lists, paths as text."""
    if isinstance(value, Mapping):
        return {key: _yaml_like(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_yaml_like(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _messages(prompt: Prompt, where: str) -> tuple[Message, ...]:
    if isinstance(prompt, str):
        return (Message("user", _text(prompt, where)),)
    try:
        return tuple(Message(m["role"], m["content"]) for m in prompt)
    except (KeyError, TypeError) as error:
        raise DataError(
            f"{where} is {prompt!r}: expected a text or a list of {{'role', 'content'}} messages"
        ) from error


def _text(text: str, where: str) -> str:
    if not text.strip():
        raise DataError(f"{where} is empty: expected some text")
    return text


def _rows(rows: Sequence[Any], name: str, read: Callable[[Any, str, Counter[str]], tuple[Group, ...]]) -> Part:
    """What `read` makes of every row; it is told where the row stands, for its errors."""
    left_out: Counter[str] = Counter()
    groups = [group for index, row in enumerate(rows) for group in read(row, f"{name}[{index}]", left_out)]
    return Part.of(groups, name, left_out_notes(left_out))


def _pair(pair: Any, where: str, left_out: Counter[str]) -> tuple[Group, ...]:
    if isinstance(pair, tuple) and len(pair) == 3:
        pair = dict(zip(("prompt", "chosen", "rejected"), pair, strict=True))
    if not isinstance(pair, Mapping):
        raise DataError(
            f"{where} is {pair!r}: expected a (prompt, chosen, rejected) tuple, or a dict with the fields of a row in "
            "a data file"
        )
    return read_row(pair, where, left_out)


def _sample(sample: Any, where: str, left_out: Counter[str]) -> tuple[Group, ...]:
    if isinstance(sample, Mapping):
        return read_row(sample, where, left_out)
    if isinstance(sample, str):
        return (Group((), (Completion((Message("assistant", _text(sample, where)),)),)),)
    if isinstance(sample, tuple | list) and len(sample) == 2 and all(isinstance(part, str) for part in sample):
        asked, answer = (_text(part, f"{where}[{index}]") for index, part in enumerate(sample))
        return (Group((Message("user", asked),), (Completion((Message("assistant", answer),)),)),)
    if isinstance(sample, list):
        messages = _messages(sample, where)
        first = next((i for i, m in enumerate(messages) if m.role == "assistant"), None)
        if first is not None:
            return (Group(messages[:first], (Completion(messages[first:]),)),)
    raise DataError(
        f"{where} is {sample!r}: expected a text, a (prompt, answer) pair of texts, a list of messages with an "
        "assistant turn, or a dict with the fields of a row in a data file"
    )


def _rewarded(part: Part, samples: Sequence[Any], rewards: Sequence[Reward]) -> Part:
    """The answers with their returns, or with a reward for each token."""
    if len(samples) != len(rewards):
        raise DataError(f"there are {len(samples)} samples and {len(rewards)} rewards: give one for each sample")
    if len(part.groups) != len(samples):
        raise DataError("rewards= needs samples that are single answers: (prompt, answer), messages, or texts")
    groups = []
    for index, (group, reward) in enumerate(zip(part.groups, rewards, strict=True)):
        of_tokens = isinstance(reward, list | tuple)
        given: list[Any] = list(reward) if of_tokens else [reward]
        if not given or not all(isinstance(x, Real) and math.isfinite(x) for x in given):
            raise DataError(
                f"rewards[{index}] is {reward!r}: expected a finite number, or a list of them, one for each token"
            )
        numbers = tuple(map(float, given))
        answer = replace(group.completions[0], score=math.fsum(numbers), rewards=numbers if of_tokens else None)
        groups.append(replace(group, completions=(answer,)))
    return Part.of(groups, "samples", part.notes)
