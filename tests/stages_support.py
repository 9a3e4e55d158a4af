"""Whole stages of a few steps on a tiny model, for tests of what a stage does, says and refuses."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from accord.config import recipe_from
from accord.methods.corpus import Corpus, Part
from accord.models.load import ModelShape, build_model, save_model
from accord.models.scratch_tokenizer import train_tokenizer
from accord.pipeline import run_stages
from accord.records import Completion, Group, Message

__all__ = ["answers_to", "logged", "run_stage_on", "saved_model", "weights_of"]

QUICK: dict[str, Any] = {
    "batch_size": 8, "max_steps": 2, "learning_rate": 1e-3, "warmup_fraction": 0.0, "checkpoint_every": 1000,
}  # fmt: skip


def answers_to(prompt: str, *answers: tuple[str, dict[str, Any]], **rest: Any) -> Group:
    """A group of (text, what is known of it) answers, for instance ("yes", {"rank": 0})."""
    completions = tuple(Completion((Message("assistant", text),), **known) for text, known in answers)
    return Group((Message("user", prompt),), completions, **rest)


def saved_model(folder: Path, groups: Sequence[Group], seed: int) -> Path:
    """A tiny model whose tokenizer is trained on the groups' text."""
    texts = [m.content for g in groups for m in (*g.prompt, *(c.messages[0] for c in g.completions))]
    tokenizer = train_tokenizer(texts, vocab_size=300)
    ids: dict[str, Any] = {"pad_id": tokenizer.pad_token_id, "eos_id": tokenizer.eos_token_id}
    shape = ModelShape(hidden_size=16, layers=1, heads=2, max_positions=64)
    return save_model(build_model(shape, vocab_size=len(tokenizer), seed=seed, **ids), tokenizer, folder)


def run_stage_on(
    out: Path, model: Path, part: Part, stage: str, section: dict[str, Any], *, holdout: float = 0.3
) -> dict[str, Any]:
    """The summary of a stage that learns from `part` in two steps, with what it `printed`."""
    data = {"holdout": holdout, "max_tokens": 64}
    tree = {"model": {"path": str(model)}, "threads": 1, "out": str(out), "data": data, stage: QUICK | section}
    screen = io.StringIO()
    console = Console(file=screen, width=1000)
    summary = run_stages(recipe_from(tree), Corpus(preferences=part), [stage], console)[stage]
    return summary | {"printed": screen.getvalue()}


def weights_of(out: Path, stage: str) -> bytes:
    return (out / stage / "model" / "model.safetensors").read_bytes()


def logged(out: Path, stage: str) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / stage / "metrics.jsonl").read_text().splitlines()]
