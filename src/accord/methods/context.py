"""What a stage is given, where its models come from, and the frame every stage runs in."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from heapq import nsmallest
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape

from accord.atomic import cache_folder
from accord.config import Recipe
from accord.data.shelf import in_memory
from accord.data.templates import Template
from accord.data.token_store import StoredTokens, store_tokens
from accord.data.tokenise import tokenise_groups
from accord.errors import CheckpointError, ConfigError
from accord.guards import guard_account, guard_ending, read_guard_log
from accord.methods.catalogue import STAGES
from accord.methods.corpus import Corpus, Part
from accord.methods.named import unfinished
from accord.models.adapters import add_adapter, fold_adapter, has_adapter, save_adapter
from accord.models.attention import attending, check_attention
from accord.models.blocks import train_top_blocks
from accord.models.compiled import check_compiler, compile_seconds, compile_trunk
from accord.models.device import choose_device
from accord.models.layout import Layout, shares
from accord.models.load import ModelShape, build_model, load_policy, save_model
from accord.models.paths import check_model_path
from accord.models.precision import precision
from accord.models.quantise import quantise
from accord.models.recompute import recompute_activations
from accord.models.scratch_tokenizer import train_tokenizer
from accord.models.self_check import SHARING_PAYS, best_layout, check_layouts, saved_by_sharing
from accord.phases import phase
from accord.randomness import torch_seed
from accord.records import Group, Interval, TokenGroup
from accord.report.stage import stage_report
from accord.rewards.scorers import RewardFunction
from accord.training.environment import peak_memory_mb
from accord.training.progress import StageProgress
from accord.training.runfolder import RunFolder, read_summary

__all__ = [
    "Context",
    "LoadedPolicy",
    "adapt",
    "base_folder",
    "choose_layout",
    "data_note",
    "headline",
    "run_stage",
    "save_trained",
    "stage_model",
    "tokenised",
    "weights_hash",
]

EMBEDDED = "quickstart"
GROUPS_CHECKED = 3
HUNDREDTHS = 100  # steps of the bar while tokens are made


@dataclass(frozen=True, slots=True)
class Context:
    """A checked recipe with its data. `functions` holds reward functions given as Python objects, by config key;
    `elsewhere` the folders of stages that are not those of this run's root, by stage."""

    recipe: Recipe
    corpus: Corpus
    console: Console
    functions: Mapping[str, RewardFunction] = field(default_factory=dict)
    elsewhere: Mapping[str, Path] = field(default_factory=dict)

    @property
    def root(self) -> Path:
        """The run's folder: one sub-folder a stage."""
        return self.recipe.root

    @property
    def seed(self) -> int:
        return self.recipe.seed

    @property
    def device(self) -> torch.device:
        """Where models are. Raises ConfigError for a device that is not there."""
        return choose_device(self.recipe.model.device)

    @property
    def offload(self) -> torch.device | None:
        """Where models go that are elsewhere while nobody asks them; None where they stay."""
        return self.device if self.recipe.model.offload and self.device.type != "cpu" else None

    def say(self, text: str) -> None:
        """A plain line for people."""
        self.console.print(f"  {text}", highlight=False, markup=False, soft_wrap=True)


@dataclass(frozen=True, slots=True)
class LoadedPolicy:
    """A language model with the template its text goes through, and where it was loaded from."""

    model: Any
    template: Template
    start: Path | str

    @property
    def pad_id(self) -> int:
        return self.template.pad_id

    def save(self, folder: Path, card: str) -> None:
        """Write the model with its tokenizer, template and card, as `save_trained`."""
        stop_ids = self.template.stop_ids
        save_trained(self.model, self.template.tokenizer, folder, start=self.start, card=card, stop_ids=stop_ids)

    @classmethod
    def from_folder(cls, folder: Path | str, choice: str, device: torch.device | str = "cpu") -> LoadedPolicy:
        model, tokenizer = load_policy(folder, device=device)
        return cls(model, Template.of(tokenizer, choice), folder)

    @classmethod
    def of(cls, context: Context, folder: Path | str) -> LoadedPolicy:
        """The model of a folder, where the recipe wants models and with its template."""
        return cls.from_folder(folder, context.recipe.model.template, context.device)

    @classmethod
    def base(cls, context: Context, folder: Path | str) -> LoadedPolicy:
        """What a stage's training starts from: as `of`, in 4 bits if the recipe asks for that."""
        policy = cls.of(context, folder)
        if context.recipe.model.quantise is not None:
            quantise(policy.model)
        return policy

    @classmethod
    def to_train(cls, context: Context, folder: Path | str, stage: str) -> LoadedPolicy:
        """The policy a stage trains: as `base`, with a fresh adapter if the recipe has one, or with its lower
        blocks frozen. That changes no bit, so this is the reference too, as long as nothing has been trained."""
        policy = cls.base(context, folder)
        adapt(context, policy.model, stage)
        return policy


