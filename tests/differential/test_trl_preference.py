"""The preference losses against TRL's. Runs only where `trl` is installed; read against trl 1.16.

Where both have the same loss they must agree in value and gradient to 1e-5, on the same random log-probabilities of
tokens. Where TRL departs from the paper, or we from TRL, the test says how and shows the difference. TRL has no R-DPO
and no BCO with a shift; its trainers' methods are called with a stand-in for the trainer."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from accord.losses import (
    apo_down_loss,
    apo_zero_loss,
    bco_loss,
    conservative_dpo_loss,
    cpo_loss,
    dpo_loss,
    hinge_loss,
    ipo_loss,
    kto_loss,
    kto_reference_point,
    mean_logprobs,
    orpo_loss,
    robust_dpo_loss,
    sequence_logprobs,
    sft_loss,
    simpo_loss,
)

pytest.importorskip("trl")

ACCELERATOR = SimpleNamespace(
    device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x, reduce=lambda x, reduction: x
)
PAIRS, TOKENS, VOCABULARY, BETA = 6, 9, 13, 0.3


class Step:
    """Log-probabilities of the tokens of 2 G completions, chosen ones first, and of what is compared with them."""

    def __init__(self, seed: int) -> None:
        random = torch.Generator().manual_seed(seed)
        self.policy = -2 * torch.rand(2 * PAIRS, TOKENS, generator=random)
        self.reference = self.policy + 0.5 * torch.randn(self.policy.shape, generator=random)
        self.kl_policy = -9 * torch.rand(2 * PAIRS, generator=random)
        self.kl_reference = self.kl_policy + torch.randn(2 * PAIRS, generator=random) - 0.6
        lengths = torch.randint(1, TOKENS + 1, (2 * PAIRS, 1), generator=random)
        self.mask = torch.arange(TOKENS) < lengths
        self.desirable = torch.rand(2 * PAIRS, generator=random) < 0.5
        self.policy.requires_grad_()

    def pairs(self, reduce: Callable[[Tensor, Tensor], Tensor] = sequence_logprobs) -> tuple[Tensor, ...]:
        """(chosen, rejected, reference of chosen, reference of rejected), (G,) each."""
        return *reduce(self.policy, self.mask).chunk(2), *reduce(self.reference, self.mask).chunk(2)


def outputs(step: Step) -> SimpleNamespace:
    """What TRL's patched forward pass returns: log-probabilities with 0 at tokens that do not count."""
    nothing = torch.zeros(2 * PAIRS, TOKENS)
    return SimpleNamespace(
        log_probs=torch.where(step.mask, step.policy, 0.0),
        entropy=nothing,
        mean_logits=nothing,
        is_top1=nothing.bool(),
    )


def batch(step: Step) -> dict[str, Tensor]:
    """A one-token prompt before each completion, which no log-probability belongs to."""
    prompt = torch.zeros(2 * PAIRS, 1, dtype=torch.bool)
    ids = torch.zeros(2 * PAIRS, 1 + TOKENS, dtype=torch.long)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "completion_mask": torch.cat([prompt, step.mask], 1).long(),
    }


def trl_dpo(step: Step, loss_type: str, label_smoothing: float = 0.0) -> tuple[Tensor, dict[str, list[float]]]:
    from trl import DPOTrainer

    ref_chosen, ref_rejected = sequence_logprobs(step.reference, step.mask).chunk(2)
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=False),
        accelerator=ACCELERATOR,
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        loss_types=[loss_type],
        loss_weights=[1.0],
        beta=BETA,
        label_smoothing=label_smoothing,
        use_weighting=False,
        _metrics={"eval": defaultdict(list)},
        _total_train_tokens=0,
    )
    inputs = batch(step) | {"ref_chosen_logps": ref_chosen, "ref_rejected_logps": ref_rejected}
    loss = DPOTrainer._compute_loss(trainer, lambda **_: outputs(step), inputs, return_outputs=False)
    return loss, trainer._metrics["eval"]


