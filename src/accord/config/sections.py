"""The sections of a recipe: frozen pydantic models, one per stage, each field with the sentence that explains it.

The descriptions become `--help`, the configuration reference and the error messages. Defaults are the vetted recipe.
Nothing here imports torch.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

__all__ = [
    "DataConfig",
    "EvaluateConfig",
    "ModelConfig",
    "OptimiserFields",
    "PPOConfig",
    "Recipe",
    "RewardConfig",
    "SFTConfig",
    "ScratchConfig",
    "Section",
    "Source",
]


class Section(BaseModel):
    """Base of all sections: immutable, and unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class ScratchConfig(Section):
    """A model built from nothing; its tokenizer is trained on the recipe's own text."""

    kind: Literal["llama", "gpt2"] = Field("llama", description="Architecture family.")
    hidden_size: int = Field(128, ge=8, description="Width of the residual stream.")
    layers: int = Field(4, ge=1, description="Number of transformer blocks.")
    heads: int = Field(4, ge=1, description="Attention heads; must divide hidden_size.")
    vocab_size: int = Field(2048, ge=300, description="Size of the byte-level BPE vocabulary.")
    max_positions: int = Field(1024, ge=16, description="Longest sequence in tokens.")


class ModelConfig(Section):
    """The model everything starts from."""

    path: str | None = Field(
        None, description="Folder (or hub id) of a causal language model; `quickstart` is the embedded tiny model."
    )
    scratch: ScratchConfig | None = Field(None, description="Build a model from nothing instead of loading one.")
    template: str = Field(
        "auto",
        description="Chat template: `auto` (the tokenizer's own, else `plain`), `plain`, `raw` (prompt + completion, "
        "no "
        "turns), or the path of a jinja file.",
    )
    layout: Literal["auto", "shared", "plain"] = Field(
        "auto",
        description="`shared` runs each prompt once for all its completions; `plain` is one row a completion; `auto` "
        "shares when it saves work and the start-up self-check proves both agree on this model.",
    )


def _source(value: object) -> object:
    return {"path": value} if isinstance(value, str) else value


class Source(Section):
    """One file (or folder of parts) of data; a plain string means its path."""

    path: str = Field(description="File or folder.")
    format: str | None = Field(None, description="Format name; unset = detected and said aloud (`accord data check`).")
    map: dict[str, str] = Field(default_factory=dict, description="Which column holds which field: `field: path`.")
    limit: int | None = Field(None, ge=1, description="Use only the first rows.")


def _sources(value: object) -> object:
    return [value] if isinstance(value, str | dict) else value


Sources = Annotated[tuple[Annotated[Source, BeforeValidator(_source)], ...], BeforeValidator(_sources)]


class DataConfig(Section):
    """Where the text comes from. What a stage lacks is derived from what is there, and said aloud."""

    sft: Sources = Field((), description="Demonstrations for SFT. Unset: the chosen answers of `preferences`.")
    preferences: Sources = Field((), description="Comparisons for the reward model: pairs, rankings or ratings.")
    prompts: Sources = Field(
        (), description="Prompts for PPO and evaluation. Unset: those of `preferences`, else `sft`."
    )
    evaluation: Sources = Field((), description="Prompts for evaluation only. Unset: the held-out part of `prompts`.")
    holdout: float = Field(
        0.05,
        ge=0,
        lt=1,
        description="Share of prompts (by a hash of their text, so alike in all files) kept from training.",
    )
    lenient: bool = Field(False, description="Keep the good rows of a file with bad ones, and count the rest.")
    max_tokens: int = Field(1024, ge=8, description="Longest prompt + completion in tokens.")
    max_prompt_tokens: int | None = Field(
        None,
        ge=1,
        description="Longest prompt in tokens; longer ones lose their oldest part. Unset: no limit of its own.",
    )