def adapt(context: Context, model: Any, *key: str) -> None:
    """Make a model ready to be trained as the recipe asks for: with an adapter, whose randomness's key is `key`, or
    with all but its top blocks frozen, or whole; keeping its activations, or not; and compiled, or not."""
    adapter, blocks = context.recipe.model.adapter, context.recipe.model.trainable_blocks
    if context.recipe.model.activation_checkpointing:
        recompute_activations(model)
    if blocks is not None:
        train_top_blocks(model, blocks)
    if adapter is not None:
        seed = torch_seed(context.seed, "adapter", *key)
        add_adapter(
            model,
            rank=adapter.rank,
            alpha=adapter.alpha,
            targets=adapter.targets,
            seed=seed,
            kind=adapter.kind,
            ranks=adapter.ranks,
        )
    if context.recipe.model.compile:
        compile_trunk(model)


def save_trained(
    model: Any, tokenizer: Any, folder: Path, *, start: Path | str, card: str, stop_ids: Sequence[int] = ()
) -> None:
    """Write a model that a stage trained from `start`: a plain one, with the adapter folded in if there is one, and the
    adapter by itself in `adapter` beside it. The last thing to do with the model: see `fold_adapter`."""
    if has_adapter(model):
        base = str(Path(start).absolute()) if Path(start).is_dir() else str(start)
        save_adapter(model, folder.with_name("adapter"), base=base)
        fold_adapter(model)
    save_model(model, tokenizer, folder, stop_ids=stop_ids, card=card)


def run_stage(
    context: Context,
    stage: str,
    *,
    settings: Mapping[str, Any],
    sources: Mapping[str, str],
    body: Callable[[RunFolder], dict[str, Any]],
) -> dict[str, Any]:
    """Run `body` in the stage's folder unless it is finished there, write its summary and report, return the summary.

    `settings` and `sources` (what -> content hash) are all the result depends on: a finished or interrupted run of
    other settings in the same folder is refused, never mixed in.
    """
    folder = context.root / stage
    check_attention(context.recipe.model.attention, context.device)
    if stage != "evaluate":  # which compiles nothing
        for key in ("compile", "compile_sampling"):
            if getattr(context.recipe.model, key):
                check_compiler(f"model.{key}", context.device)
    context.console.print(f"\n[bold]{stage}[/]  {folder}", highlight=False)
    if context.recipe.threads is not None:
        torch.set_num_threads(context.recipe.threads)
    resolved = {
        "stage": stage,
        "seed": context.seed,
        "model": _model_settings(context, stage),
        **settings,
        "guards": context.recipe.guards.model_dump(mode="json"),
    }
    started = time.monotonic()
    with RunFolder.open(folder, resolved_config=resolved, fingerprints=sources, device=str(context.device)) as run:
        summary = run.finished
        if summary is not None:
            context.say("already finished; delete the folder to run it again")
        else:
            for note in run.notes:
                context.say(note)
            compiled = compile_seconds()
            with precision(context.recipe.model.precision), attending(context.recipe.model.attention):
                summary = _with_guards(folder, {"stage": stage, **body(run)})
            if compile_seconds() > compiled:
                context.say(f"of the time, compiling took {compile_seconds() - compiled:.0f} s")
            summary["seconds"] = time.monotonic() - started
            summary["peak_memory_mb"] = peak_memory_mb()
            if (folder / "model").is_dir():
                summary["weights"] = _weights_digest(folder / "model")
            run.finish(summary)
            _tell(context, summary)
    if not (folder / "report.html").exists():
        stage_report(folder)
    return summary


