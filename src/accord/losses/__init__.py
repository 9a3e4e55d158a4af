"""Losses, advantages and KL estimators: pure functions of small tensors and a boolean mask (True = counts).

Every mean takes an explicit normaliser (`num_tokens`, `num_groups`): the count over the whole optimizer step, so that
gradients do not depend on how a step is split into micro-batches. Results are frozen records: `loss` to differentiate,
and detached sums and counts that merge over micro-batches by addition.
"""

from accord.losses.advantages import Advantages, gae, token_rewards
from accord.losses.kl import adaptive_kl_coef, categorical_kl, kl_k1, kl_k2, kl_k3
from accord.losses.masked import masked_mean, masked_sum, whiten
from accord.losses.ppo import EntropyLoss, PolicyLoss, ValueLoss, entropy_loss, ppo_policy_loss, ppo_value_loss
from accord.losses.reward import RewardLoss, centring_penalty, pairwise_loss, ranked_loss
from accord.losses.sft import SFTLoss, sft_loss

__all__ = [
    "Advantages",
    "EntropyLoss",
    "PolicyLoss",
    "RewardLoss",
    "SFTLoss",
    "ValueLoss",
    "adaptive_kl_coef",
    "categorical_kl",
    "centring_penalty",
    "entropy_loss",
    "gae",
    "kl_k1",
    "kl_k2",
    "kl_k3",
    "masked_mean",
    "masked_sum",
    "pairwise_loss",
    "ppo_policy_loss",
    "ppo_value_loss",
    "ranked_loss",
    "sft_loss",
    "token_rewards",
    "whiten",
]
