"""GRPO's and RLOO's advantages and losses against TRL's. Runs only where `trl` is installed; read against trl 1.16.

Losses: the trainers' methods are called with a stand-in that holds what they read. Advantages are computed in the
middle of a method that samples, so there the trainers are real, on a tiny model, with rewards and log-probabilities put
in. PPO itself is gone from TRL; GRPO's loss of type "bnpo" is PPO's clipped surrogate with a token mean.

Deliberate differences, each tested: equal rewards give exactly 0, not rounding errors; a group of one is refused by
leave-one-out, not silently 0; the entropy bonus and averages are normalised over the whole update, TRL's over each
micro-batch. TRL's defaults are others: no KL and loss type "dapo" in GRPO.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from accord.losses import (
    completion_mean_weights,
    completion_policy_loss,
    constant_length_weights,
    entropy_loss,
    group_advantages,
    kl_k1,
    kl_k3_loss,
    ppo_policy_loss,
    rloo_advantages,
    scaled_batch_advantages,
    scaled_group_advantages,
    sequence_logprobs,
    token_mean_weights,
)
from models_support import tiny_model, word_tokenizer

pytest.importorskip("trl")
pytestmark = pytest.mark.filterwarnings("ignore")  # theirs

ACCELERATOR = SimpleNamespace(gather=lambda x: x, gather_for_metrics=lambda x: x, reduce=lambda x, reduction: x)
MAX_TOKENS = 9


class Tokens:
    """Random log-probabilities of six completions of 1 to 9 tokens, under four models."""

    def __init__(self) -> None:
        random = torch.Generator().manual_seed(1)
        self.old, change, self.reference = torch.randn(3, 6, MAX_TOKENS, generator=random)
        self.new = (self.old + 0.3 * change).requires_grad_()
        self.entropies = torch.rand(6, MAX_TOKENS, generator=random).requires_grad_()
        self.advantages = torch.randn(6, generator=random)
        self.mask = torch.arange(MAX_TOKENS) < torch.tensor([9, 7, 5, 3, 2, 1])[:, None]

    def trainer(self, **fields: Any) -> Any:
        """What both trainers' `_compute_loss` read of themselves."""
        return SimpleNamespace(
            _get_per_token_logps_and_entropies=lambda *_, **__: (self.new, self.entropies, None),
            model=SimpleNamespace(training=False), accelerator=ACCELERATOR,
            _metrics={"eval": defaultdict(list)}, aux_loss_enabled=False, epsilon_low=0.2, epsilon_high=0.2, **fields,
        )  # fmt: skip

    def inputs(self, **fields: Tensor) -> dict[str, Tensor]:
        nothing = torch.zeros(6, 1, dtype=torch.long)
        completions = {"completion_ids": nothing.expand(6, MAX_TOKENS), "completion_mask": self.mask.long()}
        return {
            "prompt_ids": nothing,
            "prompt_mask": nothing + 1,
            **completions,
            "advantages": self.advantages,
        } | fields


def same_gradient(ours: Tensor, theirs: Tensor, inputs: list[Tensor]) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)
    expected = torch.autograd.grad(theirs, inputs, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(ours, inputs), expected, rtol=1e-5, atol=1e-7)


def grpo_loss(t: Tokens, loss_type: str, *, beta: float = 0.0, entropy_coef: float = 0.0) -> tuple[Tensor, Any]:
    """TRL's loss, and what it logged."""
    from trl import GRPOTrainer

    trainer = t.trainer(
        args=SimpleNamespace(use_bias_correction_kl=False, delta=None), top_entropy_quantile=1.0,
        off_policy_mask_threshold=None, importance_sampling_level="token", beta=beta, loss_type=loss_type,
        max_completion_length=MAX_TOKENS, use_vllm=False, _entropy_bonus_enabled=entropy_coef > 0,
        use_adaptive_entropy=False, entropy_coef=entropy_coef,
    )  # fmt: skip
    inputs = t.inputs(old_per_token_logps=t.old, ref_per_token_logps=t.reference)
    return GRPOTrainer._compute_loss(trainer, None, inputs), trainer._metrics["eval"]


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo"])
@pytest.mark.parametrize("beta", [0.0, 0.1])
@pytest.mark.parametrize("entropy_coef", [0.0, 0.02])
def test_grpo_loss(loss_type: str, beta: float, entropy_coef: float) -> None:
    t = Tokens()
    theirs, logged = grpo_loss(t, loss_type, beta=beta, entropy_coef=entropy_coef)
    lengths = t.mask.sum(1)
    weights = {
        "grpo": completion_mean_weights(lengths, num_completions=6),
        "bnpo": token_mean_weights(lengths, num_tokens=27),
        "dr_grpo": constant_length_weights(lengths, num_completions=6, max_tokens=MAX_TOKENS),
    }[loss_type][:, None].expand(6, MAX_TOKENS)
    policy = ppo_policy_loss(t.new, t.old, t.advantages[:, None] * weights, t.mask, clip_range=0.2, num_tokens=1)
    kl = kl_k3_loss(t.new, t.reference, weights, t.mask)
    ours = policy.loss + beta * kl.loss + entropy_coef * entropy_loss(t.entropies, t.mask).loss
    same_gradient(ours, theirs, [t.new, t.entropies] if entropy_coef else [t.new])
    assert logged["clip_ratio/region_mean"] == [pytest.approx((policy.clipped_count / policy.token_count).item())]
    assert policy.clipped_count > 0
    mean_kl = (kl.estimate_sum / kl.token_count).item()
    assert logged["kl"] == ([pytest.approx(mean_kl, rel=1e-5)] if beta else [])


