"""Preferences over walks: pairs of the behaviour clone's own walks, each labelled with its Bradley-Terry probability,
or, for losses that take every label as certain, with a winner drawn from it.

    P(first is preferred) = sigmoid(optimality(first) - optimality(second))

Trained on these with coefficient beta, DPO's optimum is the policy proportional to reference * exp(optimality / beta):
exactly what PPO would reach with kl_coef = beta, so both are graded against the same exact optimum.
Source: Rafailov et al. 2023, arXiv:2305.18290, section 4 and lemma 2.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, Literal

from accord.data.convert import writing
from accord.data.read import read_groups
from accord.methods.context import Context, LoadedPolicy, headline, run_stage, stage_model, weights_hash
from accord.methods.corpus import Part
from accord.randomness import generator
from accord.records import Completion, Group, Message
from accord.rollout.native import NativeSampler, PromptTokens
from accord.rollout.sampling import Sampling
from accord.tasks.randomwalks import MAX_NODES, RandomWalks
from accord.training.runfolder import RunFolder

__all__ = ["PAIRS_PER_PROMPT", "with_preferences"]

PAIRS_PER_PROMPT = 200


def with_preferences(context: Context, walks: RandomWalks, labels: Literal["soft", "sampled"]) -> Context:
    """The context with pairs sampled from its SFT model; sampled once, then read from the run's folder."""
    folder = stage_model(context, "sft")
    assert folder is not None

    def body(run: RunFolder) -> dict[str, Any]:
        policy = LoadedPolicy.of(context, folder)
        sampling = Sampling(MAX_NODES - 1, stop_ids=policy.template.stop_ids)
        prompts = [Group((Message("user", letter),)) for letter in walks.prompts]
        wanted = [PromptTokens(policy.template.prompt_ids(g.prompt), g.prompt_id) for g in prompts]
        sampler = NativeSampler(policy.model, pad_id=policy.pad_id)
        sampled = sampler.generate(wanted, 2 * PAIRS_PER_PROMPT, sampling, ("walk-pairs", context.seed))
        draw = generator("walk-labels", context.seed)
        with writing(run.path / "soft.jsonl") as soft, writing(run.path / "sampled.jsonl") as certain:
            for letter, samples in zip(walks.prompts, sampled, strict=True):
                texts = [policy.template.decode(sample.ids) for sample in samples]
                for first, second in zip(texts[::2], texts[1::2], strict=True):
                    difference = walks.optimality(letter + first) - walks.optimality(letter + second)
                    probability = 1 / (1 + math.exp(-difference))
                    soft(_pair(letter, first, second, probability))
                    certain(_pair(letter, first, second, float(draw.random() < probability)))
        return {"headline": [headline("pairs", len(walks.prompts) * PAIRS_PER_PROMPT)]}

    settings = {"pairs_per_prompt": PAIRS_PER_PROMPT}
    run_stage(context, "annotate", settings=settings, sources=weights_hash(folder), body=body)
    pairs = read_groups(context.root / "annotate" / f"{labels}.jsonl")
    part = Part(pairs.groups, {"pairs": pairs.fingerprint})
    return replace(context, corpus=replace(context.corpus, preferences=part))


def _pair(letter: str, first: str, second: str, probability: float) -> Group:
    """The likelier winner first. An empty walk, which no file of answers would hold, is written as a step in place."""
    better, worse = (first, second) if probability >= 0.5 else (second, first)
    completions = tuple(
        Completion((Message("assistant", text or letter),), rank=rank) for rank, text in enumerate((better, worse))
    )
    return Group((Message("user", letter),), completions, soft_label=max(probability, 1 - probability))
