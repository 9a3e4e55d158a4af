"""The sections of the methods that learn from fixed data: demonstrations, comparisons, ratings."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from accord.config.sections import OfflineFields, Section

__all__ = [
    "MARGIN_FREE",
    "SOFT_LABEL_FREE",
    "DPOConfig",
    "ILQLConfig",
    "KTOConfig",
    "ORPOConfig",
    "PairLoss",
    "RewardConfig",
    "RougeConfig",
    "SFTConfig",
]

PairLoss = Literal["dpo", "conservative", "robust", "ipo", "hinge", "rdpo", "simpo", "cpo", "apo_zero", "apo_down"]
MARGIN_FREE: frozenset[PairLoss] = frozenset({"ipo", "apo_zero", "apo_down"})  # losses without a place for margins
SOFT_LABEL_FREE = frozenset({"apo_zero", "apo_down", "orpo"})  # losses that take every label as certain


class RougeConfig(Section):
    """Answers the model writes to held-out prompts, measured by their ROUGE against the demonstrations."""

    prompts: int = Field(128, ge=2, description="How many held-out demonstrations at most.")
    max_new_tokens: int = Field(128, ge=1, description="Longest answer in tokens.")
    temperature: float = Field(0.0, ge=0, description="Sampling temperature; 0 = greedy.")


class SFTConfig(OfflineFields):
    """Supervised fine-tuning on demonstrations."""

    batch_size: int = Field(32, ge=1, description="Examples per optimiser step.")
    loss_on: Literal["assistant", "all"] = Field(
        "assistant", description="Which tokens count: only what the assistant wrote (end of turn included), or all."
    )
    rouge: RougeConfig | None = Field(
        None, description="Write answers to held-out prompts at every evaluation. Unset: none are written."
    )


class RewardConfig(OfflineFields):
    """The reward model, trained on comparisons (Bradley-Terry over all pairs of a prompt)."""

    learning_rate: float = Field(1e-5, ge=0, description="Peak learning rate of AdamW.")
    epochs: int = Field(1, ge=1, description="Passes over the data. More than one over-fits quickly.")
    init: str | None = Field(None, description="Start from this model folder. Unset: the SFT stage, else `model.path`.")
    centring_coef: float = Field(
        0.01, ge=0, description="Weight of the mean squared sum of a pair's scores, which keeps scores near zero."
    )
    use_margins: bool = Field(True, description="Use the margins of the data where it has them.")
    heads: int = Field(
        1,
        ge=1,
        description="Heads on the one trunk, each with its own start and its own bootstrap of the comparisons: an "
        "ensemble, whose score is the mean and whose disagreement says where it is unsure.",
    )
    loss: Literal["pairs", "divergence_span"] = Field(
        "pairs",
        description="What is compared: `pairs`, the scores of whole answers; `divergence_span`, the scores at every "
        "token from where the answers part.",
    )
    length_decorrelation: float = Field(
        0.0,
        ge=0,
        description="Weight of the terms that keep scores uncorrelated with length, by a second head that is dropped "
        "after training; 0 = off, the paper has 1.",
    )
    min_words: int = Field(0, ge=0, description="Leave out answers of fewer words than this.")
    normalise_on: Literal["auto", "demonstrations", "chosen", "none"] = Field(
        "auto",
        description="After training, shift the scores so that these answers score 0 on average: the demonstrations of "
        "`data.sft`, or the chosen answers. `auto`: demonstrations when there are any.",
    )


class DPOConfig(OfflineFields):
    """Direct preference optimisation and its kin: the policy learns from pairs without a reward model."""

    loss: PairLoss = Field(
        "dpo",
        description="`dpo`; `conservative` and `robust` allow for flipped labels; `ipo` does not run off on clear-cut "
        "pairs; `hinge` stops at a margin; `rdpo` discounts length; `simpo` and `cpo` need no reference; `apo_zero` "
        "raises the chosen and lowers the rejected, `apo_down` lowers both.",
    )
    beta: float = Field(
        0.1, gt=0, description="How dearly distance from the reference is paid; IPO's tau. SimPO wants 2 to 10."
    )
    learning_rate: float = Field(1e-6, ge=0, description="Peak learning rate of AdamW.")
    warmup_fraction: float = Field(0.1, ge=0, le=1, description="Share of the steps during which the rate rises.")
    init: str | None = Field(None, description="Start from this model folder. Unset: the SFT stage, else `model.path`.")
    logprobs: Literal["auto", "sum", "average"] = Field(
        "auto",
        description="An answer's log-probability: the sum over its tokens, or their average (length normalisation). "
        "`auto`: average for simpo, sum for the others.",
    )
    label_smoothing: float = Field(
        0.1, ge=0, lt=0.5, description="Share of labels believed to be flipped; read by conservative and robust."
    )
    target_margin: float = Field(1.0, ge=0, description="SimPO's gamma: how far apart the two answers should be.")
    length_coef: float = Field(0.01, ge=0, description="R-DPO's alpha: reward granted to a token of length.")
    sft_coef: float | None = Field(
        None, ge=0, description="Weight of the chosen answers' SFT loss (RPO). Unset: 1 for cpo, 0 for the others."
    )
    use_margins: bool = Field(
        False,
        description="Ask of each pair an implicit reward larger by the margin of the data: its margin column, or the "
        "difference of its two scores. Their unit is that of beta times a log-ratio.",
    )


class ORPOConfig(OfflineFields):
    """Odds-ratio preference optimisation: SFT on the chosen answers and preference in one, without a reference."""

    learning_rate: float = Field(8e-6, ge=0, description="Peak learning rate of AdamW.")
    warmup_fraction: float = Field(0.1, ge=0, le=1, description="Share of the steps during which the rate rises.")
    init: str | None = Field(None, description="Start from this model folder. Unset: the SFT stage, else `model.path`.")
    odds_ratio_coef: float = Field(0.1, ge=0, description="Weight of the odds-ratio term (the paper's lambda).")


class KTOConfig(OfflineFields):
    """Kahneman-Tversky optimisation (and BCO): learns from single answers, each desirable or not."""

    loss: Literal["kto", "bco"] = Field("kto", description="`kto`, or `bco`: a binary classifier with a moving shift.")
    beta: float = Field(0.1, gt=0, description="How dearly distance from the reference is paid.")
    learning_rate: float = Field(5e-6, ge=0, description="Peak learning rate of AdamW.")
    warmup_fraction: float = Field(0.1, ge=0, le=1, description="Share of the steps during which the rate rises.")
    batch_size: int = Field(
        32, ge=2, description="Answers per optimiser step; the more, the steadier KTO's reference point."
    )
    init: str | None = Field(None, description="Start from this model folder. Unset: the SFT stage, else `model.path`.")
    desirable_weight: float | None = Field(
        None, gt=0, description="Weight of desirable answers. Unset: chosen from the data's balance, and said."
    )
    undesirable_weight: float | None = Field(
        None, gt=0, description="Weight of undesirable answers. Unset: chosen from the data's balance, and said."
    )


class ILQLConfig(OfflineFields):
    """Implicit language Q-learning: offline reinforcement learning from answers with returns."""

    learning_rate: float = Field(5e-5, ge=0, description="Peak learning rate of AdamW.")
    init: str | None = Field(None, description="Start from this model folder. Unset: the SFT stage, else `model.path`.")
    tau: float = Field(0.7, gt=0, lt=1, description="Expectile of the value loss; towards 1 = towards the best action.")
    gamma: float = Field(0.99, gt=0, le=1, description="Discount per token.")
    cql_coef: float = Field(0.1, ge=0, description="Weight of the term that keeps unseen tokens' Q low.")
    awac_coef: float = Field(1.0, ge=0, description="Weight of the policy's advantage-weighted imitation.")
    awac_beta: float = Field(0.0, ge=0, description="Advantage weight inside the imitation; 0 = plain imitation.")
    target_rate: float = Field(0.005, gt=0, le=1, description="Share of the Q heads taken over by the lagged targets.")
    sync_every: int = Field(1, ge=1, description="Optimiser steps between updates of the lagged targets.")
    standardise: bool = Field(True, description="Scale returns to mean 0 and variance 1 over the data.")
    beta: float = Field(1.0, ge=0, description="Generation adds beta times the advantage to the logits; 0 = imitation.")
