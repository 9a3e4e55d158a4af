"""Out of memory: smaller passes, the step again from cleared gradients, the same gradient; and one error at the end.

Memory is simulated: a pass of more than so many tokens fails, on its way forward or back.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from accord.config import PPOConfig, RFTConfig, RLOOConfig, SFTConfig
from accord.errors import TrainingError
from accord.evaluation.compare import Contestant, reference_perplexity
from accord.methods.candidates import Drawing
from accord.methods.learners import rloo
from accord.methods.offline import OfflineTrainer
from accord.methods.online_trainer import OnlineTrainer
from accord.methods.ppo import PPOTrainer
from accord.methods.ptx import Imitation
from accord.methods.reference import reference_logprobs
from accord.methods.rft import RFTTrainer
from accord.methods.sft import SFTObjective, held_out_loss
from accord.models import token_scores
from accord.models.load import reward_model_from
from accord.models.memory import MicroBatches, OutOfMemory, asked_for, one_pass
from accord.records import ScoreRequest, TokenCompletion, TokenGroup
from accord.rewards.scorers import ModelScorer
from models_support import PAD_ID, tiny_model
from online_support import prompts, rollout_cast, weights

DEMONSTRATIONS = [
    TokenGroup((5 + i, 6), (TokenCompletion(tuple(range(7, 7 + n)), (True,) * n),), i) for i, n in enumerate((2, 5, 3))
]
WHOLE = {"micro_batch_tokens": 1024}
ROLLOUT: dict[str, Any] = {
    "prompts_per_step": 3, "samples_per_prompt": 4, "episodes": 48, "max_new_tokens": 6, "learning_rate": 0.01,
} | WHOLE  # fmt: skip


def sft() -> tuple[Any, Any]:
    model = tiny_model("gpt2", dtype=torch.float64, seed=1)
    section = SFTConfig(batch_size=3, learning_rate=0.01, epochs=9, **WHOLE)
    return OfflineTrainer(
        "sft", model, DEMONSTRATIONS, section, section, SFTObjective(),
        layout="plain", pad_id=PAD_ID, seed=0, evaluate=dict,
    ), model  # fmt: skip


def rloo_trainer() -> tuple[Any, Any]:
    cast, section = rollout_cast(), RLOOConfig(**ROLLOUT)
    return OnlineTrainer("rloo", cast, prompts(), section, rloo(section), 0), cast.policy


def ppo() -> tuple[Any, Any]:
    cast = rollout_cast()
    section = PPOConfig(**ROLLOUT, minibatches=3, update_epochs=1, ptx_coef=0.5, ptx_batch_size=3)
    value = reward_model_from(tiny_model("gpt2", dtype=torch.float64, seed=3), 4)
    imitation = Imitation(DEMONSTRATIONS, section, pad_id=PAD_ID, seed=0)
    trainer = PPOTrainer(cast, value, prompts(), section, 0, imitation)
    return trainer, torch.nn.ModuleList([cast.policy, value])


def rft() -> tuple[Any, Any]:
    cast = rollout_cast()
    section = RFTConfig(samples_per_prompt=8, max_new_tokens=6, learning_rate=0.01, start_quantile=0.3, **WHOLE)
    drawing = Drawing(cast.sampler, cast.template, cast.scorer, None)
    return RFTTrainer(cast.policy, drawing, prompts(), section, layout="plain", seed=0), cast.policy


TRAINERS = {"sft": sft, "rloo": rloo_trainer, "ppo": ppo, "rft": rft}


class Memory:
    """Room for passes of so many tokens; None = for all."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, backward: bool) -> None:
        self.limit: int | None = None
        self.largest = 0
        self._backward = backward
        self._read = token_scores.hidden_states
        monkeypatch.setattr(token_scores, "hidden_states", self.hidden_states)

    def hidden_states(self, model: Any, batch: Any, read: Tensor) -> Tensor:
        tokens = batch.input_ids.numel()
        states = self._read(model, batch, read)
        if self.limit is not None and tokens > self.limit:
            if not states.requires_grad or not self._backward:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            states.register_hook(_no_room)
        else:
            self.largest = max(self.largest, tokens)
        return states


def _no_room(_: Tensor) -> Tensor:
    raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 4096 bytes.")


CASES = [*((name, False) for name in TRAINERS), ("sft", True), ("rloo", True)]


