"""The works that are timed: models, batches and updates, as token ids that depend on the work alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

import numpy as np

from accord.randomness import generator
from accord.records import TokenCompletion, TokenGroup

__all__ = [
    "BETA",
    "END",
    "KL_COEF",
    "MODELS",
    "ONLINE",
    "OPTIMISER",
    "PAD",
    "TARGETS",
    "WORKS",
    "Timing",
    "Work",
    "desirable",
    "groups_of",
    "mean_logprob",
    "pairs_of",
    "prepare",
    "reward",
    "word_tokenizer",
    "words",
]

Kind = Literal["sft", "reward", "dpo", "orpo", "kto", "grpo", "rloo", "ppo", "sampling"]
ONLINE: tuple[Kind, ...] = ("grpo", "rloo", "ppo")
PAD, END, FIRST = 0, 1, 2  # token ids; words begin at FIRST
MEAN_LOG, SPREAD_LOG, SHORTEST, LONGEST = (
    4.2,
    0.75,
    8,
    512,
)  # mixed lengths: log-normal, as instructions and answers are
BETA = 0.1
KL_COEF = 0.04  # of the online works
# What both sides are told. Both learn at the full rate from the first update on.
OPTIMISER: Mapping[str, float] = {
    "learning_rate": 1e-4, "adam_beta1": 0.9, "adam_beta2": 0.999, "adam_epsilon": 1e-8, "weight_decay": 0.0,
    "max_grad_norm": 1.0,
}  # fmt: skip
# Llama-like, embeddings tied: (hidden size, layers, heads, MLP size). Named by their size with 4,096 words.
MODELS = {"5M": (256, 5, 4, 688), "15M": (384, 8, 6, 1024)}


@dataclass(frozen=True, slots=True)
class Work:
    """One work. A step is `batch` prompts with `answers` completions each.

    prompt, answer  tokens of each; None = mixed lengths, a third of a row being its prompt
    updates         steps of a run; of an online work whole iterations, of sampling calls
    warm_up         how many of them, the first, are not timed
    one_trunk       Accord's value model is a head on the policy's trunk; the peer has two models all the same
    peer_rows       rows in a forward pass of the peer, None = all; the fastest that was found for it
    compiled        Accord's decoding step is compiled; the call that does so is no update, but comes once before them
    peer_grouped    the peer makes its batches from rows of similar length, which are then not the same updates
    """

    kind: Kind
    batch: int
    prompt: int | None
    answer: int | None
    answers: int = 1
    model: str = "5M"
    vocabulary: int = 4096
    updates: int = 5
    warm_up: int = 1
    one_trunk: bool = False
    peer_rows: int | None = None
    peer_grouped: bool = False
    compiled: bool = False

    @property
    def unit(self) -> str:
        if self.kind in ("sft", "sampling"):
            return "tokens/s"
        return {"reward": "prompts/s", "dpo": "pairs/s", "orpo": "pairs/s"}.get(self.kind, "answers/s")

    @property
    def peer(self) -> str:
        return "transformers" if self.kind == "sampling" else "trl"

    @property
    def by_losses(self) -> bool:
        """Both sides see the same batches, so learning is compared by the losses of the timed updates. Where they
        sample for themselves it takes a run apart."""
        return self.kind != "sampling" and self.kind not in ONLINE

    def calls(self, apart: bool) -> int:
        """How many updates a run makes: the one apart no more than three, which is enough to tell."""
        return min(3, self.updates) if apart else self.updates

    @property
    def steps(self) -> int:
        """How many steps have prompts of their own; an online work takes the same prompts in every one."""
        return self.updates if self.by_losses else 1

    def amount(self, groups: list[TokenGroup]) -> int:
        """What of the unit these groups are."""
        if self.kind == "sft":
            return sum(group.num_tokens for group in groups)
        if self.kind == "sampling":
            return sum(len(group.completions[0].ids) for group in groups)
        return len(groups) * (self.answers if self.kind in ONLINE else 1)


WORKS: dict[str, Work] = {
    "sft-fixed": Work("sft", 16, 1, 255),
    "sft-fixed-15m": Work("sft", 8, 1, 255, model="15M"),
    "sft-fixed-32k": Work("sft", 8, 1, 255, vocabulary=32000),
    "sft-mixed": Work("sft", 16, None, None, updates=7, peer_rows=4),
    "sft-mixed-grouped": Work("sft", 16, None, None, updates=7, peer_grouped=True),
    "reward-long": Work("reward", 16, 192, 32, 2),
    "reward-ranked": Work("reward", 4, 192, 32, 6),
    "dpo-long": Work("dpo", 16, 192, 32, 2),
    "dpo-long-15m": Work("dpo", 8, 192, 32, 2, model="15M"),
    "dpo-long-15m-32k": Work("dpo", 8, 192, 32, 2, model="15M", vocabulary=32000, updates=3),
    "dpo-short": Work("dpo", 16, 32, 96, 2),
    "dpo-long-32k": Work("dpo", 8, 192, 32, 2, vocabulary=32000),
    "orpo-short": Work("orpo", 16, 32, 96, 2),
    "kto-short": Work("kto", 16, 32, 96),
    "grpo-short": Work("grpo", 4, 32, 48, 8, peer_rows=16),
    "grpo-long": Work("grpo", 4, 192, 48, 8, peer_rows=16),
    "rloo-short": Work("rloo", 4, 32, 48, 8, peer_rows=16),
    "rloo-long": Work("rloo", 4, 192, 48, 8, peer_rows=16),
    # An iteration is 16 updates.
    "ppo": Work("ppo", 64, 32, 48, updates=2),
    "ppo-one-trunk": Work("ppo", 64, 32, 48, updates=2, one_trunk=True),
    "ppo-32k": Work("ppo", 64, 32, 48, vocabulary=32000, updates=1, warm_up=0),
    "sampling-1": Work("sampling", 1, 64, 64, updates=7),
    "sampling-16": Work("sampling", 16, 64, 64, updates=7),
    "sampling-64": Work("sampling", 64, 64, 64, updates=7),
    "sampling-1-compiled": Work("sampling", 1, 64, 64, updates=7, compiled=True),
    "sampling-16-compiled": Work("sampling", 16, 64, 64, updates=7, compiled=True),
}


# What we aim at: times the peer's speed, and the share of its peak memory. What reaches it is no claim of its own.
TARGETS: Mapping[str, tuple[float, float]] = {
    "sft-mixed": (3.0, 0.6), "sft-mixed-grouped": (3.0, 0.6),
    "sft-fixed": (1.4, 0.6), "sft-fixed-15m": (1.4, 0.6), "sft-fixed-32k": (3.0, 0.35),
    "reward-long": (2.0, 0.6), "reward-ranked": (3.0, 0.6),
    "dpo-long": (3.5, 0.5), "dpo-long-15m": (3.5, 0.5), "dpo-short": (2.5, 0.5),
    "dpo-long-32k": (7.0, 0.22), "dpo-long-15m-32k": (7.0, 0.22),
    "kto-short": (2.5, 0.6), "orpo-short": (2.5, 0.6),
    "grpo-short": (2.0, 0.6), "grpo-long": (3.0, 0.6), "rloo-short": (2.0, 0.6), "rloo-long": (3.0, 0.6),
    "ppo": (1.8, 0.6), "ppo-32k": (3.5, 0.35), "ppo-one-trunk": (3.0, 0.5),
    "sampling-1": (2.5, 1.0), "sampling-16": (2.0, 1.0), "sampling-64": (1.5, 1.0),
    "sampling-1-compiled": (2.5, 1.0), "sampling-16-compiled": (2.0, 1.0),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Timing:
    """What a side measured. `once`: seconds between the model's being loaded and the first update; `seconds` of every
    update; `learned`: what learning is compared by, the losses of every update or what the run apart found;
    `at_rest_mb`, `peak_mb`: resident before the first update, and at most; `version` of the library."""

    once: float
    seconds: list[float]
    learned: list[float]
    at_rest_mb: float
    peak_mb: float
    version: str


def groups_of(work: Work) -> list[list[TokenGroup]]:
    """The groups of every step, completions from best to worst. Words follow Zipf's law, so there is a little to
    learn; every completion ends with END. Of works that sample, the completions serve the run apart alone."""
    random = generator("speed", work.kind, work.batch, str(work.prompt), str(work.answer), work.answers)
    words = work.vocabulary - FIRST
    weights = 1.0 / (1.0 + np.arange(words))
    weights /= weights.sum()

    def ids(count: int) -> tuple[int, ...]:
        return tuple((random.choice(words, count, p=weights) + FIRST).tolist())

    def group(number: int) -> TokenGroup:
        prompt, answer = work.prompt, work.answer
        if prompt is None or answer is None:
            length = min(LONGEST, max(SHORTEST, round(math.exp(random.normal(MEAN_LOG, SPREAD_LOG)))))
            prompt, answer = length // 3, length - length // 3
        completions = tuple(TokenCompletion((*ids(answer - 1), END), (True,) * answer) for _ in range(work.answers))
        return TokenGroup(ids(prompt), completions, prompt_id=number)

    return [[group(step * work.batch + i) for i in range(work.batch)] for step in range(work.steps)]


def pairs_of(group: TokenGroup) -> list[tuple[TokenCompletion, TokenCompletion]]:
    """(better, worse) for all pairs of a group's completions."""
    return list(combinations(group.completions, 2))