class OptimiserFields(Section):
    """What every training stage has: optimiser, schedule, batches, checkpoints."""

    learning_rate: float = Field(2e-5, ge=0, description="Peak learning rate of AdamW.")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "cosine", description="How the learning rate falls after warm-up; linear and cosine end at 0."
    )
    warmup_fraction: float = Field(0.03, ge=0, le=1, description="Share of the steps during which the rate rises.")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's decoupled weight decay, on matrices only.")
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="AdamW's beta1.")
    adam_beta2: float = Field(0.95, ge=0, lt=1, description="AdamW's beta2.")
    adam_epsilon: float = Field(1e-8, gt=0, description="AdamW's epsilon.")
    max_grad_norm: float = Field(
        1.0, gt=0, description="Gradients are scaled down to this global norm; the norm before clipping is logged."
    )
    micro_batch_tokens: int = Field(
        8192, ge=16, description="Tokens (padding included) per forward pass. Changes memory and speed, not the result."
    )
    checkpoint_every: int = Field(50, ge=1, description="Steps between checkpoints.")
    keep_checkpoints: int = Field(2, ge=2, description="Newest checkpoints kept; at least 2, one may be damaged.")


class SFTConfig(OptimiserFields):
    """Supervised fine-tuning on demonstrations."""

    epochs: int = Field(1, ge=1, description="Passes over the data.")
    max_steps: int | None = Field(None, ge=1, description="Stop after this many steps, before `epochs` are over.")
    batch_size: int = Field(32, ge=1, description="Examples per optimiser step.")
    loss_on: Literal["assistant", "all"] = Field(
        "assistant", description="Which tokens count: only what the assistant wrote (end of turn included), or all."
    )
    eval_every: int = Field(50, ge=1, description="Steps between evaluations on the held-out part.")


class RewardConfig(OptimiserFields):
    """The reward model, trained on comparisons (Bradley-Terry over all pairs of a prompt)."""

    learning_rate: float = Field(1e-5, ge=0, description="Peak learning rate of AdamW.")
    epochs: int = Field(1, ge=1, description="Passes over the data. More than one over-fits quickly.")
    max_steps: int | None = Field(None, ge=1, description="Stop after this many steps, before `epochs` are over.")
    batch_size: int = Field(32, ge=1, description="Prompts per optimiser step.")
    init: str | None = Field(None, description="Start from this model folder. Unset: the SFT stage, else `model.path`.")
    centring_coef: float = Field(
        0.01, ge=0, description="Weight of the mean squared sum of a pair's scores, which keeps scores near zero."
    )
    use_margins: bool = Field(True, description="Use the margins of the data where it has them.")
    normalise_on: Literal["auto", "demonstrations", "chosen", "none"] = Field(
        "auto",
        description="After training, shift the scores so that these answers score 0 on average: the demonstrations of "
        "`data.sft`, or the chosen answers. `auto`: demonstrations when there are any.",
    )
    eval_every: int = Field(50, ge=1, description="Steps between evaluations on the held-out part.")


