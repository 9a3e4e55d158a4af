"""What a recipe would do: its stages, sizes and memory, worked out from files' headers. Torch-free."""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from rich.table import Table

from accord.config import (
    AdapterConfig,
    EvaluateConfig,
    OfflineFields,
    PPOConfig,
    Recipe,
    RFTConfig,
    RolloutFields,
    SamplingFields,
    ScratchConfig,
)
from accord.config.offline import SOFT_LABEL_FREE
from accord.data.order import num_steps
from accord.errors import ConfigError, DataError
from accord.methods.catalogue import STAGES
from accord.methods.corpus import Corpus, Part, split_holdout
from accord.models.extras import require_bitsandbytes, require_flash_attention
from accord.models.paths import check_model_path
from accord.records import Group

__all__ = [
    "check_labels",
    "check_prompts",
    "check_sizes",
    "imitated",
    "num_parameters",
    "plan_table",
    "stages_of",
    "with_reference_answers",
    "with_references",
]

# fp32 bytes for each parameter: weights, gradient and AdamW's two moments while training; weights alone while frozen.
TRAINED, FROZEN = 16, 4
TRAINED_8BIT = 4 + 4 + 2 * (1 + 4 / 256)  # with moments of 8 bits and their scales
QUANTISED = (4 + 8 / 64 + 32 / (64 * 256)) / 8  # of a weight in 4 bits with its scales
# Parts of the names of matrices that are no linear layers of the trunk.
NOT_LINEAR = ("embed", "wte", "wpe", "lm_head", "score")
TOKEN_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")


def stages_of(recipe: Recipe) -> list[str]:
    """The stages a recipe has, in the order they run. Raises ConfigError when there is none."""
    stages = [name for name in STAGES if getattr(recipe, name) is not None]
    if not stages:
        raise ConfigError(f"the recipe has no stage: add a section, one of {', '.join(STAGES)}")
    return stages


def num_parameters(recipe: Recipe) -> int | None:
    """Parameters of the starting model, from the safetensors headers or the shape; None for a hub id.

    Raises: ConfigError for a path that cannot be a model.
    """
    if recipe.model.scratch is not None:
        return _scratch_parameters(recipe.model.scratch)
    return sum(math.prod(shape) for shape in _file_shapes(recipe).values()) or None


def plan_table(recipe: Recipe, corpus: Corpus, stages: list[str]) -> Table:
    """One row a stage: data, steps, models in memory. Raises DataError where a stage's data is missing."""
    parameters, part = num_parameters(recipe), _trained_part(recipe)
    table = Table("stage", "data", "steps", "models in memory", "weights and optimiser, fp32")
    for stage in stages:
        data, steps = _sizes(recipe, corpus, stage)
        models, bytes_needed = _memory(recipe, stage, parameters or 0, part)
        if stage == "ilql":
            models += ", Q heads"
            bytes_needed += (TRAINED + FROZEN) * _q_head_parameters(recipe)
        table.add_row(stage, data, steps, models, f"{bytes_needed / 1e6:,.0f} MB" if parameters else "unknown")
    table.caption = (
        f"{parameters:,} parameters{part.note if part else ''}; activations come on top"
        if parameters
        else "a model that is not a local folder"
    )
    return table


@dataclass(frozen=True, slots=True)
class _Part:
    """The part of a model that is trained when it is not the whole: its parameters, and what it is called."""

    parameters: int
    name: str
    is_adapter: bool

    @property
    def note(self) -> str:
        return f", about {self.parameters:,} in {self.name}"


def _trained_part(recipe: Recipe) -> _Part | None:
    """None when all weights are trained. Raises ConfigError for more top blocks than the model has."""
    adapter, blocks = recipe.model.adapter, recipe.model.trainable_blocks
    if adapter is not None:
        return _Part(_adapter_parameters(recipe, adapter), "an adapter", True)
    if blocks is not None:
        return _Part(_top_parameters(recipe, blocks), f"the top {blocks} block{'s' * (blocks > 1)}", False)
    return None


