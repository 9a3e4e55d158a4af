"""The recipe: a whole plan, one section a stage, and the evaluation that closes it."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from accord.config.guards import GuardsConfig
from accord.config.loop import LoopConfig
from accord.config.offline import DPOConfig, ILQLConfig, KTOConfig, ORPOConfig, RewardConfig, SFTConfig
from accord.config.online import (
    BestOfNConfig,
    GRPOConfig,
    OnlineDPOConfig,
    PPOConfig,
    REINFORCEConfig,
    RFTConfig,
    RLOOConfig,
)
from accord.config.sections import DataConfig, ModelConfig, Section

__all__ = ["EvaluateConfig", "Recipe"]


class EvaluateConfig(Section):
    """Compare models on held-out prompts: completions are generated once and judged pairwise."""

    models: tuple[str, ...] = Field(
        (),
        description="Stage names (base, sft, dpo, ppo, bestofn, ...) or model folders. Unset: every stage of this run, "
        "base first.",
    )
    against: str | None = Field(
        None, description="Compare each model with this one. Unset: each with the one before it."
    )
    reference: str | None = Field(None, description="KL is measured to this model. Unset: the one compared against.")
    against_references: bool = Field(
        False,
        description="Judge each model against the human reference answers too. Prompts without one are left out, and "
        "counted.",
    )
    prompts: int = Field(500, ge=2, description="How many held-out prompts at most.")
    max_new_tokens: int = Field(128, ge=1, description="Longest completion in tokens.")
    temperature: float = Field(1.0, ge=0, description="Sampling temperature; 0 = greedy.")
    top_k: int = Field(0, ge=0, description="Sample from the k likeliest tokens; 0 = all.")
    top_p: float = Field(1.0, gt=0, le=1, description="Sample from the smallest set holding this probability.")
    gold_function: str | None = Field(
        None,
        description="`module:function` f(prompt, completion) -> float that judges. Unset: the reward model judges.",
    )
    reward_model: str | None = Field(None, description="Reward model folder. Unset: the reward stage of this recipe.")
    tie_margin: float = Field(0.0, ge=0, description="Score differences up to this count as ties.")
    micro_batch_tokens: int = Field(2048, ge=16, description="Tokens (padding included) per forward pass.")


class Recipe(Section):
    """A whole plan: model, data and one section a stage."""

    name: str = Field("run", min_length=1, description="Name of the run.")
    seed: int = Field(0, ge=0, description="Everything random follows from this.")
    out: str | None = Field(None, description="Output folder. Unset: `runs/<name>`.")
    threads: int | None = Field(None, ge=1, le=1024, description="CPU threads. Unset: torch's choice.")
    model: ModelConfig = Field(
        default_factory=lambda: ModelConfig.model_validate({}), description="The model to start from."
    )
    data: DataConfig = Field(default_factory=lambda: DataConfig.model_validate({}), description="The data.")
    sft: SFTConfig | None = Field(None, description="Supervised fine-tuning.")
    reward: RewardConfig | None = Field(None, description="Reward model.")
    dpo: DPOConfig | None = Field(None, description="Direct preference optimisation and its kin.")
    orpo: ORPOConfig | None = Field(None, description="Odds-ratio preference optimisation.")
    kto: KTOConfig | None = Field(None, description="Learning from answers marked good or bad: KTO, BCO.")
    ilql: ILQLConfig | None = Field(None, description="Implicit language Q-learning.")
    ppo: PPOConfig | None = Field(None, description="PPO.")
    rloo: RLOOConfig | None = Field(None, description="REINFORCE with a leave-one-out baseline.")
    grpo: GRPOConfig | None = Field(None, description="Group-relative policy optimisation.")
    reinforce: REINFORCEConfig | None = Field(None, description="REINFORCE with a batch baseline.")
    online_dpo: OnlineDPOConfig | None = Field(None, description="DPO on the policy's own answers.")
    rft: RFTConfig | None = Field(None, description="Rejection-sampling fine-tuning.")
    bestofn: BestOfNConfig | None = Field(None, description="Best-of-n sampling.")
    guards: GuardsConfig = Field(
        default_factory=lambda: GuardsConfig.model_validate({}), description="Alarms while a stage trains."
    )
    evaluate: EvaluateConfig | None = Field(None, description="Evaluation.")
    loop: LoopConfig | None = Field(None, description="Rounds of labels, reward model and policy: `accord loop`.")

    @property
    def root(self) -> Path:
        """The run's folder: one sub-folder a stage."""
        return Path(self.out or f"runs/{self.name}")
