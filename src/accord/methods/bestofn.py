"""Best-of-n: sample n answers to each prompt and keep the one that scores best. Nothing is trained.

What it leaves in its folder: `best.jsonl` (demonstrations: each prompt with its best finished answer), `ranked.jsonl`
(each prompt with its different answers, scored and ranked) and `chunks/` (every sample, as they were drawn). The
summary has the curve of the expected score against n, for every n up to the one asked for.

The sampled prompts are cut into chunks. A chunk is a function of the policy and the key, and is on disk when its step
ends, so an interrupted stage redoes at most one.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from accord.atomic import make_folder, write_text
from accord.config import BestOfNConfig, run_identity
from accord.data.convert import writing
from accord.data.formats_lists import dense_ranks
from accord.errors import RewardError
from accord.measures.text import distinct_n, repetition
from accord.methods.bestofn_account import Judged, bestofn_summary
from accord.methods.candidates import Drawing, draw
from accord.methods.context import Context, LoadedPolicy, data_note, run_stage, weights_hash
from accord.methods.judges import judges_of
from accord.methods.roles import sampler_of, starting_model, step_prompts
from accord.methods.rollouts import Prompt
from accord.records import Completion, Group, Message
from accord.rollout.sampling import Sampling
from accord.training.environment import peak_memory_mb
from accord.training.loop import Captured, StepOutcome, run_training
from accord.training.runfolder import RunFolder

__all__ = ["BestOfNSampling", "Chunk", "run_bestofn", "write_best", "write_ranked"]

CHUNK_COMPLETIONS = 512  # so many are sampled, scored and written at a time, or the n of one prompt


@dataclass(frozen=True, slots=True)
class Chunk:
    """What was sampled for some prompts, n a prompt: one row of each field a prompt, as in `Candidates`. `gold` is None
    without one."""

    texts: list[list[str]]
    tokens: list[list[int]]
    finished: list[list[bool]]
    scores: list[list[float]]
    rewards: list[list[float]]
    usable: list[list[bool]]
    gold: list[list[float]] | None


class BestOfNSampling:
    """One step is one chunk; see `accord.training.loop.Trainer`. Its state is the files under `folder`."""

    stage = "bestofn"
    checkpoint_every, keep_checkpoints = 1, 2

    def __init__(
        self, drawing: Drawing, prompts: Sequence[Prompt], section: BestOfNConfig, folder: Path, seed: int
    ) -> None:
        size = max(1, CHUNK_COMPLETIONS // section.n)
        self._chunks = [prompts[start : start + size] for start in range(0, len(prompts), size)]
        self.total_steps = len(self._chunks)
        self._drawing, self._section, self._folder, self._seed = drawing, section, folder, seed
        make_folder(folder)

    def step(self, step: int) -> StepOutcome:
        """Sample and score one chunk, and make it durable."""
        started = time.monotonic()
        drawn, scoring = self._make(step)
        seconds = time.monotonic() - started
        metrics = (
            _metrics(drawn)
            | scoring
            | {
                "rollout/prompts": sum(len(chunk) for chunk in self._chunks[:step]),
                "rollout/samples": self._section.n * sum(len(chunk) for chunk in self._chunks[:step]),
                "system/tokens_per_second": sum(map(sum, drawn.tokens)) / seconds,
                "system/peak_memory_mb": peak_memory_mb(),
            }
        )
        return StepOutcome(metrics, f"score {metrics['rollout/score/mean']:+.2f}")

    def chunk(self, step: int) -> Chunk:
        """What step `step` sampled: from its file, or anew where that is gone."""
        path = self._path(step)
        return Chunk(**json.loads(path.read_bytes())) if path.exists() else self._make(step)[0]

    def capture(self) -> Captured:
        return Captured({})

    def restore(self, captured: Captured) -> None:
        """The chunks are where they were."""

    def _make(self, step: int) -> tuple[Chunk, dict[str, float]]:
        """The chunk, which is then on disk, and how scoring it went."""
        section = self._section
        sampling = Sampling(section.max_new_tokens, section.temperature, stop_ids=self._drawing.template.stop_ids)
        drawn = draw(self._drawing, self._chunks[step - 1], section.n, sampling, section, ("bestofn", self._seed))
        made = Chunk(
            [[request.completion for request in row] for row in drawn.requests],
            [[len(sample.ids) for sample in row] for row in drawn.sampled],
            drawn.finished.tolist(),
            drawn.scores.tolist(),
            drawn.rewards.tolist(),
            drawn.usable.tolist(),
            None if drawn.gold is None else drawn.gold.tolist(),
        )
        write_text(self._path(step), json.dumps(asdict(made)) + "\n")
        return made, drawn.metrics

    def _path(self, step: int) -> Path:
        return self._folder / f"{step:06d}.json"


def run_bestofn(context: Context) -> dict[str, Any]:
    """Sample (or continue, or find finished) the best-of-n stage of this run; returns its summary."""
    section = context.recipe.bestofn
    assert section is not None
    start = starting_model(context, section.init)
    judges = judges_of(context, "bestofn", section)
    part = context.corpus.all_prompts()
    sources = part.sources | weights_hash(start) | judges.sources

    def body(run: RunFolder) -> dict[str, Any]:
        for note in part.notes:
            context.say(note)
        policy = LoadedPolicy.of(context, start)
        prompts = step_prompts(context, policy, section.max_new_tokens)[: section.prompts]
        scorer, _ = judges.scorer(context, section.micro_batch_tokens, policy, run.path)
        drawing = Drawing(sampler_of(context, policy), policy.template, scorer, judges.gold)
        sampling = BestOfNSampling(drawing, prompts, section, run.path / "chunks", context.seed)
        context.say(f"{len(prompts)} prompts x {section.n} answers, in {sampling.total_steps} chunks")
        run_training(sampling, run, context.console, context.recipe.guards)
        chunks = [sampling.chunk(step) for step in range(1, sampling.total_steps + 1)]
        judged = _judged(chunks, [group for group, _ in prompts])
        best = write_best(run.path / "best.jsonl", judged)
        ranked = write_ranked(run.path / "ranked.jsonl", judged)
        context.say(f"{run.path / 'best.jsonl'}: {best} demonstrations; {run.path / 'ranked.jsonl'}: {ranked} rankings")
        summary = bestofn_summary(judged, scorer.name, best, ranked)
        summary["account"] += data_note(part)
        return summary

    settings = {
        "bestofn": run_identity(section),
        "data": context.recipe.data.model_dump(mode="json", include={"holdout", "max_tokens", "max_prompt_tokens"}),
    }
    return run_stage(context, "bestofn", settings=settings, sources=sources, body=body)


def write_best(path: Path, judged: Judged) -> int:
    """Demonstrations: each prompt with its best answer that ended by itself and is not empty; returns how many.

    Of a cut answer SFT would learn to stop in the middle of a sentence.
    """
    count = 0
    with writing(path) as write:
        for group, texts, finished, rewards in zip(
            judged.groups,
            judged.texts,
            (judged.finished & judged.usable).tolist(),
            judged.rewards.tolist(),
            strict=True,
        ):
            usable = [k for k, text in enumerate(texts) if finished[k] and text.strip()]
            if usable:
                best = max(usable, key=lambda k: rewards[k])
                write(Group(group.prompt, (_answer(texts[best]),), reference=group.reference))
                count += 1
    return count


def write_ranked(path: Path, judged: Judged) -> int:
    """Rankings: each prompt with its different answers, best first; returns how many prompts have at least two.

    The scores are those the answers compete with, so cut ones stand where the penalty puts them. Of equal answers the
    best placed counts.
    """
    count = 0
    with writing(path) as write:
        for group, texts, rewards, usable in zip(
            judged.groups, judged.texts, judged.rewards.tolist(), judged.usable.tolist(), strict=True
        ):
            placed: dict[str, float] = {}
            for text, reward, may in zip(texts, rewards, usable, strict=True):
                if may and text.strip():
                    placed[text] = max(reward, placed.get(text, reward))
            answers = sorted(placed.items(), key=lambda item: -item[1])
            if len(answers) >= 2:
                ranks = dense_ranks([-score for _, score in answers])
                completions = tuple(
                    _answer(text, rank=rank, score=score) for (text, score), rank in zip(answers, ranks, strict=True)
                )
                write(Group(group.prompt, completions, reference=group.reference))
                count += 1
    return count


def _answer(text: str, *, rank: int | None = None, score: float | None = None) -> Completion:
    return Completion((Message("assistant", text),), rank=rank, score=score)


def _judged(chunks: Sequence[Chunk], groups: Sequence[Group]) -> Judged:
    """All chunks together, without the prompts of which nothing may be chosen."""

    def joined(name: str) -> list[Any]:
        return [row for chunk in chunks for row in getattr(chunk, name)]

    kept = [p for p, row in enumerate(joined("usable")) if any(row)]
    if not kept:
        raise RewardError("of no prompt there is an answer that could be scored and chosen; see `bestofn.shaping`")

    def table(name: str) -> NDArray[Any]:
        rows = joined(name)
        return np.array([rows[p] for p in kept])

    texts = joined("texts")
    return Judged(
        tuple(groups[p] for p in kept),
        [texts[p] for p in kept],
        table("tokens"),
        table("finished"),
        table("scores"),
        table("rewards"),
        table("usable"),
        table("gold") if chunks[0].gold is not None else None,
    )


def _metrics(drawn: Chunk) -> dict[str, float]:
    texts = [text for row in drawn.texts for text in row]
    finished = np.array(drawn.finished)
    metrics = {
        "rollout/completion_tokens/mean": float(np.mean(drawn.tokens)),
        "rollout/finished_fraction": float(finished.mean()),
        "rollout/truncated_fraction": float((~finished).mean()),
        "rollout/repetition": sum(map(repetition, texts)) / len(texts),
        "rollout/distinct_2": distinct_n(texts, 2),
    }
    if drawn.gold is not None:
        metrics["rollout/gold_utility/mean"] = float(np.mean(drawn.gold))
        metrics["rollout/gold_utility/std"] = float(np.std(drawn.gold))
    return metrics