def _memory(recipe: Recipe, stage: str, parameters: int, part: _Part | None) -> tuple[str, int]:
    """Models in memory, in words, and bytes of their weights and optimisers.

    Where a part is trained, the rest is there once: the policy's. The reference is the policy without its adapter, or a
    frozen copy of the top blocks; the value model has a part of its own. So has a reward model that was made from the
    same weights; any other is whole, and then the value model stands on it.
    """
    section, reward = getattr(recipe, stage), recipe.reward
    trained, frozen = STAGES[stage].trained, STAGES[stage].frozen
    if getattr(section, "value_trunk", "own") == "policy":
        trained -= 1  # a head has no weights to speak of
    each = TRAINED_8BIT if getattr(section, "optimiser", "adamw") == "adamw_8bit" else TRAINED
    if part is None or not trained:
        return f"{trained} trained, {frozen} frozen", round((trained * each + frozen * FROZEN) * parameters)
    has_reference, has_scorer = isinstance(section, RolloutFields), isinstance(section, SamplingFields)
    shared_scorer = has_scorer and section.reward_model is None and reward is not None and section.init == reward.init
    whole = 1 + (has_scorer and not shared_scorer)
    parts = shared_scorer + (has_reference and not part.is_adapter)
    # Top blocks are trained in place; an adapter stands beside the weights.
    own = trained * each - (0 if part.is_adapter else FROZEN)
    unit = "adapter" if part.is_adapter else "top"
    counted = [f"{trained} {unit}{'s' * (trained > 1)}", f"{parts} frozen {unit}{'s' * (parts > 1)}", f"{whole} frozen"]
    models = ", ".join(text for text in counted if not text.startswith("0"))
    saved = _quantised_parameters(recipe) * (FROZEN - QUANTISED)  # by the policy's trunk; a scorer's is whole
    return models, round((own + parts * FROZEN) * part.parameters + whole * FROZEN * parameters - saved)


def check_sizes(recipe: Recipe, corpus: Corpus, stages: list[str]) -> None:
    """Raises ConfigError or DataError where a stage would find nothing to work on, or a package that it needs is not
    there: now, not after the stages before."""
    if recipe.model.quantise is not None and any(STAGES[stage].trained for stage in stages if stage in STAGES):
        require_bitsandbytes("model.quantise")
    if recipe.model.attention == "flash":
        require_flash_attention("model.attention")
    for stage in stages:
        if getattr(getattr(recipe, stage, None), "optimiser", "adamw") == "adamw_8bit":
            require_bitsandbytes(f"{stage}.optimiser")
        _sizes(recipe, corpus, stage)


def check_prompts(stage: str, section: RolloutFields, count: int) -> None:
    """Raises ConfigError when a step wants more prompts than there are."""
    if count < section.prompts_per_step:
        raise ConfigError(
            f"`{stage}.prompts_per_step` = {section.prompts_per_step}, but only {count} distinct training prompts are "
            "left: lower it, or give more prompts"
        )


def with_reference_answers(
    stage: str, section: RolloutFields, corpus: Corpus, groups: Sequence[Group]
) -> tuple[list[Group], dict[int, tuple[str, ...]] | None]:
    """The prompts that `shaping.reference` can be used on, and the answers it compares with; None without it.

    Raises: ConfigError where prompts have none and are not to be left out, or where none has one.
    """
    if section.shaping.reference == "none":
        return list(groups), None
    answers = corpus.reference_answers()
    kept = [group for group in groups if group.prompt_id in answers]
    missing = len(groups) - len(kept)
    if not kept or (missing and section.shaping.missing_reference == "refuse"):
        first = next(group for group in groups if group.prompt_id not in answers)
        advice = "" if not kept else f", or set `{stage}.shaping.missing_reference` = leave_out"
        raise ConfigError(
            f"`{stage}.shaping.reference` = {section.shaping.reference} compares with each prompt's reference answer, "
            f"and {missing} of {len(groups)} training prompts have none, the first {first.prompt[-1].content[:80]!r}: "
            f"give their demonstrations in `data.sft` or comparisons in `data.preferences`{advice}"
        )
    return kept, answers


def imitated(corpus: Corpus, holdout: float) -> Sequence[Group]:
    """The demonstrations PPO-ptx may learn from. Raises DataError when there are none."""
    train, held_out = split_holdout(corpus.imitated().groups, holdout)
    if not train:
        raise DataError(f"`ppo.ptx_coef` has no demonstration to imitate: {len(held_out)} are held out")
    return train


def check_labels(groups: Sequence[Group], loss: str) -> None:
    """Raises ConfigError for comparisons with soft labels where the loss takes every label as certain."""
    if loss not in SOFT_LABEL_FREE:
        return
    soft = (group for group in groups if group.soft_label is not None and group.soft_label != 1)
    first = next(soft, None)
    if first is not None:
        where = f", the first at {first.origin}" if first.origin else ""
        raise ConfigError(
            f"{1 + sum(1 for _ in soft):,} comparisons have soft labels{where}, and the {loss} loss takes every label "
            "as certain: use `accord dpo` with another `dpo.loss`, or take the soft labels out of the data"
        )


