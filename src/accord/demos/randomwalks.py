"""The randomwalks benchmark from nothing: behaviour cloning, then any method, graded against the exact optimum.

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
from accord.config.offline import SOFT_LABEL_FREE
from accord.data.templates import Template
from accord.demos.walk_preferences import with_preferences
from accord.demos.walk_ratings import BETAS, ILQL_SETTINGS, shaped_evaluation, with_ratings
from accord.evaluation.exact_walks import WalksEvaluation, best_of_n_evaluation, exact_evaluation
from accord.methods.context import Context, headline, run_stage
from accord.methods.corpus import Corpus, Part
from accord.models.load import ModelShape, build_model, load_policy, save_model
from accord.pipeline import STAGES
from accord.randomness import torch_seed
from accord.records import Group, Message, content_id
from accord.tasks.randomwalks import ALPHABET, RandomWalks
from accord.training.runfolder import RunFolder

__all__ = ["METHODS", "WalksResult", "run_randomwalks"]

METHODS = ("sft", "dpo", "orpo", "kto", "ilql", "ppo", "rloo", "grpo", "reinforce", "online_dpo", "rft", "bestofn")
# Learn from preferences over the behaviour clone's walks.
FROM_PAIRS = ("dpo", "orpo", "kto")
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
PAIRS: dict[str, Any] = {"epochs": 6, "batch_size": 100, "learning_rate": 3e-4, "eval_every": 1000}
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
    "dpo": {**PAIRS, "beta": 0.3},
    "orpo": {**PAIRS, "odds_ratio_coef": 1.0},
    "kto": {**PAIRS, "beta": 0.1},
    "ilql": ILQL_SETTINGS,
    "ppo": {
        **ROLLOUTS,
        "value_init": "policy",
        "kl_coef": 0.0,
        "update_epochs": 4,
        "minibatches": 2,
    },
    "rloo": {**ROLLOUTS, "kl_coef": 0.0},
    "grpo": {**ROLLOUTS, "kl_coef": 0.0},
    "reinforce": {**ROLLOUTS, "kl_coef": 0.0},
    "online_dpo": {**ROLLOUTS},
    # As in the original benchmark: 100 samples a letter, and after each selection new ones.
    "rft": {
        "cycles": 6,
        "improve_steps": 1,
        "samples_per_prompt": 100,
        "start_quantile": 0.9,
        "epochs": 5,
        "batch_size": 50,
        "learning_rate": 3e-4,
        "max_new_tokens": 9,
        "missing_eos_penalty": 0.0,
    },
    "bestofn": {"n": 16, "max_new_tokens": 9, "missing_eos_penalty": 0.0},
}


@dataclass(frozen=True, slots=True)
class WalksResult:
    """What `accord benchmark randomwalks` prints.

    seconds  time of the training stages
    by_beta  ILQL alone: (beta it was sampled with, optimality, that of exact ILQL on the random walk)
    """

    method: str
    kl_coef: float
    evaluation: WalksEvaluation
    seconds: float
    folder: Path
    by_beta: tuple[tuple[float, float, float], ...] = ()


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
    seconds = start["seconds"] + STAGES["sft"](context)["seconds"]
    if method in FROM_PAIRS:
        certain = recipe.dpo is None or recipe.dpo.loss in SOFT_LABEL_FREE
        context = with_preferences(context, walks, "sampled" if certain else "soft")
    if method == "ilql":
        context = with_ratings(context, walks.rated_groups(), base)
    if method != "sft":
        seconds += STAGES[method](context)["seconds"]
    if method == "ilql":
        return _ilql_result(context, walks, seconds)
    kl_coef = _kl_coef(recipe, method)
    return WalksResult(method, kl_coef, _exact(context, walks, method, kl_coef), seconds, context.root)


def _recipe(method: str, seed: int, overrides: Sequence[str], out: Path | None, graph_seed: int) -> Recipe:
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}")
    stages = {stage: SETTINGS[stage] for stage in _stages(method)}
    tree = merged({**{key: SETTINGS[key] for key in ("threads", "model", "data")}, **stages}, overrides_tree(overrides))
    tree |= {"name": f"randomwalks-{method}", "seed": seed}
    folder = out or Path("runs") / f"randomwalks-{method}-{content_id([tree, graph_seed]):016x}"[:40]
    return recipe_from({**tree, "out": str(folder)}, source="benchmark randomwalks")


def _kl_coef(recipe: Recipe, method: str) -> float:
    """What the method pays for a nat of KL: DPO's beta, where the labels' Bradley-Terry scale is the optimality's."""
    if recipe.dpo is not None and recipe.dpo.loss == "dpo":
        return recipe.dpo.beta
    return getattr(getattr(recipe, method), "kl_coef", 0.0)


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


def _ilql_result(context: Context, walks: RandomWalks, seconds: float) -> WalksResult:
    """ILQL has a policy for each beta: the evaluation is that of its own, beside the optimality of several."""
    section = context.recipe.ilql
    assert section is not None
    reference, _ = load_policy(context.root / "sft" / "model", device=context.device)
    exact = {
        beta: shaped_evaluation(
            context.root / "ilql" / "model", reference, walks,
            beta=beta, num_samples=EXACT_SAMPLES, key=("exact-walks", context.seed),
        )
        for beta in sorted({*BETAS, section.beta})
    }  # fmt: skip
    by_beta = tuple(
        (beta, found.optimality, walks.shaped_optimality(tau=section.tau, gamma=section.gamma, beta=beta))
        for beta, found in exact.items()
    )
    return WalksResult("ilql", 0.0, exact[section.beta], seconds, context.root, by_beta)


def _exact(context: Context, walks: RandomWalks, method: str, kl_coef: float) -> WalksEvaluation:
    reference, tokenizer = load_policy(context.root / "sft" / "model", device=context.device)
    tokens: dict[str, Any] = {
        "letter_ids": [tokenizer.convert_tokens_to_ids(letter) for letter in ALPHABET],
        "eos_id": tokenizer.eos_token_id,
    }
    if context.recipe.bestofn is not None:
        return best_of_n_evaluation(reference, walks, context.recipe.bestofn.n, kl_coef=kl_coef, **tokens)
    policy = reference
    if method != "sft":
        policy, _ = load_policy(context.root / method / "model", device=context.device)
    return exact_evaluation(
        policy,
        reference,
        walks,
        kl_coef=kl_coef,
        num_samples=EXACT_SAMPLES,
        key=("exact-walks", context.seed),
        **tokens,
    )
