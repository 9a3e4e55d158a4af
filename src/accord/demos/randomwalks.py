"""The randomwalks benchmark from nothing: behaviour cloning, then an online method, graded against the exact optimum.

The policy writes walks on a small random graph, one letter a node; a walk scores by how short it reaches the goal. The
graph is small enough to enumerate, so the expected score, the KL divergence and the best objective any policy could
have against the reference actually trained are computed, not estimated: a PPO that is wrong somewhere cannot reach 95%
of the optimum, and a KL that is wrong somewhere would exceed it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from accord.config import Recipe, recipe_from
from accord.config.load import merged, overrides_tree
from accord.data.templates import Template
from accord.evaluation.exact_walks import WalksEvaluation, exact_evaluation
from accord.methods.context import Context, headline, run_stage
from accord.methods.corpus import Corpus, Part
from accord.models.load import ModelShape, build_model, load_policy, save_model
from accord.pipeline import STAGES
from accord.randomness import torch_seed
from accord.records import Group, Message, content_id
from accord.tasks.randomwalks import ALPHABET, RandomWalks
from accord.training.runfolder import RunFolder

__all__ = ["METHODS", "WalksResult", "run_randomwalks"]

METHODS = ("sft", "ppo", "rloo", "grpo", "reinforce", "online_dpo")
PAD, EOS = "<pad>", "<eos>"
# The benchmark's model: 6 blocks of width 144 with 12 heads, 1.66 million parameters.
SHAPE = ModelShape(hidden_size=144, layers=6, heads=12, max_positions=1024, kind="gpt2")
EXACT_SAMPLES = 16

# What the online methods share: every letter in every step, walks of at most 10 nodes.
ROLLOUTS: dict[str, Any] = {
    "episodes": 19_200,
    "prompts_per_step": 20,
    "samples_per_prompt": 16,
    "max_new_tokens": 9,
    "missing_eos_penalty": 0.0,
    "learning_rate": 3e-4,
    "checkpoint_every": 10,
}
SETTINGS: dict[str, Any] = {
    "threads": 1,
    "model": {"template": "raw"},
    "data": {"holdout": 0.0, "max_tokens": 16},
    "sft": {
        "epochs": 30,
        "batch_size": 50,
        "learning_rate": 1e-3,
        "schedule": "linear",
        "eval_every": 1000,
    },
    "ppo": {
        **ROLLOUTS,
        "value_init": "policy",
        "kl_coef": 0.0,
        "update_epochs": 4,
        "minibatches": 2,
    },
    "rloo": {**ROLLOUTS, "episodes": 9_600, "kl_coef": 0.0},
    "grpo": {**ROLLOUTS, "episodes": 9_600, "kl_coef": 0.0},
    "reinforce": {**ROLLOUTS, "episodes": 9_600, "kl_coef": 0.0},
    "online_dpo": {**ROLLOUTS, "episodes": 9_600},
}


@dataclass(frozen=True, slots=True)
class WalksResult:
    """What `accord benchmark randomwalks` prints. `seconds` is the time of the training stages."""

    method: str
    kl_coef: float
    evaluation: WalksEvaluation
    seconds: float
    folder: Path


def run_randomwalks(
    method: str,
    *,
    seed: int,
    overrides: Sequence[str],
    console: Console,
    out: Path | None = None,
    graph_seed: int = 1000,
) -> WalksResult:
    """Train `method` from nothing and evaluate it exactly. `overrides` are `section.key=value` texts.

    Running it again with the same arguments continues, or repeats nothing but the evaluation.
    """
    recipe = _recipe(method, seed, overrides, out, graph_seed)
    walks = RandomWalks(graph_seed)
    prompts = [Group((Message("user", letter),)) for letter in walks.prompts]
    corpus = Corpus(sft=Part.of(walks.sft_groups(), "walks"), prompts=Part.of(prompts, "letters"))

    def optimality(prompt: str, completion: str) -> float:
        return walks.optimality(prompt + completion)

    context = Context(recipe, corpus, console, {f"{method}.reward_function": optimality})
    start = run_stage(context, "base", settings={"graph": graph_seed}, sources={}, body=lambda run: _base(context, run))
    base = context.root / "base" / "model"
    context = replace(
        context, recipe=recipe.model_copy(update={"model": recipe.model.model_copy(update={"path": str(base)})})
    )
    seconds = start["seconds"] + sum(STAGES[stage](context)["seconds"] for stage in _stages(method))
    kl_coef = getattr(getattr(recipe, method), "kl_coef", 0.0)
    return WalksResult(method, kl_coef, _exact(context, walks, method, kl_coef), seconds, context.root)


def _recipe(method: str, seed: int, overrides: Sequence[str], out: Path | None, graph_seed: int) -> Recipe:
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}")
    stages = {stage: SETTINGS[stage] for stage in _stages(method)}
    tree = merged({**{key: SETTINGS[key] for key in ("threads", "model", "data")}, **stages}, overrides_tree(overrides))
    tree |= {"name": f"randomwalks-{method}", "seed": seed}
    folder = out or Path("runs") / f"randomwalks-{method}-{content_id([tree, graph_seed]):016x}"[:40]
    return recipe_from({**tree, "out": str(folder)}, source="benchmark randomwalks")


def _stages(method: str) -> tuple[str, ...]:
    """What is trained, in order: behaviour cloning comes first."""
    return tuple(dict.fromkeys(("sft", method)))


def _base(context: Context, run: RunFolder) -> dict[str, Any]:
    tokenizer = walks_tokenizer()
    Template.of(tokenizer, "raw")
    model = build_model(
        SHAPE,
        vocab_size=len(tokenizer),
        pad_id=tokenizer.pad_token_id,
        eos_id=tokenizer.eos_token_id,
        seed=torch_seed(context.seed, "base"),
    )
    save_model(model, tokenizer, run.path / "model")
    return {"headline": [headline("parameters", sum(p.numel() for p in model.parameters()))]}


def walks_tokenizer() -> Any:
    """One token a letter, padding and end of text: 23 in all."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: index for index, token in enumerate([PAD, EOS, *ALPHABET])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=PAD))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token=PAD, eos_token=EOS)


def _exact(context: Context, walks: RandomWalks, method: str, kl_coef: float) -> WalksEvaluation:
    reference, tokenizer = load_policy(context.root / "sft" / "model")
    policy = reference if method == "sft" else load_policy(context.root / method / "model")[0]
    return exact_evaluation(
        policy,
        reference,
        walks,
        letter_ids=[tokenizer.convert_tokens_to_ids(letter) for letter in ALPHABET],
        eos_id=tokenizer.eos_token_id,
        kl_coef=kl_coef,
        num_samples=EXACT_SAMPLES,
        key=("exact-walks", context.seed),
    )