def _sizes(recipe: Recipe, corpus: Corpus, stage: str) -> tuple[str, str]:
    section = getattr(recipe, stage)
    if isinstance(section, OfflineFields):
        part = _part(corpus, STAGES[stage].data)
        if stage in ("dpo", "orpo"):
            check_labels(part.groups, getattr(section, "loss", stage))
        return _offline_sizes(part, section, stage, recipe.data.holdout)
    if stage == "evaluate":
        return _evaluation_sizes(corpus, section, recipe.data.holdout), "-"
    train, _ = split_holdout(corpus.all_prompts().groups, recipe.data.holdout)
    if isinstance(section, RolloutFields):
        train, _ = with_reference_answers(stage, section, corpus, train)
        check_prompts(stage, section, len(train))
        if isinstance(section, PPOConfig) and section.ptx_coef:
            imitated(corpus, recipe.data.holdout)
        per_step = section.prompts_per_step * section.samples_per_prompt
        updates = section.update_epochs * section.minibatches
        steps = f"{math.ceil(section.episodes / per_step):,} rollouts of {per_step}, {updates} updates each"
    elif isinstance(section, RFTConfig):
        prompts = min(len(train), section.prompts_per_cycle or len(train))
        steps = f"{section.cycles} x {section.improve_steps} of {prompts * section.samples_per_prompt:,} completions"
    else:
        steps = f"{section.n} completions a prompt"
    return f"{len(train):,} prompts", steps


def _part(corpus: Corpus, data: str) -> Part:
    parts = {
        "demonstrations": corpus.demonstrations,
        "comparisons": corpus.comparisons,
        "labels": corpus.labelled,
        "ratings": corpus.ratings,
    }
    return parts[data]()


def _offline_sizes(part: Part, section: OfflineFields, stage: str, holdout: float) -> tuple[str, str]:
    train, held_out = split_holdout(part.groups, holdout)
    if not train:
        raise DataError(f"the {stage} stage has nothing to train on: all {len(held_out)} groups are held out")
    steps = num_steps(len(train), section.batch_size, section.epochs, section.max_steps)
    return f"{len(train):,} {STAGES[stage].data}, {len(held_out):,} held out", f"{steps:,} of {section.batch_size}"


def with_references(groups: Sequence[Group]) -> list[Group]:
    """The prompts that people answered. Raises ConfigError when there is none."""
    answered = [group for group in groups if group.reference]
    if not answered:
        raise ConfigError(
            f"`evaluate.against_references` is set, and none of the {len(groups)} held-out prompts has a reference "
            "answer: name a file of demonstrations as `data.prompts` or `data.evaluation`"
        )
    return answered


def _evaluation_sizes(corpus: Corpus, section: EvaluateConfig, holdout: float) -> str:
    prompts = corpus.evaluation_prompts()
    if prompts is not None:
        found = with_references(prompts.groups) if section.against_references else prompts.groups
        return f"{len(found):,} prompts"
    _, held_out = split_holdout(corpus.all_prompts().groups, holdout)
    if section.against_references:
        held_out = with_references(held_out)
    if len(held_out) < 2:
        raise ConfigError(
            f"{len(held_out)} held-out prompts are too few to evaluate on: raise `data.holdout` (now {holdout}) or set "
            "`data.evaluation`"
        )
    return f"{len(held_out):,} held-out prompts"