def desirable(group: TokenGroup) -> bool:
    """Whether people liked the answer, where answers are judged one by one."""
    return group.prompt_id % 2 == 0


def words(ids: Sequence[int]) -> str:
    """The text whose tokens these are."""
    return " ".join(f"w{i}" for i in ids)


def reward(text: str) -> float:
    """What the online works are rewarded by: the share of even words. It can be learned."""
    found = [word for word in text.split() if word.startswith("w")]
    return sum(int(word[1:]) % 2 == 0 for word in found) / max(1, len(found))


def mean_logprob(model: Any, groups: Sequence[TokenGroup]) -> float:
    """Nats per token of these completions under the model as it is, by the plainest way there is: where both sides
    learned the same, it is the same."""
    import torch

    total = count = 0.0
    with torch.no_grad():
        for group in groups:
            rows = torch.tensor([[*group.prompt_ids, *completion.ids] for completion in group.completions])
            ids = rows[:, len(group.prompt_ids) :]
            logits = model(input_ids=rows).logits[:, len(group.prompt_ids) - 1 : -1]
            total += float(logits.log_softmax(-1).gather(-1, ids[:, :, None]).double().sum())
            count += ids.numel()
    return total / count


def word_tokenizer(vocabulary: int) -> Any:
    """One token a word: the text of `words` is read as its ids."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    known = {"<pad>": PAD, "<end>": END} | {f"w{i}": i for i in range(FIRST, vocabulary)}
    inner = Tokenizer(models.WordLevel(known, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<end>")


def prepare(work: Work, folder: Path) -> None:
    """Write what both sides start from: the model `policy` with its tokenizer, and for reward models `reward`."""
    from accord.models.load import ModelShape, build_model, reward_model_from, save_model

    tokenizer = word_tokenizer(work.vocabulary)
    hidden, layers, heads, mlp = MODELS[work.model]
    shape = ModelShape(hidden, layers, heads, 1024, intermediate_size=mlp)
    policy = build_model(shape, vocab_size=work.vocabulary, pad_id=PAD, eos_id=END, seed=0)
    if work.kind == "sampling":
        _enliven(policy)
    save_model(policy, tokenizer, folder / "policy")
    if work.kind in ("reward", "ppo"):
        save_model(reward_model_from(policy, 0), tokenizer, folder / "reward")


def _enliven(policy: Any) -> None:
    """A new model with tied embeddings always repeats its last token. With larger weights in its blocks the likeliest
    continuation is a text of many words, so that two samplers can be told apart by it."""
    for block in policy.model.layers:
        for weight in block.parameters():
            weight.data *= 1.0 if weight.dim() == 1 else 5.0
