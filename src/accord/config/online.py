"""The sections of the methods that learn from the policy's own samples, and of those that choose among them."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from accord.config.rewards import ScorerConfig, ScorerName, ShapingConfig
from accord.config.sections import OptimiserFields, Section

__all__ = [
    "BestOfNConfig",
    "GRPOConfig",
    "OnlineDPOConfig",
    "PPOConfig",
    "PolicyGradientFields",
    "REINFORCEConfig",
    "RFTConfig",
    "RLOOConfig",
    "RolloutFields",
    "SamplingFields",
    "TokenKLFields",
]


class SamplingFields(Section):
    """What every method has that samples completions and has them scored."""

    init: str | None = Field(None, description="Start from this model folder. Unset: the SFT stage, else `model.path`.")
    reward_model: str | None = Field(None, description="Reward model folder. Unset: the reward stage of this recipe.")
    reward_function: str | None = Field(
        None, description="`module:function` called as f(prompt, completion) -> float, instead of a reward model."
    )
    scorers: dict[ScorerName, ScorerConfig] = Field(
        default_factory=dict,
        description="Several judges by name, whose weighted scores add up; instead of `reward_model` and "
        "`reward_function`.",
    )
    shaping: ShapingConfig = Field(
        default_factory=lambda: ShapingConfig.model_validate({}), description="From the score to the reward."
    )
    max_failed_fraction: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Share of a step's completions whose scoring may fail before the run stops. Nothing is learned "
        "from their prompts in that step.",
    )
    gold_function: str | None = Field(
        None,
        description="`module:function` that is logged beside the reward and never trained on (a simulator's truth).",
    )
    max_new_tokens: int = Field(128, ge=1, description="Longest completion in tokens.")
    temperature: float = Field(
        1.0, gt=0, description="Sampling temperature, applied alike in rollout, reference and update."
    )
    missing_eos_penalty: float = Field(
        1.0, ge=0, description="Subtracted from the score of a completion cut by length; see `shaping.truncation`."
    )

    @property
    def max_own_tokens(self) -> int:
        """The most tokens that the policy writes in one completion."""
        return self.max_new_tokens


class RolloutFields(SamplingFields, OptimiserFields):
    """What every method has that learns from its own samples: a rollout, several updates on it, the next rollout."""

    learning_rate: float = Field(1e-5, ge=0, description="Peak learning rate of the policy.")
    schedule: Literal["constant", "linear", "cosine"] = Field("linear", description="How the learning rates fall.")
    warmup_fraction: float = Field(0.0, ge=0, le=1, description="Share of the steps during which the rates rise.")
    adam_epsilon: float = Field(1e-5, gt=0, description="AdamW's epsilon.")
    checkpoint_every: int = Field(5, ge=1, description="Rollout steps between checkpoints.")
    holdout_reward_model: str | None = Field(
        None, description="Reward model folder that is logged beside the reward and never trained on, for the guards."
    )
    episodes: int = Field(10_000, ge=1, description="Completions sampled in all; rounded up to whole rollout steps.")
    prompts_per_step: int = Field(32, ge=1, description="Prompts per rollout step.")
    samples_per_prompt: int = Field(4, ge=1, description="Completions sampled for each prompt.")
    update_epochs: int = Field(1, ge=1, description="Passes over each rollout, each with a fresh shuffle.")
    minibatches: int = Field(1, ge=1, description="Optimiser updates per pass.")
    score_clip: float | None = Field(
        None, gt=0, description="Scores are clipped to +- this, after `shaping.reference` and `shaping.running`."
    )
    kl_budget: float | None = Field(
        None,
        gt=0,
        description="Nats per answer: a rollout further from the reference than this on average is not learned from "
        "and ends the stage. Unset: no limit.",
    )
    old_logprobs: Literal["recompute", "sampler"] = Field(
        "recompute",
        description="Log-probabilities of the rollout: computed once more by the trainer, so that the first ratio is "
        "exactly 1, or the sampler's own, which saves a forward pass and differs by rounding.",
    )
    samples_every: int = Field(5, ge=1, description="Rollout steps between samples written to samples.jsonl.")
    environment: str | None = Field(
        None,
        description="`module:factory` of whom the policy talks with over several turns, such as a user simulator. Its "
        "rewards are added to the score. Unset: one answer a prompt.",
    )
    max_turns: int | None = Field(
        None, ge=1, description="The most answers the policy gives in a conversation; set together with `environment`."
    )

    @property
    def max_own_tokens(self) -> int:
        """The most tokens that the policy writes in one completion, all turns together."""
        return self.max_new_tokens * (self.max_turns or 1)


class PolicyGradientFields(RolloutFields):
    """What the policy-gradient methods have besides: clipped ratios, and a price on the distance from the reference."""

    kl_coef: float = Field(
        0.05, ge=0, description="Weight of the KL to the reference: of log(policy/reference), paid in the reward."
    )
    clip_range: float = Field(0.2, gt=0, lt=1, description="The policy ratio is clipped to 1 +- this.")
    entropy_coef: float = Field(0.0, ge=0, description="Weight of the entropy bonus (nats per token).")
    sampler_correction: Literal["none", "truncated"] = Field(
        "none",
        description="`truncated` weighs the policy loss by min(p / p_sampler, cap), p the trainer's own probability: "
        "for a sampler whose probabilities are not the trainer's (quantised, stale, another engine).",
    )
    sampler_correction_cap: float = Field(2.0, ge=1, description="The cap of that weight: more is truer and noisier.")


class TokenKLFields(PolicyGradientFields):
    """What the methods have whose actions are tokens: how the distance from the reference is estimated, and where it is
    paid. Combinations whose gradient is not that of a KL are refused."""

    kl_estimator: Literal["k1", "k2", "k3"] = Field(
        "k1",
        description="Of a token's KL, x = log(policy/reference): `k1` x, for the reward; `k2` x^2/2, for the loss; "
        "`k3` exp(-x) - 1 + x, for the loss, where its gradient is that of KL(reference || policy).",
    )
    kl_in: Literal["reward", "loss"] = Field(
        "reward",
        description="Where kl_coef times the KL is paid: `reward` sees what a token does to the KL of later ones, "
        "`loss` pulls each token by itself.",
    )


class PPOConfig(TokenKLFields):
    """Proximal policy optimisation against a reward model or a reward function."""

    update_epochs: int = Field(4, ge=1, description="Passes over each rollout, each with a fresh shuffle.")
    minibatches: int = Field(4, ge=1, description="Optimiser updates per pass.")
    value_learning_rate: float | None = Field(None, ge=0, description="Of the value model. Unset: as `learning_rate`.")
    kl_controller: Literal["fixed", "adaptive"] = Field(
        "fixed", description="`adaptive` moves kl_coef so that KL per sequence approaches target_kl."
    )
    target_kl: float | None = Field(None, gt=0, description="Nats per sequence, for the adaptive controller.")
    kl_horizon: int = Field(10_000, ge=1, description="Episodes over which the adaptive controller acts.")
    gamma: float = Field(1.0, gt=0, le=1, description="Discount per token.")
    gae_lambda: float = Field(0.95, ge=0, le=1, description="Lambda of generalised advantage estimation.")
    value_clip_range: float | None = Field(
        0.2, gt=0, description="Value predictions may move this far per update; null = as far as they like."
    )
    value_warmup: int = Field(
        0, ge=0, description="First rollouts that teach the value model alone, while the policy stands still."
    )
    update_kl_stop: float | None = Field(
        None,
        gt=0,
        description="Nats per token: once a minibatch finds the policy further than this from the one that sampled "
        "(k3), it and the rest of the rollout are not learned from. Unset: no limit.",
    )
    whiten_advantages: bool = Field(
        True, description="Scale advantages to zero mean and unit variance over the rollout."
    )
    ptx_coef: float = Field(
        0.0,
        ge=0,
        description="Weight of the SFT loss (nats per token) of a batch of demonstrations, added to every update of "
        "the policy (PPO-ptx); 0 = off.",
    )
    ptx_batch_size: int = Field(32, ge=1, description="Demonstrations per update, with ptx_coef.")
    value_trunk: Literal["own", "policy"] = Field(
        "own",
        description="`own`: the value model is a model of its own. `policy`: it is a head, from zeros, on the policy's "
        "trunk, and one pass teaches both: about half the work and memory, but both pull at the same weights.",
    )
    value_coef: float = Field(
        0.1, gt=0, description="Weight of the value loss beside the policy's, with `value_trunk` = policy."
    )
    value_init: str = Field(
        "reward",
        min_length=1,
        description="The value model starts from the reward model (`reward`), from the policy under a head of zeros "
        "(`policy`), or from this folder of a value or reward model.",
    )


class RLOOConfig(PolicyGradientFields):
    """REINFORCE with a leave-one-out baseline: an answer is judged against the prompt's other answers."""

    samples_per_prompt: int = Field(4, ge=2, description="Completions sampled for each prompt; at least 2.")


