"""The guards: what each one watches, what it sees, and what to do about it. Each is a pure function of the tracks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from accord.config import GuardName, GuardsConfig
from accord.guards.tracks import Track, View

__all__ = ["GUARDS", "JUDGES", "Guard", "Reading"]

Limits = tuple[float, float]
JUDGES = ("rollout/holdout_score/mean", "rollout/gold_utility/mean")  # not trained on
_GOOD_ANSWERS = (
    "eval/chosen_logprob/mean",
    "eval/desirable_logprob/mean",
    "train/chosen_logprob/mean",
    "train/desirable_logprob/mean",
)


@dataclass(frozen=True, slots=True)
class Reading:
    """What a guard sees at one evaluation: how far it has gone, and in words. WARN from 1, ALERT from 2.

    begun  the step at which it began, where the guard knows better than by when it first warned
    """

    alarm: float
    seen: str
    begun: int | None = None


@dataclass(frozen=True, slots=True)
class Guard:
    """One alarm.

    title    what it is called for people
    watches  the metrics it needs; any of a tuple will do, the first that is logged is taken
    read     what it sees; None while there is nothing to say
    advice   what to do about an ALERT
    """

    title: str
    watches: tuple[str, ...]
    read: Callable[[View, GuardsConfig], Reading | None]
    advice: str


def _alarm(value: float, limits: Limits) -> float:
    """0 at nothing, 1 at the WARN limit, 2 at the ALERT limit, straight in between and beyond."""
    warn, alert = limits
    if value <= warn:
        return max(0.0, value / warn)
    return 1 + (value - warn) / (alert - warn)


def _limits(limits: Limits, form: str) -> str:
    return f"(WARN from {form.format(limits[0])}, ALERT from {form.format(limits[1])})"


def _worst(*readings: Reading | None) -> Reading | None:
    there = [reading for reading in readings if reading is not None]
    return max(there, key=lambda reading: reading.alarm, default=None)


# --- how far the policy went -----------------------------------------------------------------------------------------


def _kl(view: View, config: GuardsConfig) -> Reading | None:
    track = view.of("rollout/kl_per_sequence_nats", "eval/kl_per_sequence_nats")
    if track is None:
        return None
    limits = config.kl_nats
    seen = f"the policy is {track.now:.1f} nats per answer from the reference {_limits(limits, '{:g} nats')}"
    return Reading(_alarm(track.now, limits), seen)


def _entropy(view: View, config: GuardsConfig) -> Reading | None:
    track = view.of("rollout/entropy_nats", "train/entropy_nats")
    if track is None or track.start <= 0:
        return None
    return _lost(track, config.entropy_loss, "entropy is {now:.3f} nats per token, {start:.3f} at the beginning")


def _lost(track: Track, limits: Limits, words: str) -> Reading:
    loss = 1 - track.now / track.start
    told = words.format(now=track.now, start=track.start)
    return Reading(_alarm(loss, limits), f"{told}: {max(0.0, loss):.0%} lost {_limits(limits, '{:.0%}')}")


def _risen(track: Track | None, limits: Limits, words: str) -> Reading | None:
    if track is None:
        return None
    rise = track.now - track.start
    told = words.format(now=track.now, start=track.start)
    return Reading(_alarm(rise, limits), f"{told} {_limits(limits, 'a rise of {:.0%}')}")


# --- what the answers have become ------------------------------------------------------------------------------------


def _length(view: View, config: GuardsConfig) -> Reading | None:
    track = view.of("rollout/completion_tokens/mean")
    if track is None or track.start <= 0 or track.now <= 0:
        return None
    longer = track.now >= track.start
    drift = track.now / track.start if longer else track.start / track.now
    words, limits = ("longer", config.length_ratio) if longer else ("shorter", config.shorter_ratio)
    paid = view.of("rollout/length_correlation")
    paying = f", and the score correlates {paid.now:+.2f} with length" if paid is not None else ""
    seen = (
        f"answers are {track.now:.1f} tokens on average, {drift:.2f} times {words} than the {track.start:.1f} at the "
        f"beginning{paying} {_limits(limits, '{:g} times')}"
    )
    return Reading(_alarm(drift - 1, (limits[0] - 1, limits[1] - 1)), seen)


def _word(view: View, config: GuardsConfig) -> Reading | None:
    track, limits = view.of("rollout/word_rise"), config.word_rise
    if track is None:
        return None
    seen = (
        f"one word stands in {track.now:.0%} more of the answers than before training {_limits(limits, '{:.0%} more')}"
    )
    return Reading(_alarm(track.now, limits), seen)


def _repetition(view: View, config: GuardsConfig) -> Reading | None:
    limits = config.repetition_rise
    return _worst(
        _risen(view.of("rollout/repetition"), limits, "{now:.1%} of an answer's 3-grams repeat, {start:.1%} before"),
        _risen(
            view.of("rollout/truncated_fraction"),
            (3 * limits[0], 3 * limits[1]),
            "{now:.1%} of the answers are cut by the length limit, {start:.1%} before",
        ),
    )


def _diversity(view: View, config: GuardsConfig) -> Reading | None:
    limits = config.diversity_loss
    distinct, alike = view.of("rollout/distinct_2"), view.of("rollout/self_similarity")
    readings: list[Reading | None] = []
    if distinct is not None and distinct.start > 0:
        readings.append(_lost(distinct, limits, "distinct 2-grams are {now:.1%} of all, {start:.1%} at the beginning"))
    if alike is not None and alike.start < 1:
        loss = 1 - (1 - alike.now) / (1 - alike.start)
        seen = (
            f"samples of one prompt share {alike.now:.0%} of their 2-grams, {alike.start:.0%} at the beginning: "
            f"{max(0.0, loss):.0%} of their variety lost {_limits(limits, '{:.0%}')}"
        )
        readings.append(Reading(_alarm(loss, limits), seen))
    return _worst(*readings)


def _duplicates(view: View, config: GuardsConfig) -> Reading | None:
    words = "{now:.1%} of the answers were given to another prompt too, word for word; {start:.1%} at the beginning"
    return _risen(view.of("rollout/duplicate_fraction"), config.duplicate_rise, words)


# --- what the reward says of them ------------------------------------------------------------------------------------


def _ceiling(view: View, config: GuardsConfig) -> Reading | None:
    track, limits = view.of("rollout/ceiling_fraction"), config.ceiling
    if track is None:
        return None
    seen = f"{track.now:.0%} of the scores are the highest there is, or clipped {_limits(limits, '{:.0%}')}"
    return Reading(_alarm(track.now, limits), seen)


def _disagreement(view: View, config: GuardsConfig) -> Reading | None:
    track, limits = view.of("rollout/ensemble_std"), config.disagreement_ratio
    if track is None or track.start <= 0:
        return None
    ratio = track.now / track.start
    seen = (
        f"the reward models of the ensemble differ by {track.now:.3f}, {ratio:.2f} times as much as at the beginning "
        f"{_limits(limits, '{:g} times')}"
    )
    return Reading(_alarm(ratio - 1, (limits[0] - 1, limits[1] - 1)), seen)


def _outliers(view: View, config: GuardsConfig) -> Reading | None:
    words = "{now:.1%} of the answers look to the reward model unlike those before training, {start:.1%} at first"
    return _risen(view.of("rollout/outlier_fraction"), config.outlier_rise, words)


def _holdout(view: View, config: GuardsConfig) -> Reading | None:
    """The judge's fall from its best, in standard errors of the difference of two windows."""
    proxy = view.of("rollout/score/mean")
    judge = view.of(*JUDGES)
    if proxy is None or judge is None or judge.high is None or proxy.now <= proxy.start:
        return None
    error = judge.standard_error * 2**0.5
    fall = judge.high - judge.now
    drop = fall / error if error > 0 else 0.0
    limits = config.holdout_drop
    seen = (
        f"the judge that is not trained on fell from {judge.high:+.3f} to {judge.now:+.3f}, {drop:.1f} standard "
        f"errors, while the score rose from {proxy.start:+.3f} to {proxy.now:+.3f} {_limits(limits, '{:g}')}"
    )
    return Reading(_alarm(drop, limits), seen, begun=judge.high_at)


