"""The model card written beside every trained model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from accord import __version__
from accord.config import ModelConfig, Recipe
from accord.methods.catalogue import STAGES

__all__ = ["model_card"]


def _adapter_note(model: ModelConfig) -> str:
    adapter = model.adapter
    if adapter is None:
        return ""
    layers = " and ".join(f"`{target}`" for target in adapter.targets) or "all linear layers"
    others = "".join(f", rank {rank} for `{name}`" for name, rank in adapter.ranks.items())
    kind = "" if adapter.kind == "lora" else f" ({adapter.kind})"
    return (
        f" What was trained is a low-rank adapter{kind} of {layers} (rank {adapter.rank}{others}, alpha "
        f"{adapter.alpha:g}): it is folded into these weights, and stands by itself in the folder `adapter` beside "
        "this one, for peft."
        + (
            f" It was trained on weights in 4 bits ({model.quantise}): the weights here are those that these stood for."
            if model.quantise is not None
            else ""
        )
    )


def model_card(
    recipe: Recipe, stage: str, start: Path | str, sources: Mapping[str, str], summary: Mapping[str, Any]
) -> str:
    """What a reader of the folder should know: where the model comes from, how it was made, what was measured."""
    title = STAGES[stage].title
    pipeline = "text-classification" if STAGES[stage].leaves == "scorer" else "text-generation"
    header = yaml.safe_dump(
        {"library_name": "transformers", "pipeline_tag": pipeline, "tags": ["accord", "rlhf", stage]}
    )
    settings = yaml.safe_dump(getattr(recipe, stage).model_dump(mode="json", exclude_none=True), sort_keys=False)
    numbers = [
        f"| {row['name']} | {row['value']:.4g} | "
        + (f"{row['low']:.4g} to {row['high']:.4g}, n = {row['n']} |" if "low" in row else " |")
        for row in summary.get("headline", ())
    ]
    data = [f"- {name}: `{fingerprint}`" for name, fingerprint in sources.items()]
    parts = [
        f"---\n{header}---\n\n# {title}: {recipe.name}",
        f"Trained with Accord {__version__} (stage `{stage}`, seed {recipe.seed}), starting from `{start}`."
        + _adapter_note(recipe.model),
        "\n\n".join([*summary.get("account", ()), *(f"**Warning:** {w}" for w in summary.get("warnings", ()))]),
        "## Measured\n\n| number | value | 95% interval |\n|---|---|---|\n" + "\n".join(numbers) if numbers else "",
        "## Data and starting weights, by content hash\n\n" + "\n".join(data),
        f"## Settings\n\n```yaml\n{settings}```",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"
