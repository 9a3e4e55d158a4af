"""Runs a few real iterations of a recipe's stages in a folder of their own, and measures them.

Everything is the recipe's own but what would make it long or end it early: fewer steps, a sample of the data (of which
what depends on its size is scaled up again), no KL budget. A stage that starts from an earlier one takes the model that
the recipe's run folder has, which is only read; else the earlier stage is run for one step first.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from accord.atomic import make_folder, write_json
from accord.config import OfflineFields, PPOConfig, Recipe, RFTConfig, RolloutFields
from accord.errors import ConfigError
from accord.methods.catalogue import STAGES
from accord.methods.context import Context, base_folder
from accord.methods.corpus import Corpus, Part
from accord.methods.named import check_names
from accord.phases import EVALUATION
from accord.pipeline import STAGES as RUN
from accord.profiling.account import Measured, StageProfile, per_iteration, profile_table, reading, rows_of
from accord.profiling.machine import Machine, measure_machine
from accord.profiling.observer import Observer, Work
from accord.randomness import permutation
from accord.training.environment import environment
from accord.training.runfolder import METRICS, read_summary

__all__ = ["Profile", "profile_stages", "rare_phases", "show", "tell_idle_tokens"]

CHECKPOINT = "checkpoint"
PROFILE = "profile.json"
LEAST_GROUPS = 64


@dataclass(frozen=True, slots=True)
class Profile:
    """All stages, each on the machine as it was measured right behind it, at its number format."""

    stages: tuple[StageProfile, ...]
    machines: tuple[Machine, ...]


@dataclass(frozen=True, slots=True)
class _Span:
    """How a stage is run: its section, how many iterations warm up and how many are measured, and what is said."""

    section: Any
    warm_up: int
    steps: int
    notes: tuple[str, ...] = ()


def profile_stages(
    recipe: Recipe, corpus: Corpus, stages: Sequence[str], console: Console, *, out: Path, steps: int, warm_up: int
) -> Profile:
    """Measure `steps` iterations of each of `stages`, behind `warm_up` that are not; `out` gets profile.json, and holds
    the stages' folders meanwhile.

    Raises: ConfigError for a folder that is the recipe's own, or cannot be written to.
    """
    if out.resolve() == recipe.root.resolve() or recipe.root.resolve() in out.resolve().parents:
        raise ConfigError(f"the profile's folder {out} lies in the run's own, {recipe.root}: name another with --out")
    try:
        make_folder(out)
        scratch = tempfile.TemporaryDirectory(dir=out, prefix="stages-")
    except OSError as error:
        raise ConfigError(
            f"cannot use {out} as the profile's folder: {error.strerror}. Name another one with --out"
        ) from error
    found: list[StageProfile] = []
    machines: list[Machine] = []
    with scratch as work, _own_cache(Path(work) / "cache"):
        runner = _Runner(recipe, corpus, Path(work), steps, warm_up)
        check_names(recipe, list(stages))
        for stage in stages:
            console.print(f"profiling {stage} ...", highlight=False)
            stage_profile, machine = runner.profile(stage)
            found.append(stage_profile)
            machines.append(machine)
    result = Profile(tuple(found), tuple(machines))
    write_json(out / PROFILE, _json(result))
    return result


def show(profile: Profile, console: Console) -> None:
    """The machine, and each stage's table with its reading."""
    for stage, machine in zip(profile.stages, profile.machines, strict=True):
        console.print()
        console.print(profile_table(stage))
        console.print(_machine_line(machine), highlight=False)
        console.print(reading(stage, peak=machine.peak), highlight=False)
        once = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in stage.once.items() if seconds >= 0.005)
        console.print(f"Once, before the first iteration: {once or 'nothing'}.", highlight=False)
        for note in stage.notes:
            console.print(f"Note: {note}.", highlight=False)