# --- fixed data ------------------------------------------------------------------------------------------------------


def _likelihood(view: View, config: GuardsConfig) -> Reading | None:
    good = view.of(*_GOOD_ANSWERS)
    learned = view.of("train/margin/mean", "train/accuracy")
    if good is None or learned is None or good.start >= 0 or learned.now <= learned.start:
        return None
    loss, limits = good.now / good.start - 1, config.likelihood_loss
    seen = (
        f"the log-probability of good answers fell from {good.start:.1f} to {good.now:.1f} nats while they are told "
        f"from the others better and better: the policy leaves both {_limits(limits, 'a loss of {:.0%}')}"
    )
    return Reading(_alarm(loss, limits), seen)


def _overfit(view: View, config: GuardsConfig) -> Reading | None:
    held_out, train = view.of("eval/loss"), view.of("train/loss")
    if held_out is None or train is None or held_out.low is None or held_out.low <= 0 or train.now >= train.start:
        return None
    rise, limits = held_out.now / held_out.low - 1, config.overfit
    seen = (
        f"the held-out loss is {held_out.now:.4f}, {rise:.1%} above its lowest, while the training loss fell from "
        f"{train.start:.4f} to {train.now:.4f} {_limits(limits, '{:.0%}')}"
    )
    return Reading(_alarm(rise, limits), seen)


