"""One run of a work in which Accord samples and learns: the trainers of the online stages, whole iterations."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import accord
from accord.config import GRPOConfig, PPOConfig, RLOOConfig
from accord.data.templates import Template
from accord.methods import learners
from accord.methods.online_trainer import OnlineTrainer
from accord.methods.ppo import PPOTrainer
from accord.methods.rollouts import RolloutModels
from accord.models.load import load_policy, load_reward_model, value_head, value_model_from
from accord.models.sharing import sharing_copy
from accord.records import Group, Message, SampledCompletion, TokenGroup
from accord.rewards.scorers import FunctionScorer, ModelScorer
from accord.rollout.native import NativeSampler, PromptTokens
from accord.rollout.sampling import Sampling
from accord.training.environment import peak_memory_mb
from benchmarks.speed.accord_side import layout_of
from benchmarks.speed.work import KL_COEF, OPTIMISER, PAD, Timing, Work, groups_of, mean_logprob, reward, words

__all__ = ["run"]


def run(work: Work, folder: Path, apart: bool) -> Timing:
    (groups,) = groups_of(work)
    policy, tokenizer = load_policy(folder / "policy")
    at_rest, started = peak_memory_mb(), time.perf_counter()
    step = _training(work, folder, policy, tokenizer, groups, apart)
    once = time.perf_counter() - started
    seconds, learned = [], []
    for number in range(1, work.calls(apart) + 1):
        before = time.perf_counter()
        step(number)
        seconds.append(time.perf_counter() - before)
        if apart:
            learned.append(mean_logprob(policy, groups))
    return Timing(once, seconds, learned, at_rest, peak_memory_mb(), accord.__version__)


def _training(
    work: Work, folder: Path, policy: Any, tokenizer: Any, groups: list[TokenGroup], apart: bool
) -> Callable[[int], None]:
    template = Template.of(tokenizer, "raw")
    settings: dict[str, Any] = {
        **OPTIMISER, "schedule": "constant", "max_new_tokens": work.answer, "prompts_per_step": work.batch,
        "samples_per_prompt": work.answers, "episodes": work.calls(apart) * work.batch * work.answers,
        "kl_coef": KL_COEF, "missing_eos_penalty": 0.0,
        # The sampler's are not those of the answers that it is given.
        "old_logprobs": "recompute" if apart else "sampler",
    }  # fmt: skip
    reward_model = load_reward_model(folder / "reward")[0] if work.kind == "ppo" else None
    models = RolloutModels(
        policy=policy,
        reference=sharing_copy(policy).requires_grad_(False),
        sampler=_Given(groups) if apart else NativeSampler(policy, pad_id=PAD),
        template=template,
        scorer=FunctionScorer(lambda prompt, completion: reward(completion), "even words")
        if reward_model is None
        else ModelScorer(
            reward_model, template, micro_batch_tokens=2048, max_tokens=1024, max_prompt_tokens=None, name="reward"
        ),
        gold=None,
        layout=layout_of(policy, folder, work, groups),
    )
    prompts = [
        (Group((Message("user", words(g.prompt_ids)),)), TokenGroup(g.prompt_ids, (), g.prompt_id)) for g in groups
    ]
    if reward_model is None:
        return _without_value_model(work, models, prompts, settings)
    value = value_head(policy) if work.one_trunk else value_model_from(reward_model)
    return _with_value_model(work, models, prompts, settings, value, apart)


def _without_value_model(work: Work, models: RolloutModels, prompts: Any, settings: dict[str, Any]) -> Any:
    if work.kind == "grpo":
        grpo = GRPOConfig.model_validate(settings)
        trainer = OnlineTrainer("grpo", models, prompts, grpo, learners.grpo(grpo), 0)
    else:
        rloo = RLOOConfig.model_validate(settings)
        trainer = OnlineTrainer("rloo", models, prompts, rloo, learners.rloo(rloo), 0)
    return lambda number: _nothing(trainer.step(number))


def _with_value_model(
    work: Work, models: RolloutModels, prompts: Any, settings: dict[str, Any], value: Any, apart: bool
) -> Any:
    """The peer has no gradient clipping. In the run apart a pass is one update, so that the order of answers, which
    is each side's own, does not matter."""
    own: dict[str, Any] = {"max_grad_norm": 1e9, "minibatches": 1 if apart else 4}
    trunk: dict[str, Any] = {"value_trunk": "policy"} if work.one_trunk else {}
    section = PPOConfig.model_validate(settings | own | trunk)
    trainer = PPOTrainer(models, value, prompts, section, 0)
    return lambda number: _nothing(trainer.step(number))


def _nothing(outcome: Any) -> None:
    return None


class _Given:
    """Hands out the answers of the work instead of sampling."""

    def __init__(self, groups: Sequence[TokenGroup]) -> None:
        self._answers = {group.prompt_ids: group.completions for group in groups}

    def generate(
        self, prompts: Sequence[PromptTokens], n: int, sampling: Sampling, key: tuple[int | str, ...]
    ) -> list[tuple[SampledCompletion, ...]]:
        return [
            tuple(SampledCompletion(c.ids, (0.0,) * len(c.ids), "stop") for c in self._answers[prompt.ids][:n])
            for prompt in prompts
        ]