class GRPOConfig(TokenKLFields):
    """Group-relative policy optimisation: an answer is judged against the mean of the prompt's answers."""

    samples_per_prompt: int = Field(8, ge=2, description="Completions sampled for each prompt; at least 2.")
    kl_coef: float = Field(0.04, ge=0, description="Weight of the distance from the reference; see `kl_in`.")
    kl_estimator: Literal["k1", "k2", "k3"] = Field(
        "k3",
        description="Of a token's KL, x = log(policy/reference): `k3` exp(-x) - 1 + x in the loss, as published (its "
        "gradient is that of KL(reference || policy)); `k2` x^2/2 in the loss, with the gradient of KL(policy || "
        "reference); `k1` x in the reward, as PPO.",
    )
    kl_in: Literal["reward", "loss"] = Field(
        "loss", description="Where kl_coef times the KL is paid: `reward` goes with `k1`, `loss` with `k2` and `k3`."
    )
    advantage_scale: Literal["std", "none"] = Field(
        "std",
        description="`std` divides by the standard deviation of the prompt's scores, as published; `none` does not "
        "favour prompts whose answers hardly differ.",
    )
    averaging: Literal["completion", "token", "constant"] = Field(
        "completion",
        description="`completion`: mean over each answer's tokens, then over answers, as published (long bad answers "
        "are punished less); `token`: mean over all tokens; `constant`: sum over tokens / (answers x max_new_tokens x "
        "max_turns), free of length. The length- and std-free form is `constant` with `advantage_scale` none.",
    )