@pytest.mark.parametrize(("name", "backward"), CASES, ids=[f"{n}-{'backward' if b else 'forward'}" for n, b in CASES])
def test_a_step_in_smaller_passes_has_the_same_gradient_and_stays_small(
    name: str, backward: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory, made = Memory(monkeypatch, backward), TRAINERS[name]
    trainer, model = made()
    numbers = [trainer.step(step).metrics for step in (1, 2)]
    expected = weights(model)

    trainer, model = made()
    memory.limit, memory.largest = max(16, memory.largest // 2), 0
    outcomes = [trainer.step(step) for step in (1, 2)]
    notes = [note for outcome in outcomes for note in outcome.notes]
    assert len(notes) == len(set(notes)) > 0
    assert all("out of memory" in note and "gradients stay the same" in note for note in notes)
    tokens = trainer.capture().values["micro_batch_tokens"]
    assert tokens == 1024 // 2 ** len(notes) <= 2 * memory.limit
    assert not outcomes[1].notes
    for key, value in weights(model).items():
        torch.testing.assert_close(value, expected[key], rtol=1e-7, atol=1e-10)
    for outcome, before in zip(outcomes, numbers, strict=True):
        timeless = {k: float(v) for k, v in outcome.metrics.items() if not k.startswith(("time/", "system/"))}
        assert timeless == pytest.approx({k: float(before[k]) for k in timeless}, rel=1e-6, abs=1e-9)

    again, model = made()
    again.restore(trainer.capture())
    assert again.capture().values["micro_batch_tokens"] == tokens


def test_what_is_too_large_alone_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = Memory(monkeypatch, backward=False)
    trainer, model = sft()
    memory.limit = 6
    with pytest.raises(TrainingError, match=r"pass of 1 prompts, the longest of which has 7 tokens.*max_tokens"):
        trainer.step(1)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_reference_is_read_in_smaller_passes(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    memory = Memory(monkeypatch, backward=False)
    model = tiny_model("gpt2", dtype=torch.float64, seed=1)

    said: list[str] = []

    def found(folder: str) -> Tensor:
        return reference_logprobs(
            model, DEMONSTRATIONS, weights="w", layout="plain", budget=1024, pad_id=PAD_ID,
            kept=tmp_path / folder, cache=tmp_path / f"{folder} cache", console=None, say=said.append,
        )  # fmt: skip

    expected = found("whole")
    memory.limit = 8
    torch.testing.assert_close(found("small"), expected)
    assert any("out of memory" in text for text in said)


def test_what_torch_says_on_this_machine_is_understood() -> None:
    with pytest.raises(OutOfMemory) as caught, one_pass(DEMONSTRATIONS):
        torch.empty(2**50, dtype=torch.uint8)
    assert caught.value.reason == f"tried to allocate {2**50} bytes"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has 1 GiB free.", "tried to allocate 2.50 GiB"),
        ("CUDA is full. Buy another.", "CUDA is full"),
    ],
)
def test_of_what_torch_says_the_part_that_helps_is_kept(text: str, reason: str) -> None:
    assert asked_for(torch.OutOfMemoryError(text)) == reason


def test_evaluation_and_reward_models_name_what_they_were_doing(monkeypatch: pytest.MonkeyPatch) -> None:
    memory, cast = Memory(monkeypatch, backward=False), rollout_cast()
    memory.limit = 0
    judge = ModelScorer(
        reward_model_from(cast.policy, 1), cast.template, name="the reward model rm",
        micro_batch_tokens=64, max_tokens=64, max_prompt_tokens=None,
    )  # fmt: skip
    request = ScoreRequest(prompts()[0][0].prompt, "a b", prompt_id=0, finished=True)
    judged = Contestant("mine", cast.policy, cast.template)
    passes: dict[str, Any] = {
        "scoring by the reward model rm": lambda: judge.score([request]),
        "evaluating mine": lambda: reference_perplexity(judged, DEMONSTRATIONS, 64),
        "evaluating on held-out data": lambda: held_out_loss(cast.policy, DEMONSTRATIONS, "plain", PAD_ID, 64),
    }
    for doing, work in passes.items():
        with pytest.raises(OutOfMemory, match=rf"while {doing}, in .*: tried to allocate 2.00 GiB\. Lower `micro_"):
            work()


@pytest.mark.gpu
def test_what_torch_says_on_a_gpu_is_understood() -> None:
    with pytest.raises(OutOfMemory), one_pass(DEMONSTRATIONS):
        torch.empty(2**50, dtype=torch.uint8, device="cuda")


def test_what_was_accumulated_before_the_failure_is_cleared() -> None:
    """Two passes of two rows; the second one fails. The step is that of one pass over all four."""
    items = [TokenGroup((5 + i, 6), (TokenCompletion((7, 8, 9), (True,) * 3),), i) for i in range(4)]

    def stepped(budget: int, failing: int) -> tuple[dict[str, Tensor], int]:
        model = tiny_model("gpt2", dtype=torch.float64, seed=1)
        section = SFTConfig(batch_size=4, learning_rate=0.01, epochs=9, micro_batch_tokens=max(16, budget))
        trainer = OfflineTrainer(
            "sft", model, items, section, section, SFTObjective(),
            layout="plain", pad_id=PAD_ID, seed=0, evaluate=dict,
        )  # fmt: skip
        trainer._micro_batches.tokens = budget
        calls = 0

        def fail(module: Any, inputs: Any) -> None:
            nonlocal calls
            calls += 1
            if calls == failing:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

        model.base_model.register_forward_pre_hook(fail)
        trainer.step(1)
        return weights(model), calls

    (expected, once), (found, calls) = stepped(1024, 0), stepped(10, 2)
    assert (once, calls) == (1, 2 + 4)
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-7, atol=1e-10)


def test_other_errors_are_not_taken_for_it() -> None:
    with pytest.raises(RuntimeError, match="shapes"), one_pass(DEMONSTRATIONS):
        raise RuntimeError("shapes do not match")
    passes = MicroBatches(64)
    with pytest.raises(OutOfMemory):
        passes.attempt(lambda tokens: _fails(1))
    assert passes.notes() == ()


def _fails(count: int) -> None:
    with one_pass(DEMONSTRATIONS[:count]):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