class _Runner:
    """Runs stages in one folder, so that each finds the models of those before it."""

    def __init__(self, recipe: Recipe, corpus: Corpus, folder: Path, steps: int, warm_up: int) -> None:
        self._recipe = recipe.model_copy(
            update={"out": str(folder), "guards": recipe.guards.model_copy(update={"on_alert": "log"})}
        )
        self._corpus, self._steps, self._warm_up = corpus, steps, warm_up
        self._console = Console(quiet=True)
        self._elsewhere = {s: recipe.root / s for s in STAGES if read_summary(recipe.root / s) is not None}
        if recipe.model.scratch is not None:  # on all of the text: the vocabulary depends on it
            base_folder(Context(self._recipe, corpus, self._console))

    def profile(self, stage: str) -> tuple[StageProfile, Machine]:
        for earlier in _starts_from(self._recipe, stage):
            if earlier not in self._elsewhere and read_summary(self._recipe.root / earlier) is None:
                self._run(earlier, _span(getattr(self._recipe, earlier), steps=1, warm_up=0))
        span = _span(getattr(self._recipe, stage), steps=self._steps, warm_up=self._warm_up)
        observer = Observer()
        with observer.watching():
            scale = self._run(stage, span)
        machine = measure_machine(observer.shapes, device=observer.device, dtype=observer.dtype)
        logged = _logged(self._recipe.root / stage / METRICS)
        return _stage_profile(stage, span, observer, machine, scale, logged, self._sources(stage)), machine

    def _run(self, stage: str, span: _Span) -> float:
        """Run a stage; returns how many times larger its data is than what was read of it."""
        sampled, scale = _sampled(self._corpus, stage, span, self._recipe.data.holdout)
        recipe = self._recipe.model_copy(update={stage: span.section})
        RUN[stage](Context(recipe, sampled, self._console, elsewhere=self._elsewhere))
        return scale

    def _sources(self, stage: str) -> tuple[str, ...]:
        """What is said of the models a stage started from."""
        started = [s for s in _starts_from(self._recipe, stage) if s not in self._elsewhere]
        return tuple(f"{earlier} is not finished in the run's folder and was run for one step" for earlier in started)


def _starts_from(recipe: Recipe, stage: str) -> list[str]:
    """The stages of the recipe whose models a stage may ask for."""
    wanted = ("sft", "reward") if STAGES[stage].data == "prompts" else ("sft",)
    return [s for s in wanted if s != stage and getattr(recipe, s) is not None]


def _span(section: Any, *, steps: int, warm_up: int) -> _Span:
    """The section with so many steps in all. Rejection sampling is measured in whole cycles, one of them warming up."""
    total = steps + warm_up
    if isinstance(section, RFTConfig):
        cycle = section.improve_steps
        note = f"one cycle of {cycle} iterations is measured behind one that warms up"
        return _Span(section.model_copy(update={"cycles": 2}), cycle, cycle, (note,))
    if isinstance(section, RolloutFields):
        changes: dict[str, Any] = {
            "episodes": total * section.prompts_per_step * section.samples_per_prompt, "kl_budget": None,
        }  # fmt: skip
        if isinstance(section, PPOConfig):
            changes["value_warmup"] = 0
        return _Span(section.model_copy(update=changes), warm_up, steps)
    assert isinstance(section, OfflineFields)
    changes = {"max_steps": total, "epochs": max(total, section.epochs)}
    return _Span(section.model_copy(update=changes), warm_up, steps)


def _sampled(corpus: Corpus, stage: str, span: _Span, holdout: float) -> tuple[Corpus, float]:
    """As much of each part as the iterations need twice over, drawn evenly; and how many times larger the part is that
    the stage learns from."""
    section = span.section
    if isinstance(section, RFTConfig):
        if section.prompts_per_cycle is None:
            return corpus, 1.0
        a_step = section.prompts_per_cycle
    else:
        a_step = section.prompts_per_step if isinstance(section, RolloutFields) else section.batch_size
    limit = max(LEAST_GROUPS, int(2 * a_step * (span.steps + span.warm_up) / (1 - holdout)))
    parts = {name: getattr(corpus, name) for name in ("sft", "preferences", "prompts", "ptx")}
    sampled = {name: _some(part, limit) for name, part in parts.items()}
    order = {"demonstrations": ("sft", "preferences"), "prompts": ("prompts", "preferences", "sft")}
    learned = next(n for n in order.get(STAGES[stage].data, ("preferences",)) if parts[n].groups or n == "preferences")
    scale = len(parts[learned].groups) / max(1, len(sampled[learned].groups))
    return replace(corpus, **sampled), scale


def _some(part: Part, limit: int) -> Part:
    if len(part.groups) <= limit:
        return part
    chosen = sorted(permutation(len(part.groups), "profile")[:limit])
    return replace(part, groups=tuple(part.groups[i] for i in chosen))