class REINFORCEConfig(PolicyGradientFields):
    """REINFORCE with the batch's mean as baseline: the plainest policy gradient, one answer a prompt will do."""

    samples_per_prompt: int = Field(1, ge=1, description="Completions sampled for each prompt.")
    advantage_scale: Literal["std", "none"] = Field(
        "none", description="`std` divides the advantages by their standard deviation over the rollout."
    )


class OnlineDPOConfig(RolloutFields):
    """DPO on the policy's own answers: of each prompt's samples the best and the worst make a fresh pair."""

    samples_per_prompt: int = Field(2, ge=2, description="Completions sampled for each prompt; at least 2.")
    loss: Literal["dpo", "ipo", "hinge"] = Field("dpo", description="The loss of a pair, as in the `dpo` section.")
    beta: float = Field(0.1, gt=0, description="How dearly distance from the reference is paid; IPO's tau.")


class RFTConfig(SamplingFields, OptimiserFields):
    """Rejection-sampling fine-tuning: sample, keep what scores best of each prompt, imitate it, again and again."""

    learning_rate: float = Field(2e-5, ge=0, description="Peak learning rate of AdamW.")
    schedule: Literal["constant", "linear", "cosine"] = Field("constant", description="How the learning rate falls.")
    warmup_fraction: float = Field(0.0, ge=0, le=1, description="Share of the steps during which the rate rises.")
    checkpoint_every: int = Field(1, ge=1, description="Improvement steps between checkpoints.")
    cycles: int = Field(2, ge=1, description="How often new completions are sampled; the older ones are forgotten.")
    improve_steps: int = Field(4, ge=1, description="Improvement steps per cycle, each with a stricter selection.")
    prompts_per_cycle: int | None = Field(None, ge=1, description="Prompts sampled for in a cycle. Unset: all.")
    samples_per_prompt: int = Field(32, ge=2, description="Completions sampled for each prompt; at least 2.")
    start_quantile: float = Field(
        0.7, ge=0, lt=1, description="The first step of a cycle keeps what scores at least this quantile of its prompt."
    )
    end_quantile: float = Field(0.95, ge=0, lt=1, description="The last step of a cycle keeps what scores this much.")
    epochs: int = Field(1, ge=1, description="Passes over the kept completions in an improvement step.")
    batch_size: int = Field(32, ge=1, description="Completions per optimiser update.")
    samples_every: int = Field(1, ge=1, description="Improvement steps between samples written to samples.jsonl.")


class BestOfNConfig(SamplingFields):
    """Best-of-n: sample n completions of each prompt and keep the one that scores best, as data and as a policy."""

    n: int = Field(16, ge=2, description="Completions sampled for each prompt; at least 2.")
    prompts: int | None = Field(None, ge=1, description="Use at most this many training prompts. Unset: all.")
    micro_batch_tokens: int = Field(2048, ge=16, description="Tokens (padding included) per forward pass.")
