"""Losses, advantages and KL estimators: pure functions of small tensors and a boolean mask (True = counts).

Every mean takes an explicit normaliser (`num_tokens`, `num_pairs`, ...): the count over the whole optimizer step, so
that gradients do not depend on how a step is split into micro-batches. Results are frozen records: `loss` to
differentiate, and detached sums and counts that merge over micro-batches by addition.
"""

from accord.losses.advantages import Advantages, gae, token_rewards
from accord.losses.group import (
    batch_advantages,
    completion_mean_weights,
    completion_policy_loss,
    constant_length_weights,
    group_advantages,
    rloo_advantages,
    scaled_batch_advantages,
    scaled_group_advantages,
    token_mean_weights,
)
from accord.losses.ilql import ILQLTerm, awac_loss, cql_loss, expectile_loss, ilql_advantages, polyak, q_loss
from accord.losses.kl import KLLoss, adaptive_kl_coef, categorical_kl, kl_k1, kl_k2, kl_k2_loss, kl_k3, kl_k3_loss
from accord.losses.kto import UnpairedLoss, bco_loss, class_weights, kto_loss, kto_reference_point
from accord.losses.length import LengthPenalty, alignment_penalty, length_penalty
from accord.losses.masked import masked_mean, masked_sum, mean_logprobs, sequence_logprobs, whiten
from accord.losses.orpo import OddsRatioLoss, orpo_loss
from accord.losses.ppo import (
    EntropyLoss,
    PolicyLoss,
    ValueLoss,
    entropy_loss,
    ppo_policy_loss,
    ppo_value_loss,
    sampler_weights,
)
from accord.losses.preference import (
    PreferenceLoss,
    apo_down_loss,
    apo_zero_loss,
    conservative_dpo_loss,
    cpo_loss,
    dpo_loss,
    hinge_loss,
    ipo_loss,
    rdpo_loss,
    robust_dpo_loss,
    simpo_loss,
)
from accord.losses.reward import (
    RewardLoss,
    SpanLoss,
    centring_penalty,
    divergence_span_loss,
    pairwise_loss,
    ranked_loss,
)
from accord.losses.sft import SFTLoss, sft_loss

__all__ = [
    "Advantages",
    "EntropyLoss",
    "ILQLTerm",
    "KLLoss",
    "LengthPenalty",
    "OddsRatioLoss",
    "PolicyLoss",
    "PreferenceLoss",
    "RewardLoss",
    "SFTLoss",
    "SpanLoss",
    "UnpairedLoss",
    "ValueLoss",
    "adaptive_kl_coef",
    "alignment_penalty",
    "apo_down_loss",
    "apo_zero_loss",
    "awac_loss",
    "batch_advantages",
    "bco_loss",
    "categorical_kl",
    "centring_penalty",
    "class_weights",
    "completion_mean_weights",
    "completion_policy_loss",
    "conservative_dpo_loss",
    "constant_length_weights",
    "cpo_loss",
    "cql_loss",
    "divergence_span_loss",
    "dpo_loss",
    "entropy_loss",
    "expectile_loss",
    "gae",
    "group_advantages",
    "hinge_loss",
    "ilql_advantages",
    "ipo_loss",
    "kl_k1",
    "kl_k2",
    "kl_k2_loss",
    "kl_k3",
    "kl_k3_loss",
    "kto_loss",
    "kto_reference_point",
    "length_penalty",
    "masked_mean",
    "masked_sum",
    "mean_logprobs",
    "orpo_loss",
    "pairwise_loss",
    "polyak",
    "ppo_policy_loss",
    "ppo_value_loss",
    "q_loss",
    "ranked_loss",
    "rdpo_loss",
    "rloo_advantages",
    "robust_dpo_loss",
    "sampler_weights",
    "scaled_batch_advantages",
    "scaled_group_advantages",
    "sequence_logprobs",
    "sft_loss",
    "simpo_loss",
    "token_mean_weights",
    "token_rewards",
    "whiten",
]