def _with_guards(folder: Path, summary: dict[str, Any]) -> dict[str, Any]:
    """The summary with what the guards of the stage said, if it had any, and a warning for each that was at ALERT."""
    log = read_guard_log(folder)
    table, ending = guard_account(log), guard_ending(log)
    if not table:
        return summary
    account = summary.get("account", [])
    if ending is not None and not any(ending[1] in line for line in account):
        account = [f"Training stopped at step {ending[0]}: {ending[1]}.", *account]
    alerts = [
        f"Guard {row['guard']} ({row['title']}) was at ALERT from step {row['step']}: {row['seen']}. {row['advice']}"
        for row in table
        if row["worst"] == "ALERT"
    ]
    return {**summary, "account": account, "guards": table, "warnings": [*summary.get("warnings", ()), *alerts]}


def _model_settings(context: Context, stage: str) -> dict[str, Any]:
    """The model's settings a stage depends on: only one that trains depends on what of a model is trained. Where models
    are does not make it another run (see `environment_changes`), nor does what saves
    memory by moving or recomputing."""
    trains = stage in STAGES and STAGES[stage].trained > 0
    unread = {"device", "offload", "activation_checkpointing"}
    if not trains:
        unread |= {"adapter", "trainable_blocks", "quantise", "compile"}
    if not context.recipe.model.compile:
        unread |= {"compile"}
    if not context.recipe.model.compile_sampling or stage not in STAGES or STAGES[stage].data != "prompts":
        unread |= {"compile_sampling"}
    if context.recipe.model.precision == "float32":  # so runs from before there was a choice continue
        unread |= {"precision"}
    if context.recipe.model.attention == "auto":
        unread |= {"attention"}
    return context.recipe.model.model_dump(mode="json", exclude=unread)


def _tell(context: Context, summary: Mapping[str, Any]) -> None:
    """The stage's account and warnings, for people; what was said already (the data) is not repeated."""
    for text in summary.get("account", ()):
        if not text.startswith("Data: "):
            context.say(text)
    for text in summary.get("warnings", ()):
        context.console.print(f"  [yellow]Warning:[/] {escape(text)}", highlight=False, soft_wrap=True)


def base_folder(context: Context) -> Path:
    """The folder of the model everything starts from: named, embedded, or built from nothing on the recipe's text."""
    model = context.recipe.model
    if model.scratch is not None:
        folder = context.root / "base"
        text = context.corpus.sft if context.corpus.sft.groups else context.corpus.preferences
        run_stage(context, "base", settings={}, sources=text.sources, body=lambda run: _build_base(context, text, run))
        return folder / "model"
    if model.path is None:
        raise ConfigError(
            "no model to start from: set `model.path` (a folder, a hub id, or quickstart) or `model.scratch`"
        )
    if model.path == EMBEDDED:
        return Path(str(files("accord") / "assets" / "quickstart"))
    return Path(model.path)


def _build_base(context: Context, text: Part, run: RunFolder) -> dict[str, Any]:
    scratch = context.recipe.model.scratch
    assert scratch is not None
    if not text.groups:
        raise ConfigError(
            "`model.scratch` trains its tokenizer on `data.sft` or `data.preferences`, and neither is set"
        )
    messages = (m for g in text.groups for m in (*g.prompt, *(m for c in g.completions for m in c.messages)))
    tokenizer = train_tokenizer((message.content for message in messages), vocab_size=scratch.vocab_size)
    template = Template.of(tokenizer, context.recipe.model.template)
    model = build_model(
        ModelShape(scratch.hidden_size, scratch.layers, scratch.heads, scratch.max_positions, scratch.kind),
        vocab_size=len(tokenizer),
        pad_id=template.pad_id,
        eos_id=template.stop_ids[-1],
        seed=torch_seed(context.seed, "base"),
    )
    save_model(model, tokenizer, run.path / "model")
    parameters = sum(p.numel() for p in model.parameters())
    account = f"A new {scratch.kind} model of {parameters:,} parameters with a vocabulary of {len(tokenizer):,}."
    return {"headline": [headline("parameters", parameters)], "account": [account, *data_note(text)]}


def stage_model(context: Context, stage: str) -> Path | None:
    """The model a finished stage left in this run's folder, or elsewhere; None when the recipe has no such stage.

    Raises: ConfigError when the recipe has the stage but it has not been run; CheckpointError when the weights are not
        the ones it left.
    """
    folder = context.elsewhere.get(stage, context.root / stage)
    summary = read_summary(folder)
    if summary is not None:
        if "weights" in summary and summary["weights"] != _weights_digest(folder / "model"):
            raise CheckpointError(
                f"{folder / 'model'} does not hold the weights that the {stage} stage left: the files were damaged or "
                f"changed since. Delete {folder} and run `accord {stage}` again, or name another model with `init`"
            )
        return folder / "model"
    if getattr(context.recipe, stage, None) is not None:
        raise unfinished(stage, folder)
    return None