def agree(ours: Tensor, theirs: Tensor, wrt: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    expected = torch.autograd.grad(theirs, wrt, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(ours, wrt, retain_graph=True), expected, rtol=1e-5, atol=1e-6)


SAME: dict[str, tuple[str, float, Callable[..., Any]]] = {
    "dpo": ("sigmoid", 0.0, lambda *x: dpo_loss(*x, beta=BETA)),
    "robust": ("robust", 0.2, lambda *x: robust_dpo_loss(*x, beta=BETA, label_smoothing=0.2)),
    "hinge": ("hinge", 0.0, lambda *x: hinge_loss(*x, beta=BETA)),
    "apo_zero": ("apo_zero", 0.0, lambda *x: apo_zero_loss(*x, beta=BETA)),
    "apo_down": ("apo_down", 0.0, lambda *x: apo_down_loss(*x, beta=BETA)),
}
seeds = pytest.mark.parametrize("seed", range(3))


@seeds
@pytest.mark.parametrize(("loss_type", "label_smoothing", "loss"), SAME.values(), ids=SAME.keys())
def test_losses_with_a_reference(loss_type: str, label_smoothing: float, loss: Callable[..., Any], seed: int) -> None:
    step = Step(seed)
    result = loss(*step.pairs())
    theirs, logged = trl_dpo(step, loss_type, label_smoothing)
    agree(result.loss, theirs, step.policy)
    for name, total in [
        ("rewards/chosen", result.chosen_reward_sum),
        ("rewards/rejected", result.rejected_reward_sum),
        ("rewards/margins", result.margin_sum),
        ("rewards/accuracies", result.correct_sum),
    ]:
        assert logged[name] == [pytest.approx((total / result.pair_count).item(), rel=1e-5)]


def test_trl_counts_a_tie_as_wrong() -> None:
    """At policy = reference, where training begins, we count half."""
    step = Step(0)
    step.reference = step.policy.detach()
    assert dpo_loss(*step.pairs(), beta=BETA).correct_sum.item() == PAIRS / 2
    assert trl_dpo(step, "sigmoid")[1]["rewards/accuracies"] == [0.0]


@seeds
def test_trl_ignores_label_smoothing_in_its_dpo(seed: int) -> None:
    """Its type "sigmoid" is DPO whatever `label_smoothing` says. Conservative DPO is hidden in "aot", which matches the
    quantiles of a batch, as long as the sorting has nothing to sort: all pairs equal."""
    step = Step(seed)
    conservative = conservative_dpo_loss(*step.pairs(), beta=BETA, label_smoothing=0.2).loss
    theirs, _ = trl_dpo(step, "sigmoid", label_smoothing=0.2)
    agree(dpo_loss(*step.pairs(), beta=BETA).loss, theirs, step.policy)
    assert abs((conservative - theirs).item()) > 1e-3

    with torch.no_grad():
        for x in (step.policy, step.reference, step.mask):
            for half in x.chunk(2):
                half.copy_(half[:1].clone().expand_as(half))
    conservative = conservative_dpo_loss(*step.pairs(), beta=BETA, label_smoothing=0.2).loss
    torch.testing.assert_close(conservative, trl_dpo(step, "aot", 0.2)[0], rtol=1e-5, atol=1e-6)


@seeds
def test_trl_averages_ipo_over_tokens(seed: int) -> None:
    """The paper's equation is about whole completions, so our default are sums; of means it is TRL's loss."""
    step = Step(seed)
    theirs, _ = trl_dpo(step, "ipo")
    agree(ipo_loss(*step.pairs(mean_logprobs), tau=BETA).loss, theirs, step.policy)
    assert abs((ipo_loss(*step.pairs(), tau=BETA).loss - theirs).item()) > 0.1


@seeds
def test_bco_of_pairs_without_a_shift(seed: int) -> None:
    """TRL's "bco_pair" is BCO with a shift of 0, where a pair is two completions and counts as one."""
    step = Step(seed)
    theirs, _ = trl_dpo(step, "bco_pair")
    policy, reference = sequence_logprobs(step.policy, step.mask), sequence_logprobs(step.reference, step.mask)
    kinds = torch.arange(2 * PAIRS) < PAIRS
    ours = bco_loss(policy, reference, kinds, torch.tensor(0.0), beta=BETA, num_completions=PAIRS)
    agree(ours.loss, theirs, step.policy)


# ---- without a reference ---------------------------------------------------------------------------------------------


class Logits:
    """Logits of a model over prompts of two tokens and completions of several lengths, and TRL's batch of them."""

    def __init__(self, seed: int) -> None:
        random = torch.Generator().manual_seed(seed)
        length = 2 + TOKENS
        self.logits = torch.randn(2 * PAIRS, length, VOCABULARY, generator=random).requires_grad_()
        self.ids = torch.randint(0, VOCABULARY, (2 * PAIRS, length), generator=random)
        ends = torch.randint(3, length + 1, (2 * PAIRS, 1), generator=random)
        positions = torch.arange(length)
        self.real, self.completion = positions < ends, (positions >= 2) & (positions < ends)

    @property
    def logprobs(self) -> Tensor:
        """(2 G, T - 1) of tokens 1..T-1, each predicted by the one before."""
        return torch.log_softmax(self.logits[:, :-1], -1).gather(2, self.ids[:, 1:, None])[:, :, 0]

    def trl_loss(self, trainer_class: Any, **attributes: Any) -> tuple[Tensor, dict[str, float]]:
        labels = self.ids.masked_fill(~self.completion, -100)
        found: dict[str, Tensor] = {}
        for side, part in (("chosen", slice(None, PAIRS)), ("rejected", slice(PAIRS, None))):
            found[f"{side}_input_ids"], found[f"{side}_labels"] = self.ids[part], labels[part]
            found[f"{side}_attention_mask"] = self.real[part].long()
        trainer = SimpleNamespace(
            accelerator=ACCELERATOR,
            is_encoder_decoder=False,
            aux_loss_enabled=False,
            pad_token_id=0,
            padding_value=0,
            beta=BETA,
            concatenated_inputs=trainer_class.concatenated_inputs,
            get_batch_logps=trainer_class.get_batch_logps,
            **attributes,
        )
        for method in ("concatenated_forward", "cpo_loss", "odds_ratio_loss"):
            if hasattr(trainer_class, method):
                setattr(trainer, method, getattr(trainer_class, method).__get__(trainer))
        return trainer_class.get_batch_loss_metrics(
            trainer, lambda *_, **__: SimpleNamespace(logits=self.logits), found
        )


@pytest.fixture
def cpo_trainer() -> Any:
    return pytest.importorskip("trl.experimental.cpo").CPOTrainer


@pytest.fixture
def orpo_trainer() -> Any:
    return pytest.importorskip("trl.experimental.orpo").ORPOTrainer


@seeds
@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
def test_cpo_with_its_supervised_term(cpo_trainer: Any, seed: int, label_smoothing: float) -> None:
    """Label smoothing is a soft label of 1 - eps; the supervised term, a mean over tokens, is `sft_loss`."""
    x = Logits(seed)
    attributes = {"loss_type": "sigmoid", "alpha": 0.0, "cpo_alpha": 0.7, "label_smoothing": label_smoothing}
    theirs, logged = x.trl_loss(cpo_trainer, **attributes)
    chosen, rejected = sequence_logprobs(x.logprobs, x.completion[:, 1:]).chunk(2)
    result = cpo_loss(chosen, rejected, beta=BETA, soft_labels=torch.full((PAIRS,), 1 - label_smoothing))
    nll = sft_loss(x.logprobs[:PAIRS], x.completion[:PAIRS, 1:])
    agree(result.loss + 0.7 * nll.loss, theirs, x.logits)
    assert logged["rewards/chosen"] == pytest.approx((result.chosen_reward_sum / PAIRS).item(), rel=1e-5)


@seeds
def test_simpo(cpo_trainer: Any, seed: int) -> None:
    x = Logits(seed)
    attributes = {"loss_type": "simpo", "alpha": 0.0, "cpo_alpha": 0.0, "simpo_gamma": 0.5}
    theirs, _ = x.trl_loss(cpo_trainer, label_smoothing=0.0, **attributes)
    chosen, rejected = mean_logprobs(x.logprobs, x.completion[:, 1:]).chunk(2)
    agree(simpo_loss(chosen, rejected, beta=BETA, gamma=0.5).loss, theirs, x.logits)

    # Smoothed, TRL turns gamma round with the pair: the rejected completion may lose by gamma to be right. We ask
    # whichever completion is preferred to win by it. A pair's margin turns round: there we are TRL's loss again.
    smoothed, _ = x.trl_loss(cpo_trainer, label_smoothing=0.2, **attributes)
    soft = torch.full((PAIRS,), 0.8)
    as_margin = simpo_loss(chosen, rejected, beta=BETA, gamma=0.0, soft_labels=soft, margins=torch.full((PAIRS,), 0.5))
    agree(as_margin.loss, smoothed, x.logits)
    assert abs((simpo_loss(chosen, rejected, beta=BETA, gamma=0.5, soft_labels=soft).loss - smoothed).item()) > 1e-3


@seeds
def test_orpo(orpo_trainer: Any, seed: int) -> None:
    """The odds-ratio term agrees. TRL's supervised term is a mean over all tokens of the batch, prompts included; ours
    is a mean over completions of the mean over their own tokens."""
    x = Logits(seed)
    theirs, logged = x.trl_loss(orpo_trainer)
    chosen, rejected = mean_logprobs(x.logprobs, x.completion[:, 1:]).chunk(2)
    result = orpo_loss(chosen, rejected, odds_ratio_coef=BETA)
    penalty = result.loss + chosen.mean()
    their_nll = sft_loss(x.logprobs[:PAIRS], x.real[:PAIRS, 1:]).loss
    agree(penalty + their_nll, theirs, x.logits)
    assert abs((result.loss - theirs).item()) > 1e-3
    assert logged["log_odds_chosen"] == pytest.approx((result.margin_sum / PAIRS).item(), rel=1e-5)
    assert logged["log_odds_ratio"] == pytest.approx(-(result.odds_ratio_loss_sum / PAIRS).item(), rel=1e-5)


def test_orpo_of_a_certain_completion(orpo_trainer: Any) -> None:
    """A completion of probability 1, as a model that repeats itself gives, makes TRL's gradient NaN; ours is finite."""
    chosen = torch.tensor([0.0], requires_grad=True)
    trainer = SimpleNamespace(beta=BETA, accelerator=ACCELERATOR)
    losses, *_ = orpo_trainer.odds_ratio_loss(trainer, chosen, torch.tensor([-1.0]))
    assert torch.autograd.grad(losses.sum(), chosen)[0].isnan().all()
    ours = orpo_loss(chosen, torch.tensor([-1.0]), odds_ratio_coef=BETA).loss
    assert math.isfinite(ours.item())
    assert torch.autograd.grad(ours, chosen)[0].isfinite().all()


# ---- unpaired --------------------------------------------------------------------------------------------------------


def trl_kto(step: Step, part: slice = slice(None)) -> tuple[Tensor, dict[str, list[float]]]:
    from trl import KTOTrainer

    trainer = SimpleNamespace(
        model=SimpleNamespace(training=False),
        accelerator=ACCELERATOR,
        aux_loss_enabled=False,
        precompute_ref_logps=True,
        calculate_KL=True,
        loss_type="kto",
        beta=BETA,
        desirable_weight=1.5,
        undesirable_weight=0.5,
        _compute_kl_logps=lambda *_: step.kl_policy[part],
        _metrics={"eval": defaultdict(list)},
        _total_train_tokens=0,
    )
    inputs = {name: x[part] for name, x in batch(step).items()} | {
        "label": step.desirable[part],
        "ref_logps": sequence_logprobs(step.reference, step.mask)[part],
        "ref_KL_logps": step.kl_reference[part],
    }
    model = SimpleNamespace(**{name: x[part] for name, x in vars(outputs(step)).items()})
    loss = KTOTrainer._compute_loss(trainer, lambda **_: model, inputs, return_outputs=False)
    return loss, trainer._metrics["eval"]


def our_kto(step: Step) -> Any:
    return kto_loss(
        sequence_logprobs(step.policy, step.mask),
        sequence_logprobs(step.reference, step.mask),
        step.desirable,
        kto_reference_point(step.kl_policy, step.kl_reference),
        beta=BETA,
        desirable_weight=1.5,
        undesirable_weight=0.5,
    )


@seeds
def test_kto(seed: int) -> None:
    step = Step(seed)
    result = our_kto(step)
    theirs, logged = trl_kto(step)
    agree(result.loss, theirs, step.policy)
    reference_point = kto_reference_point(step.kl_policy, step.kl_reference).item()
    assert reference_point > 0
    assert logged["kl"] == [pytest.approx(reference_point, rel=1e-5)]
    for name, total, count in [
        ("rewards/chosen", result.desirable_reward_sum, result.desirable_count),
        ("rewards/rejected", result.undesirable_reward_sum, result.undesirable_count),
    ]:
        assert logged[name] == [pytest.approx((total / count).item(), rel=1e-5)]


def test_trl_estimates_the_reference_point_of_kto_in_each_micro_batch() -> None:
    """Halves with mean log-ratios -1 and 2: TRL uses 0 and 2, the whole step has .5, so cutting a step into two
    micro-batches changes TRL's loss. Ours is given the point of the step."""
    step = Step(0)
    half = slice(None, PAIRS), slice(PAIRS, None)
    step.kl_reference = step.kl_policy + torch.tensor([1.0, -2.0]).repeat_interleave(PAIRS)
    (first, first_logged), (second, second_logged) = (trl_kto(step, part) for part in half)
    assert first_logged["kl"] + second_logged["kl"] == pytest.approx([0.0, 2.0], abs=1e-5)
    whole, logged = trl_kto(step)
    assert logged["kl"] == [pytest.approx(0.5, rel=1e-5)]
    torch.testing.assert_close(our_kto(step).loss, whole, rtol=1e-5, atol=1e-6)
    assert abs(((first + second) / 2 - whole).item()) > 1e-3