def test_a_token_mean_over_micro_batches_is_another_loss_there_and_the_same_here() -> None:
    """Three long completions and three short ones: TRL averages the two means, as its gradient accumulation does."""
    t, halves = Tokens(), (Tokens(), Tokens())
    for half, first in zip(halves, (True, False), strict=True):
        half.mask = half.mask & ((torch.arange(6) < 3) == first)[:, None]
    whole = grpo_loss(t, "bnpo")[0].item()
    theirs = sum(grpo_loss(half, "bnpo")[0].item() for half in halves) / 2
    assert abs(theirs - whole) > 0.01
    advantages = t.advantages[:, None].expand(6, MAX_TOKENS)
    ours = sum(
        ppo_policy_loss(t.new, t.old, advantages, half.mask, clip_range=0.2, num_tokens=27).loss.item()
        for half in halves
    )
    assert ours == pytest.approx(whole, rel=1e-5)


def test_rloo_loss() -> None:
    from trl import RLOOTrainer

    t = Tokens()
    trainer = t.trainer()
    theirs = RLOOTrainer._compute_loss(trainer, None, t.inputs(old_logps=sequence_logprobs(t.old, t.mask)))
    ours = completion_policy_loss(t.new, t.old, t.advantages, t.mask, clip_range=0.2)
    same_gradient(ours.loss, theirs, [t.new])
    clipped = (ours.clipped_count / ours.token_count).item()
    assert trainer._metrics["eval"]["clip_ratio/region_mean"] == [pytest.approx(clipped)]
    assert 0 < clipped < 1


# --- advantages ------------------------------------------------------------------------------------------------------

PROMPTS, SAMPLES = 3, 4


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trl") / "model"
    tiny_model("llama").save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


def advantages_of(kind: str, model: Path, rewards: Tensor, **options: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What TRL makes of these rewards of 3 x 4 sampled completions: advantages, and (when it needs them) the policy's
    and the reference's log-probabilities, which are random, with their mask."""
    import trl
    from datasets import Dataset

    arguments = getattr(trl, f"{kind}Config")(
        output_dir=str(model.parent / "out"), use_cpu=True, bf16=False, report_to=[], max_completion_length=MAX_TOKENS,
        per_device_train_batch_size=PROMPTS * SAMPLES, **({"num_generations": SAMPLES} | options),
    )  # fmt: skip
    trainer = getattr(trl, f"{kind}Trainer")(
        model=str(model),
        reward_funcs=lambda **_: [],
        args=arguments,
        train_dataset=Dataset.from_list([{"prompt": f"w{i} w{i + 1}"} for i in range(2, 8)]),
        processing_class=word_tokenizer(),
    )
    random = torch.Generator().manual_seed(2)
    calls: list[Tensor] = []

    def logprobs(_: Any, ids: Tensor, __: Tensor, width: int, *___: Any, **____: Any) -> tuple[Tensor, None, None]:
        calls.append(-2 * torch.rand(len(ids), width, generator=random))
        return calls[-1], None, None

    trainer._get_per_token_logps_and_entropies = logprobs
    trainer._calculate_rewards = lambda *_: rewards[:, None]
    inputs = [{"prompt": f"w{i} w{i + 1}"} for i in range(2, 2 + PROMPTS) for _ in range(SAMPLES)]
    out = trainer._generate_and_score_completions(inputs)
    mask = out["completion_mask"].bool()
    policy, reference = calls if len(calls) == 2 else (torch.zeros(mask.shape),) * 2
    return out["advantages"], policy, reference, mask


REWARDS = 3 * torch.randn(PROMPTS * SAMPLES, generator=torch.Generator().manual_seed(3))
GROUPS = torch.arange(PROMPTS).repeat_interleave(SAMPLES)


@pytest.mark.parametrize(("scale", "ours"), [("group", scaled_group_advantages), ("none", group_advantages)])
def test_grpo_advantages(scale: str, ours: Any, model: Path) -> None:
    theirs, *_ = advantages_of("GRPO", model, REWARDS, scale_rewards=scale)
    torch.testing.assert_close(ours(REWARDS, GROUPS), theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_rloo_advantages_with_the_kl_in_the_reward(beta: float, model: Path) -> None:
    theirs, policy, reference, mask = advantages_of("RLOO", model, REWARDS, beta=beta)
    rewards = REWARDS - beta * sequence_logprobs(kl_k1(policy, reference), mask)
    assert beta == 0 or (rewards - REWARDS).abs().max() > 0.1
    torch.testing.assert_close(rloo_advantages(rewards, GROUPS), theirs, rtol=1e-5, atol=1e-6)


def test_scaled_batch_advantages_are_those_of_a_single_group(model: Path) -> None:
    """TRL scales leave-one-out advantages over the batch; with one group these are REINFORCE's."""
    theirs, *_ = advantages_of("RLOO", model, REWARDS, beta=0.0, normalize_advantages=True, num_generations=12)
    torch.testing.assert_close(scaled_batch_advantages(REWARDS), theirs, rtol=1e-5, atol=1e-6)


def test_equal_rewards_are_rounding_errors_there_and_nothing_here(model: Path) -> None:
    rewards = torch.full((PROMPTS * SAMPLES,), 0.1)
    theirs, *_ = advantages_of("GRPO", model, rewards, scale_rewards="group", num_generations=12)
    assert (scaled_group_advantages(rewards, torch.zeros_like(GROUPS)) == 0).all()
    assert 0 < theirs.abs().max() < 1e-3
