"""`accord loop` as a command: what two rounds leave, killed at any moment, by people through a file, and with labels
that mean nothing."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from support import RECIPE, Zygote, survives_kills, write_pairs

OFFLINE: dict[str, Any] = {
    "batch_size": 8, "max_steps": 6, "checkpoint_every": 2, "eval_every": 4, "learning_rate": 3e-3,
}  # fmt: skip
LOOP: dict[str, Any] = {
    "seed": 3,
    "threads": 1,
    "model": RECIPE["model"],
    "data": {"holdout": 0.3, "max_tokens": 64},
    "sft": OFFLINE,
    "reward": OFFLINE,
    "ppo": {
        "prompts_per_step": 8, "samples_per_prompt": 2, "episodes": 64, "max_new_tokens": 8, "learning_rate": 1e-2,
        "kl_coef": 0.0, "checkpoint_every": 2, "samples_every": 2, "update_epochs": 2, "minibatches": 2,
    },
    "loop": {
        "rounds": 2, "comparisons": 20, "holdout_pairs": 10, "patience": 2,
        "labeller": "function", "label_function": "tastes:letters",
    },
}  # fmt: skip
# People who like letters; and people whose choices say nothing of the answers.
TASTES = """
import hashlib
def letters(prompt, completion):
    return sum(c.isalpha() for c in completion)
def whims(prompt, completion):
    return hashlib.sha256((prompt + completion).encode()).digest()[0]
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("loop")
    (folder / "tastes.py").write_text(TASTES)
    data = LOOP["data"] | {"sft": str(write_demonstrations(folder))}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(LOOP | {"data": data}))
    return folder / "recipe.yaml"


@pytest.fixture(scope="module")
def zygote(recipe: Path) -> Iterator[Zygote]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("PYTHONPATH", str(recipe.parent), prepend=os.pathsep)
        with Zygote() as started:
            yield started


def write_demonstrations(folder: Path) -> Path:
    rows = [json.loads(line) for line in write_pairs(folder / "pairs.jsonl").read_text().splitlines()]
    file = folder / "demonstrations.jsonl"
    file.write_text("".join(json.dumps({"prompt": r["prompt"], "completion": r["chosen"]}) + "\n" for r in rows))
    return file


def loop(zygote: Zygote, recipe: Path, out: Path, *words: str, after: float | None = None) -> tuple[int, str, float]:
    return zygote.run("loop", str(recipe), "--set", f"out={out}", *words, after=after)


def left(root: Path) -> dict[str, Any]:
    """All that must not depend on interruptions."""
    found: dict[str, Any] = {"lineage": json.loads((root / "lineage.json").read_text())}
    for file in sorted([*root.rglob("*.safetensors"), *root.rglob("*.jsonl")]):
        if "checkpoints" not in file.parts and file.name != "metrics.jsonl":
            found[str(file.relative_to(root))] = hashlib.sha256(file.read_bytes()).hexdigest()
    return found


def test_x(zygote: Zygote, recipe: Path, tmp_path: Path, monkeypatch) -> None:
    code, output, seconds = loop(zygote, recipe, tmp_path / "run")
    print(output, seconds)
    print((tmp_path / "run/lineage.json").read_text())
    assert 0