def _file_shapes(recipe: Recipe) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of `model.path`, by name; empty for a hub id and for no path at all."""
    if recipe.model.path is None:
        return {}
    embedded = recipe.model.path == "quickstart"
    folder = Path(str(files("accord") / "assets" / "quickstart")) if embedded else Path(recipe.model.path)
    check_model_path(folder if embedded else recipe.model.path)
    shapes: dict[str, tuple[int, ...]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(length))
        shapes |= {name: tuple(t["shape"]) for name, t in header.items() if name != "__metadata__"}
    return shapes


def _q_head_parameters(recipe: Recipe) -> int:
    """Weights of ILQL's two Q heads (width to twice that, to the vocabulary), which are trained and have frozen copies.

    They can outweigh the model. Its width and vocabulary are those of its token embedding.
    """
    scratch = recipe.model.scratch
    if scratch is not None:
        vocabulary, width = scratch.vocab_size, scratch.hidden_size
    else:
        embeddings = (shape for name, shape in _file_shapes(recipe).items() if name.endswith(TOKEN_EMBEDDINGS))
        vocabulary, width = next(embeddings, (0, 0))
    return 2 * (width * 2 * width + 2 * width * vocabulary)


def _adapter_parameters(recipe: Recipe, adapter: AdapterConfig) -> int:
    """Rank times inputs and outputs of each linear layer, told by the names and shapes of the weights; for DoRA a
    length for each output besides."""
    layers = _linear_layers(recipe)
    for key, endings in (("targets", adapter.targets), ("ranks", tuple(adapter.ranks))):
        unknown = [t for t in endings if not any(f".{name}".endswith(f".{t}") for name in layers)]
        if layers and unknown:
            known = ", ".join(sorted({name.rpartition(".")[2] for name in layers}))
            raise ConfigError(
                f"`model.adapter.{key}`: {', '.join(map(repr, unknown))} names no linear layer of the model; its "
                f"linear layers are called: {known}"
            )
    targets = tuple(f".{target}" for target in adapter.targets)
    adapted = {name: shape for name, shape in layers.items() if not targets or f".{name}".endswith(targets)}
    return sum(
        _rank_of(name, adapter) * sum(shape) + (_outputs(name, shape) if adapter.kind == "dora" else 0)
        for name, shape in adapted.items()
    )


def _quantised_parameters(recipe: Recipe) -> int:
    """Weights that `model.quantise` puts into 4 bits."""
    return sum(map(math.prod, _linear_layers(recipe).values())) if recipe.model.quantise is not None else 0


def _linear_layers(recipe: Recipe) -> dict[str, tuple[int, ...]]:
    """Shape by name of the trunk's linear layers."""
    scratch = recipe.model.scratch
    shapes = _file_shapes(recipe) if scratch is None else _scratch_layers(scratch)
    return {
        name.removesuffix(".weight"): shape
        for name, shape in shapes.items()
        if len(shape) == 2 and name.endswith(".weight") and not any(part in name for part in NOT_LINEAR)
    }


def _rank_of(layer: str, adapter: AdapterConfig) -> int:
    own = [ending for ending in adapter.ranks if f".{layer}".endswith(f".{ending}")]
    return adapter.ranks[max(own, key=len)] if own else adapter.rank


def _outputs(layer: str, shape: tuple[int, ...]) -> int:
    """GPT-2's family keeps its weights (in, out), under names of their own; all others (out, in)."""
    return shape[1] if layer.rpartition(".")[2].startswith("c_") else shape[0]


def _top_parameters(recipe: Recipe, count: int) -> int:
    """Weights of the last blocks, told by the numbers in the names of the weights; the final norm is left out."""
    scratch = recipe.model.scratch
    shapes = _file_shapes(recipe) if scratch is None else _scratch_layers(scratch)
    sizes: dict[int, int] = {}
    for name, shape in shapes.items():
        number = re.search(r"(?:^|\.)(\d+)\.", name)
        if number:
            sizes[int(number[1])] = sizes.get(int(number[1]), 0) + math.prod(shape)
    if sizes and count > len(sizes):
        raise ConfigError(
            f"`model.trainable_blocks` = {count}, but the model has {len(sizes)} blocks; choose 1 to {len(sizes)}, or "
            "leave it unset to train all weights"
        )
    return sum(sizes[number] for number in sorted(sizes)[-count:])


def _scratch_layers(shape: ScratchConfig) -> dict[str, tuple[int, int]]:
    """Weights by name, shaped as in files."""
    width = shape.hidden_size
    if shape.kind == "gpt2":
        sizes = {"attn.c_attn": (1, 3), "attn.c_proj": (1, 1), "mlp.c_fc": (1, 4), "mlp.c_proj": (4, 1)}
        one = {name: (width * first, width * second) for name, (first, second) in sizes.items()}
    else:
        inner = _scratch_inner(width)
        one = dict.fromkeys((f"self_attn.{x}_proj" for x in "qkvo"), (width, width)) | {
            "mlp.gate_proj": (inner, width), "mlp.up_proj": (inner, width), "mlp.down_proj": (width, inner)
        }  # fmt: skip
    return {f"{layer}.{name}.weight": size for layer in range(shape.layers) for name, size in one.items()}


def _scratch_inner(width: int) -> int:
    return -(-(width * 8 // 3) // 16) * 16


def _scratch_parameters(shape: ScratchConfig) -> int:
    """Weights of the matrices and norms, embeddings tied; biases, which are few, are left out."""
    width = shape.hidden_size
    if shape.kind == "gpt2":
        block = 12 * width * width
        return shape.vocab_size * width + shape.max_positions * width + shape.layers * block
    block = 4 * width * width + 3 * width * _scratch_inner(width) + 2 * width
    return shape.vocab_size * width + shape.layers * block + width
