"""The works that are timed: models, batches and updates, as token ids that depend on the work alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Literal

import numpy as np

from accord.randomness import generator
from accord.records import TokenCompletion, TokenGroup

__all__ = [
    "BETA",
    "MODELS",
    "OPTIMISER",
    "PAD",
    "UPDATES",
    "WARM_UP",
    "WORKS",
    "Timing",
    "Work",
    "groups_of",
    "pairs_of",
    "prepare",
]

Kind = Literal["sft", "reward", "dpo", "orpo"]
PAD, END, FIRST = 0, 1, 2  # token ids; words begin at FIRST
UPDATES, WARM_UP = 8, 2  # a run's updates, and how many of them are not timed
MEAN_LOG, SPREAD_LOG, SHORTEST, LONGEST = (
    4.2,
    0.75,
    8,
    512,
)  # mixed lengths: log-normal, as instructions and answers are
BETA = 0.1
# What both sides are told. Both learn at the full rate from the first update on.
OPTIMISER: Mapping[str, float] = {
    "learning_rate": 1e-4, "adam_beta1": 0.9, "adam_beta2": 0.999, "adam_epsilon": 1e-8, "weight_decay": 0.0,
    "max_grad_norm": 1.0,
}  # fmt: skip
# Llama-like, embeddings tied: (hidden size, layers, heads, MLP size).
MODELS = {"5M": (256, 5, 4, 688), "15M": (384, 8, 6, 1024)}


@dataclass(frozen=True, slots=True)
class Work:
    """One work. A step is `batch` prompts with `answers` completions each.

    prompt, answer  tokens of each; None = mixed lengths, a third of a row being its prompt
    peer_rows       rows in a forward pass of the peer, None = all; the fastest that was found for it
    peer_grouped    the peer makes its batches from rows of similar length, which are then not the same updates
    """

    kind: Kind
    batch: int
    prompt: int | None
    answer: int | None
    answers: int = 1
    model: str = "5M"
    vocabulary: int = 4096
    peer_rows: int | None = None
    peer_grouped: bool = False

    @property
    def unit(self) -> str:
        return {"sft": "tokens/s", "reward": "prompts/s", "dpo": "pairs/s", "orpo": "pairs/s"}[self.kind]

    def amount(self, groups: list[TokenGroup]) -> int:
        """What of the unit these groups are."""
        return sum(group.num_tokens for group in groups) if self.kind == "sft" else len(groups)


WORKS: dict[str, Work] = {
    "sft-fixed": Work("sft", 16, 1, 255),
    "sft-fixed-15m": Work("sft", 16, 1, 255, model="15M"),
    "sft-fixed-32k": Work("sft", 8, 1, 255, vocabulary=32000),
    "sft-mixed": Work("sft", 16, None, None, peer_rows=4),
    "sft-mixed-grouped": Work("sft", 16, None, None, peer_grouped=True),
    "reward-long": Work("reward", 16, 192, 32, 2),
    "reward-ranked": Work("reward", 4, 192, 32, 6),
    "dpo-long": Work("dpo", 16, 192, 32, 2),
    "dpo-long-15m": Work("dpo", 16, 192, 32, 2, model="15M"),
    "dpo-short": Work("dpo", 16, 32, 96, 2),
    "dpo-long-32k": Work("dpo", 8, 192, 32, 2, vocabulary=32000),
    "orpo-short": Work("orpo", 16, 32, 96, 2),
}


@dataclass(frozen=True, slots=True)
class Timing:
    """What a side measured. `once`: seconds between the model's being loaded and the first update; `seconds` and
    `losses` of every update; `at_rest_mb`, `peak_mb`: resident before the first update, and at most."""

    once: float
    seconds: list[float]
    losses: list[float]
    at_rest_mb: float
    peak_mb: float
    version: str


def groups_of(work: Work) -> list[list[TokenGroup]]:
    """The groups of every update, completions from best to worst. Words follow Zipf's law, so there is a little to
    learn; every completion ends with END."""
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

    return [[group(step * work.batch + i) for i in range(work.batch)] for step in range(UPDATES)]


def pairs_of(group: TokenGroup) -> list[tuple[TokenCompletion, TokenCompletion]]:
    """(better, worse) for all pairs of a group's completions."""
    return list(combinations(group.completions, 2))


def prepare(work: Work, folder: Path) -> None:
    """Write what both sides start from: the model `policy` with its tokenizer, and for reward models `reward`."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from accord.models.load import ModelShape, build_model, reward_model_from, save_model

    vocabulary = {"<pad>": PAD, "<end>": END} | {f"w{i}": i for i in range(FIRST, work.vocabulary)}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<end>")
    hidden, layers, heads, mlp = MODELS[work.model]
    shape = ModelShape(hidden, layers, heads, 1024, intermediate_size=mlp)
    policy = build_model(shape, vocab_size=work.vocabulary, pad_id=PAD, eos_id=END, seed=0)
    save_model(policy, tokenizer, folder / "policy")
    if work.kind == "reward":
        save_model(reward_model_from(policy, 0), tokenizer, folder / "reward")
