"""Every stage Accord knows, in the order they run, with what people should know before they choose one. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

__all__ = ["BEST_OF_N", "POLICY_STAGES", "STAGES", "Stage"]

# The stage that evaluations know as a policy too, although it trains none.
BEST_OF_N = "bestofn"

Data = Literal["demonstrations", "comparisons", "labels", "ratings", "prompts", "evaluation"]


@dataclass(frozen=True, slots=True)
class Stage:
    """One stage: section, folder and verb of the same name (with a hyphen for the underscore).

    data     what it learns from
    trained, frozen   models in memory, each counted as one of the policy's size
    leaves   what is in its `model/` folder afterwards
    needs, costs, choose   the rows of `accord methods`: data and models, time and memory next to SFT, when to take it
    """

    name: str
    title: str
    help: str
    data: Data
    trained: int
    frozen: int
    leaves: Literal["policy", "scorer", "nothing"]
    example: str
    needs: str = ""
    costs: str = ""
    choose: str = ""

    @property
    def verb(self) -> str:
        return self.name.replace("_", "-")


_STAGES = (
    Stage(
        "sft", "Supervised fine-tuned model", "supervised fine-tuning on demonstrations",
        "demonstrations", 1, 0, "policy",
        "accord sft --set model.path=my-model --set data.sft=demos.jsonl --set sft.epochs=2 --set out=runs/a",
        needs="demonstrations (or the chosen answers of comparisons)",
        costs="1 model trained",
        choose="always first: every other method starts better from a model that already answers",
    ),
    Stage(
        "reward", "Reward model", "train a reward model on comparisons",
        "comparisons", 1, 0, "scorer",
        "accord reward recipe.yaml --set reward.learning_rate=1e-5",
        needs="comparisons: pairs, rankings or ratings",
        costs="1 model trained",
        choose="before ppo, rloo, grpo, reinforce, online-dpo, rft and bestofn, and to judge in evaluate",
    ),
    Stage(
        "dpo", "Policy trained with DPO", "direct preference optimisation and its kin, from pairs",
        "comparisons", 1, 0, "policy",
        "accord dpo recipe.yaml --set dpo.beta=0.1 --set dpo.loss=ipo",
        needs="pairs (rankings and ratings convert); reference log-probabilities, computed once",
        costs="1 model trained; about twice SFT's time a pair",
        choose="the first thing to try with pairs: no reward model, no sampling, stable",
    ),
    Stage(
        "orpo", "Policy trained with ORPO", "odds-ratio preference optimisation, from pairs, without a reference",
        "comparisons", 1, 0, "policy",
        "accord orpo recipe.yaml --set orpo.odds_ratio_coef=0.2",
        needs="pairs; no reference",
        costs="1 model trained; about twice SFT's time a pair",
        choose="to do SFT and preference in one stage, straight from a base model",
    ),
    Stage(
        "kto", "Policy trained with KTO", "learn from answers marked good or bad (KTO, BCO)",
        "labels", 1, 0, "policy",
        "accord kto recipe.yaml --set kto.beta=0.1",
        needs="single answers marked good or bad (pairs convert); reference log-probabilities, computed once",
        costs="1 model trained; one more forward pass a step for the reference point",
        choose="when feedback is thumbs up or down, unbalanced, or not paired",
    ),
    Stage(
        "ilql", "Policy trained with ILQL", "implicit language Q-learning, from answers with returns",
        "ratings", 1, 0, "policy",
        "accord ilql recipe.yaml --set ilql.beta=2",
        needs="answers with returns, or a reward a token (labels and pairs convert); no reference",
        costs="1 model trained plus Q heads over the vocabulary; sampling runs the heads too",
        choose="when answers have returns that a better combination of their parts could beat",
    ),
    Stage(
        "ppo", "Policy trained with PPO", "optimise the policy against the reward model, with a value model",
        "prompts", 2, 2, "policy",
        "accord ppo recipe.yaml --set ppo.kl_coef=0.1 --dry-run",
        needs="prompts and something that scores: a reward model or a function",
        costs="4 models; samples, and several updates on each sample",
        choose="the most reward for a given distance from the reference, where the tuning is affordable",
    ),
    Stage(
        "rloo", "Policy trained with RLOO", "REINFORCE with a leave-one-out baseline, no value model",
        "prompts", 1, 2, "policy",
        "accord rloo recipe.yaml --set rloo.samples_per_prompt=4",
        needs="prompts, something that scores, at least 2 samples a prompt",
        costs="3 models; samples",
        choose="instead of PPO when memory is short or answers are short and judged as a whole",
    ),
    Stage(
        "grpo", "Policy trained with GRPO", "group-relative policy optimisation, no value model",
        "prompts", 1, 2, "policy",
        "accord grpo recipe.yaml --set grpo.advantage_scale=none --set grpo.averaging=constant",
        needs="prompts, something that scores, at least 2 samples a prompt (8 is usual)",
        costs="3 models; samples",
        choose="for rewards that can be checked, and many samples a prompt",
    ),
    Stage(
        "reinforce", "Policy trained with REINFORCE", "the plain policy gradient with the batch's mean as baseline",
        "prompts", 1, 2, "policy",
        "accord reinforce recipe.yaml --set reinforce.prompts_per_step=64",
        needs="prompts and something that scores; one sample a prompt will do",
        costs="3 models; samples",
        choose="as the baseline that cleverer methods must beat",
    ),
    Stage(
        "online_dpo", "Policy trained with online DPO", "DPO on the policy's own answers, judged as it goes",
        "prompts", 1, 2, "policy",
        "accord online-dpo recipe.yaml --set online_dpo.beta=0.1",
        needs="prompts and something that scores",
        costs="3 models; samples",
        choose="when DPO's data is stale: fresh pairs keep up with the policy",
    ),
    Stage(
        "rft", "Policy trained by rejection sampling", "sample, keep the best of each prompt, imitate it",
        "prompts", 1, 1, "policy",
        "accord rft recipe.yaml --set rft.samples_per_prompt=16",
        needs="prompts and something that scores; no reference",
        costs="2 models; many samples, then SFT",
        choose="when a policy gradient is too delicate: SFT on what scored best",
    ),
    Stage(
        "bestofn", "Best-of-n", "sample n answers to each prompt and keep the one that scores best",
        "prompts", 0, 2, "nothing",
        "accord bestofn recipe.yaml --set bestofn.n=16",
        needs="prompts and something that scores; trains nothing",
        costs="2 models; n samples for every answer, for ever",
        choose="to see what the reward model is worth before training, and as data for SFT or DPO",
    ),
    Stage(
        "evaluate", "Evaluation", "compare models on held-out prompts",
        "evaluation", 0, 2, "nothing",
        "accord evaluate recipe.yaml --set evaluate.prompts=1000",
    ),
)  # fmt: skip

STAGES: Mapping[str, Stage] = MappingProxyType({stage.name: stage for stage in _STAGES})
POLICY_STAGES: tuple[str, ...] = tuple(stage.name for stage in _STAGES if stage.leaves == "policy")