@contextmanager
def _own_cache(folder: Path) -> Iterator[None]:
    """Reference log-probabilities of models that nobody keeps must be computed, and not be kept."""
    before = os.environ.get("ACCORD_CACHE")
    os.environ["ACCORD_CACHE"] = str(folder)
    try:
        yield
    finally:
        if before is None:
            del os.environ["ACCORD_CACHE"]
        else:
            os.environ["ACCORD_CACHE"] = before


# --- from what was observed to a profile -----------------------------------------------------------------------------


def _stage_profile(
    stage: str,
    span: _Span,
    observer: Observer,
    machine: Machine,
    scale: float,
    logged: Sequence[Mapping[str, float]],
    notes: tuple[str, ...],
) -> StageProfile:
    tell_idle_tokens(observer.iterations, logged)
    seconds, works = observer.clock.iterations, observer.iterations
    measured = [_measured(seconds[i], works[i] if i < len(works) else {}) for i in range(len(seconds))]
    rare = rare_phases(span.section, scale)
    means = per_iteration(measured, span.warm_up, rare)
    rows, update, total = rows_of(means, peak=machine.peak, moved=machine.moved)
    steady = measured[span.warm_up :]
    usual = [sum(m.seconds for name, m in iteration.items() if name not in rare) for iteration in steady]
    seldom = sum(means[name].seconds for name in rare if name in means)
    once = {name: s * (scale if name in ("reference", "data") else 1) for name, s in observer.clock.outside[0].items()}
    sampled = (
        (f"a sample of the data was used; what depends on its size is scaled by {scale:.3g}",) if scale > 1 else ()
    )
    return StageProfile(
        stage=stage,
        iterations=len(steady),
        seconds=total.seconds,
        fastest=min(usual) + seldom,
        slowest=max(usual) + seldom,
        rows=rows,
        update=update,
        total=total,
        once=once,
        parameters=observer.parameters,
        trained=observer.trained,
        notes=(*span.notes, *notes, *sampled),
    )


def rare_phases(section: Any, scale: float) -> dict[str, float]:
    """What share of a checkpoint and of an evaluation an iteration bears; one of all of the data takes `scale` times as
    long as one of the sample."""
    evaluation = {EVALUATION: scale / section.eval_every} if isinstance(section, OfflineFields) else {}
    return {CHECKPOINT: 1 / section.checkpoint_every} | evaluation


def _measured(seconds: Mapping[str, float], works: Mapping[str, Work]) -> dict[str, Measured]:
    nothing = Work()
    made = {}
    for name in seconds.keys() | works.keys():
        work = works.get(name, nothing)
        made[name] = Measured(
            seconds.get(name, 0.0), work.tokens, work.padding, work.useful, work.overhead, work.bytes
        )  # fmt: skip
    return made


def tell_idle_tokens(works: Sequence[dict[str, Work]], logged: Sequence[Mapping[str, float]]) -> None:
    """A sampler goes on with finished rows for a while; what it logged says how many tokens were really wanted. The
    first token of an answer comes from its prompt's pass, so each answer takes one pass less than it has tokens."""
    before = 0.0
    for work, row in zip(works, logged, strict=False):
        samples = row.get("rollout/samples", before) - before
        before += samples
        sampling = work.get("sampling")
        if sampling is None or not sampling.decoded or "rollout/completion_tokens/mean" not in row:
            continue
        wanted = samples * (row["rollout/completion_tokens/mean"] - row.get("rollout/turns/mean", 1.0))
        idle = max(0, sampling.decoded - round(wanted))
        flops = sampling.decoded_flops * idle / sampling.decoded
        sampling.tokens -= idle
        sampling.padding += idle
        sampling.useful -= flops
        sampling.overhead += flops


def _logged(file: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in file.read_text(encoding="ascii").splitlines()]


def _machine_line(machine: Machine) -> str:
    model = [product.median / 1e9 for product in machine.model_products]
    reach = f"; the model's own shapes {min(model):.1f} to {max(model):.1f}" if model else ""
    return (
        f"Peak {machine.peak / 1e9:.1f} GFLOP/s ({machine.dtype}, {machine.device}, {machine.threads} threads; median "
        f"of the best shape{reach}); memory moves at {machine.moved / 1e9:.1f} GB/s."
    )


def _json(profile: Profile) -> dict[str, Any]:
    stages = [
        {
            **asdict(stage),
            "machine": {**asdict(machine), "peak": machine.peak},
            "reading": reading(stage, peak=machine.peak),
        }
        for stage, machine in zip(profile.stages, profile.machines, strict=True)
    ]
    return {"environment": environment(), "stages": stages}