GUARDS: Mapping[GuardName, Guard] = MappingProxyType(
    {
        "kl": Guard(
            "distance from the reference", ("rollout/kl_per_sequence_nats", "eval/kl_per_sequence_nats"), _kl,
            "Raise kl_coef, lower learning_rate, or stop here: what is gained far from the reference is rarely real.",
        ),
        "length": Guard(
            "length", ("rollout/completion_tokens/mean", "rollout/length_correlation"), _length,
            "Read samples.jsonl: are the answers better, or only longer? If only longer, penalise length in the "
            "reward, or train the reward model on pairs of equal length.",
        ),
        "word": Guard(
            "a word that takes over", ("rollout/word_rise",), _word,
            "Read samples.jsonl and find the word: if it makes no answer better, the reward pays for it, and new "
            "comparisons with and without it teach the reward model not to.",
        ),
        "repetition": Guard(
            "repetition", ("rollout/repetition", "rollout/truncated_fraction"), _repetition,
            "Read samples.jsonl. Raise missing_eos_penalty or kl_coef, or penalise repetition in the reward.",
        ),
        "diversity": Guard(
            "variety", ("rollout/distinct_2", "rollout/self_similarity"), _diversity,
            "Raise kl_coef or entropy_coef, or lower learning_rate; more samples of one answer teach nothing new.",
        ),
        "entropy": Guard(
            "entropy", ("rollout/entropy_nats", "train/entropy_nats"), _entropy,
            "Raise entropy_coef or kl_coef, or lower learning_rate: the policy hardly explores any more.",
        ),
        "duplicates": Guard(
            "stock answers", ("rollout/duplicate_fraction",), _duplicates,
            "Read samples.jsonl: a stock answer that scores well whatever was asked shows a reward that does not read "
            "the prompt.",
        ),
        "ceiling": Guard(
            "scores at their ceiling", ("rollout/ceiling_fraction",), _ceiling,
            "The reward no longer tells good from better: stop here, raise score_clip, or use a finer reward.",
        ),
        "disagreement": Guard(
            "disagreement of the ensemble", ("rollout/ensemble_std",), _disagreement,
            "The reward models are no longer sure of these answers: weigh the spread into the reward, or have people "
            "compare such answers and train the reward models again.",
        ),
        "outliers": Guard(
            "answers unknown to the reward model", ("rollout/outlier_fraction",), _outliers,
            "The reward model judges text unlike what it learned from: have people compare such answers and train it "
            "again, or raise kl_coef.",
        ),
        "holdout": Guard(
            "score up, second judge down",
            ("rollout/score/mean", *JUDGES), _holdout,
            "The reward is being gamed: keep the weights from before the fall, and mend the reward before going on.",
        ),
        "likelihood": Guard(
            "likelihood of the good answers",
            (*_GOOD_ANSWERS, "train/margin/mean", "train/accuracy"),
            _likelihood,
            "Raise beta, lower learning_rate, stop earlier, or add an SFT term (sft_coef of dpo).",
        ),
        "overfit": Guard(
            "held-out loss up, training loss down", ("train/loss", "eval/loss"), _overfit,
            "The model memorises: stop earlier, take fewer epochs, a lower learning_rate, or more data.",
        ),
    }
)  # fmt: skip
