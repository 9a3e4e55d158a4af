"""The stage of rejection-sampling fine-tuning: who plays which role, training, and the account of what happened."""

from __future__ import annotations

from typing import Any

from accord.config import RFTConfig, run_identity
from accord.errors import ConfigError
from accord.methods.candidates import Drawing
from accord.methods.card import model_card
from accord.methods.context import Context, LoadedPolicy, data_note, headline, run_stage, weights_hash
from accord.methods.judges import judges_of
from accord.methods.rft import RFTTrainer
from accord.methods.roles import sampler_of, sampling_layout, starting_model, step_prompts
from accord.report.reading import read_run
from accord.training.loop import run_training
from accord.training.runfolder import RunFolder

__all__ = ["run_rft"]


def run_rft(context: Context) -> dict[str, Any]:
    """Train (or continue, or find finished) the RFT stage of this run; returns its summary."""
    section = context.recipe.rft
    assert section is not None
    start = starting_model(context, section.init)
    judges = judges_of(context, "rft", section)
    part = context.corpus.all_prompts()
    sources = part.sources | weights_hash(start) | judges.sources

    def body(run: RunFolder) -> dict[str, Any]:
        for note in part.notes:
            context.say(note)
        policy = LoadedPolicy.to_train(context, start, "rft")
        prompts = step_prompts(context, policy, section.max_new_tokens)
        if len(prompts) < (section.prompts_per_cycle or 1):
            raise ConfigError(
                f"`rft.prompts_per_cycle` = {section.prompts_per_cycle}, but only {len(prompts)} distinct training "
                "prompts are left: lower it, or give more prompts"
            )
        scorer, _ = judges.scorer(context, section.micro_batch_tokens, policy, run.path)
        sampler = sampler_of(context, policy)
        # A kept completion is an example of its own, as in SFT.
        layout = sampling_layout(context, policy, [t for _, t in prompts], section.max_new_tokens, 1)
        trainer = RFTTrainer(
            policy.model, Drawing(sampler, policy.template, scorer, judges.gold), prompts, section,
            layout=layout, seed=context.seed,
        )  # fmt: skip
        context.say(
            f"{len(prompts)} prompts, {section.cycles} cycles of {trainer.prompts_per_cycle} prompts x "
            f"{section.samples_per_prompt} samples, {section.improve_steps} improvement steps each"
        )
        run_training(trainer, run, context.console, context.recipe.guards)
        summary = _summary(run, section, trainer, scorer.name)
        summary["account"] += data_note(part)
        policy.save(run.path / "model", model_card(context.recipe, "rft", start, sources, summary))
        return summary

    settings = {
        "rft": run_identity(section),
        "data": context.recipe.data.model_dump(mode="json", include={"holdout", "max_tokens", "max_prompt_tokens"}),
    }
    return run_stage(context, "rft", settings=settings, sources=sources, body=body)


def _summary(run: RunFolder, section: RFTConfig, trainer: RFTTrainer, scorer: str) -> dict[str, Any]:
    """Sampling is logged once a cycle, so the last values are those of what the last cycle began with."""
    metrics = read_run(run.path).metrics
    first, last = ({name: points[end][1] for name, points in metrics.items()} for end in (0, -1))
    account = [
        f"In {_count(section.cycles, 'cycle')} the policy wrote {int(last['rollout/samples']):,} answers, scored by "
        f"{scorer}, and imitated {int(last['train/sequences']):,} times one that it kept. The answers of the first "
        f"cycle scored {first['rollout/score/mean']:+.2f} on average"
        + (
            f", those of the last, before its own training, {last['rollout/score/mean']:+.2f}."
            if section.cycles > 1
            else "; how the policy answers after training, an evaluation shows."
        ),
        f"Answers had {first['rollout/completion_tokens/mean']:.1f} tokens in the first cycle and "
        f"{last['rollout/completion_tokens/mean']:.1f} in the last; {last['rollout/finished_fraction']:.1%} of those "
        "ended by themselves.",
    ]
    if "rollout/kept_score/mean" in last:
        account.append(
            f"What was kept scored {first['rollout/kept_score/mean']:+.2f} in the first selection and "
            f"{last['rollout/kept_score/mean']:+.2f} in the last; {last['rollout/kept_distinct_fraction']:.0%} of the "
            "answers selected there were different ones."
        )
    if "rollout/gold_utility/mean" in last:
        account.append(
            f"The true utility, which training never saw, went from {first['rollout/gold_utility/mean']:+.2f} to "
            f"{last['rollout/gold_utility/mean']:+.2f}."
        )
    names = [
        "rollout/score/mean",
        "rollout/kept_score/mean",
        "rollout/kept_fraction",
        "rollout/completion_tokens/mean",
    ]
    return {
        "headline": [headline(name, last[name]) for name in names if name in last],
        "account": account,
        "warnings": _warnings(metrics, trainer),
    }


def _warnings(metrics: Any, trainer: RFTTrainer) -> list[str]:
    """Prompts that tie at first point at the scorer; later on they may be solved."""
    dropped = [value for _, value in metrics["rollout/dropped_prompts"]]
    advice = "Look at what the scorer says of the samples; a higher temperature or more samples give more to choose."
    if min(dropped) == trainer.prompts_per_cycle:
        return [
            "Nothing was learned: every prompt was dropped in every step, because all its answers score the same. The "
            f"model is the one it started from. {advice}"
        ]
    if dropped[0] > trainer.prompts_per_cycle / 2:
        return [
            f"{int(dropped[0])} of {trainer.prompts_per_cycle} prompts were dropped in the first cycle, because all "
            f"their answers score the same. {advice}"
        ]
    return []


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