def weights_hash(folder: Path | str) -> dict[str, str]:
    """Which weights a folder holds, for the record of what a run depends on; a hub id stands for itself.

    Raises: ConfigError for what cannot be a model, before a run folder is made for it.
    """
    check_model_path(folder)
    path = Path(folder)
    if not path.is_dir():
        return {f"weights of {folder}": str(folder)}
    return {"starting weights": _weights_digest(path)}


def _weights_digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


@phase("data")
def tokenised(
    context: Context, groups: Sequence[Group], template: Template, what: str, **limits: Any
) -> Sequence[tuple[Group, TokenGroup]]:
    """Groups with their tokens; what had to be shortened or left out is counted and said."""
    data = context.recipe.data
    arguments = {"max_tokens": data.max_tokens, "max_prompt_tokens": data.max_prompt_tokens, "loss_on": "assistant"}
    result = _all_tokens(context, groups, template, arguments | limits, what)
    for part, count in result.cuts:
        context.say(f"{count} of {len(groups)} prompts of {what} are too long and lost {part}")
    if result.dropped:
        context.say(f"{result.dropped} of {len(groups)} {what} left out; the first: {result.first_dropped}")
    if groups and not result.pairs:
        raise ConfigError(f"none of the {what} fits; the first: {result.first_dropped}")
    return result.pairs


def _all_tokens(
    context: Context, groups: Sequence[Group], template: Template, limits: dict[str, Any], what: str
) -> StoredTokens:
    """Tokens of groups in memory are in memory, those of groups in a file are in files."""
    if not in_memory(groups):
        folder = cache_folder("tokens")
        context.say(f"{len(groups):,} {what} are read from disk, their tokens from {folder}")
        with StageProgress(context.console, "tokens", HUNDREDTHS) as bar:

            def progress(done: int) -> None:
                while bar.done * len(groups) < HUNDREDTHS * done:
                    bar.advance()

            return store_tokens(groups, template, folder, progress, **limits)
    result = tokenise_groups(groups, template, **limits)
    pairs = [(groups[source], tokens) for source, tokens in zip(result.sources, result.groups, strict=True)]
    return StoredTokens(pairs, result.cuts, len(result.dropped), str(result.dropped[0]) if result.dropped else "")


def choose_layout(context: Context, model: Any, groups: Sequence[TokenGroup], pad_id: int) -> Layout:
    """Prove on a few groups that our log-probabilities are the model's own, and choose how prompts are run."""
    sample = nsmallest(GROUPS_CHECKED, (g for g in groups if g.completions), key=lambda g: g.num_tokens)
    if not sample:
        return "plain"
    wanted = context.recipe.model.layout
    check = check_layouts(model, sample, pad_id, max_tokens=context.recipe.data.max_tokens)
    if wanted == "shared" and check.layout == "plain":
        raise ConfigError(f"`model.layout` = shared does not fit this model: {check.reason}")
    if wanted != "auto":
        return wanted
    saved = saved_by_sharing(groups)
    layout = best_layout(check, saved, compiled=context.recipe.model.compile)
    if shares(layout):
        context.say(f"each prompt runs once for all its completions: {saved:.0%} fewer tokens")
        return layout
    if check.reason and saved >= SHARING_PAYS:
        context.say(f"prompts are run once per completion: {check.reason}")
    if context.recipe.model.attention == "flex":
        context.say("`model.attention` = flex has nothing to do: where a row is one completion, there is no mask")
    return layout


def data_note(part: Part) -> list[str]:
    """What a summary's account says of the data it came from: one paragraph, last, or none."""
    return [f"Data: {'; '.join(part.notes)}."] if part.notes else []


def headline(
    name: str, value: float | Interval, *, unit: str | None = None, meaning: str | None = None
) -> dict[str, Any]:
    """One number of a summary, with its interval where it has one. Infinite ends (one prompt) are left out."""
    row: dict[str, Any] = {"name": name}
    if isinstance(value, Interval):
        finite = value.low > float("-inf") and value.high < float("inf")
        row |= value.as_dict() if finite else {"value": value.value, "n": value.n}
    else:
        row["value"] = value
    return row | ({"unit": unit} if unit else {}) | ({"meaning": meaning} if meaning else {})