class PPOConfig(OptimiserFields):
    """Proximal policy optimisation against a reward model or a reward function."""

    learning_rate: float = Field(1e-5, ge=0, description="Peak learning rate of the policy.")
    value_learning_rate: float | None = Field(None, ge=0, description="Of the value model. Unset: as `learning_rate`.")
    schedule: Literal["constant", "linear", "cosine"] = Field("linear", description="How the learning rates fall.")
    warmup_fraction: float = Field(0.0, ge=0, le=1, description="Share of the steps during which the rates rise.")
    adam_epsilon: float = Field(1e-5, gt=0, description="AdamW's epsilon.")
    checkpoint_every: int = Field(5, ge=1, description="Rollout steps between checkpoints.")
    init: str | None = Field(None, description="Start from this model folder. Unset: the SFT stage, else `model.path`.")
    reward_model: str | None = Field(None, description="Reward model folder. Unset: the reward stage of this recipe.")
    reward_function: str | None = Field(
        None, description="`module:function` called as f(prompt, completion) -> float, instead of a reward model."
    )
    gold_function: str | None = Field(
        None,
        description="`module:function` that is logged beside the reward and never trained on (a simulator's truth).",
    )
    episodes: int = Field(10_000, ge=1, description="Completions sampled in all; rounded up to whole rollout steps.")
    prompts_per_step: int = Field(32, ge=1, description="Prompts per rollout step.")
    samples_per_prompt: int = Field(4, ge=1, description="Completions sampled for each prompt.")
    max_new_tokens: int = Field(128, ge=1, description="Longest completion in tokens.")
    temperature: float = Field(
        1.0, gt=0, description="Sampling temperature, applied alike in rollout, reference and update."
    )
    update_epochs: int = Field(4, ge=1, description="Passes over each rollout, each with a fresh shuffle.")
    minibatches: int = Field(4, ge=1, description="Optimiser updates per pass.")
    kl_coef: float = Field(
        0.05, ge=0, description="Weight of log(policy/reference) per token, subtracted from the reward."
    )
    kl_controller: Literal["fixed", "adaptive"] = Field(
        "fixed", description="`adaptive` moves kl_coef so that KL per sequence approaches target_kl."
    )
    target_kl: float | None = Field(None, gt=0, description="Nats per sequence, for the adaptive controller.")
    kl_horizon: int = Field(10_000, ge=1, description="Episodes over which the adaptive controller acts.")
    gamma: float = Field(1.0, gt=0, le=1, description="Discount per token.")
    gae_lambda: float = Field(0.95, ge=0, le=1, description="Lambda of generalised advantage estimation.")
    clip_range: float = Field(0.2, gt=0, lt=1, description="The policy ratio is clipped to 1 +- this.")
    value_clip_range: float = Field(0.2, gt=0, description="Value predictions may move this far per update.")
    entropy_coef: float = Field(0.0, ge=0, description="Weight of the entropy bonus (nats per token).")
    whiten_advantages: bool = Field(
        True, description="Scale advantages to zero mean and unit variance over the rollout."
    )
    missing_eos_penalty: float = Field(
        1.0, ge=0, description="Subtracted from the score of a completion cut by length."
    )
    score_clip: float | None = Field(None, gt=0, description="Scores are clipped to +- this before the KL penalty.")
    value_init: Literal["reward", "policy"] = Field(
        "reward", description="The value model starts from the reward model, or from the policy with a new head."
    )
    old_logprobs: Literal["recompute", "sampler"] = Field(
        "recompute",
        description="Log-probabilities of the rollout: computed once more by the trainer, so that the first ratio is "
        "exactly 1, or the sampler's own, which saves a forward pass and differs by rounding.",
    )
    samples_every: int = Field(5, ge=1, description="Rollout steps between samples written to samples.jsonl.")


class EvaluateConfig(Section):
    """Compare models on held-out prompts: completions are generated once and judged pairwise."""

    models: tuple[str, ...] = Field(
        (), description="Stage names (base, sft, ppo) or model folders. Unset: every stage of this run, base first."
    )
    against: str | None = Field(
        None, description="Compare each model with this one. Unset: each with the one before it."
    )
    reference: str | None = Field(None, description="KL is measured to this model. Unset: the one compared against.")
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
    micro_batch_tokens: int = Field(8192, ge=16, description="Tokens (padding included) per forward pass.")


class Recipe(Section):
    """A whole plan: model, data and one section a stage."""

    name: str = Field("run", min_length=1, description="Name of the run.")
    seed: int = Field(0, ge=0, description="Everything random follows from this.")
    out: str | None = Field(None, description="Output folder. Unset: `runs/<name>`.")
    threads: int | None = Field(None, ge=1, description="CPU threads. Unset: torch's choice.")
    model: ModelConfig = Field(
        default_factory=lambda: ModelConfig.model_validate({}), description="The model to start from."
    )
    data: DataConfig = Field(default_factory=lambda: DataConfig.model_validate({}), description="The data.")
    sft: SFTConfig | None = Field(None, description="Supervised fine-tuning.")
    reward: RewardConfig | None = Field(None, description="Reward model.")
    ppo: PPOConfig | None = Field(None, description="PPO.")
    evaluate: EvaluateConfig | None = Field(None, description="Evaluation.")
