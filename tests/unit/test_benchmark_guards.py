"""The guard benchmark: what counts as hacked and as detected, how early, and what stopping keeps, on made-up runs."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from accord.config import GuardsConfig
from benchmarks.guards import (
    Alerted,
    Stream,
    course_of,
    gold_after,
    jobs_of,
    kept_step,
    rates,
    smoothed,
    split_gains,
    standard_error,
)

STEPS = 30


def stream(kind: str, gold: Callable[[int], float], tokens: Callable[[int], float] = lambda _: 12.0) -> Stream:
    names = {"rollout/gold_utility/mean": gold, "rollout/completion_tokens/mean": tokens}
    rows = [{"step": t} | {name: f(t) for name, f in names.items()} for t in range(1, STEPS + 1)]
    return Stream(kind, 0, tuple(rows))


def hill(t: int) -> float:
    """Up to 1 at step 12, then down to -0.8."""
    return t / 12 if t <= 12 else 1 - (t - 12) / 10


def rising(t: int) -> float:
    return t / STEPS


def longer(t: int) -> float:
    return 12.0 + 3 * max(0, t - 8)


def test_the_mean_around_a_step_and_its_error() -> None:
    """Of 0, 1, 0, 1, ...: every difference is 1, so sigma^2 = 1/2, and a mean of five has a fifth of it."""
    values = [float(t % 2) for t in range(10)]
    assert smoothed(values)[0] == pytest.approx(1 / 3) and smoothed(values)[4] == pytest.approx(2 / 5)
    assert standard_error(values) == pytest.approx(math.sqrt(0.5 / 5))


def test_a_run_whose_gold_falls_is_hacked_and_one_whose_gold_rises_with_length_is_not() -> None:
    fallen = course_of(stream("length", hill, longer))
    assert fallen.hacked and fallen.lost is not None and 12 < fallen.lost < 20
    assert not course_of(stream("length", rising, longer)).hacked
    assert course_of(stream("length", lambda t: 0.1 * (t % 2), longer)).hacked  # length rises, gold does not
    assert not course_of(stream("length", lambda t: 0.5)).hacked
    assert not course_of(stream("gold", hill)).hacked  # clean runs are not hacked by definition


def test_rates_count_runs_and_lead_counts_evaluations() -> None:
    streams = [stream("length", hill, longer), stream("length", hill), stream("gold", rising), stream("gold", hill)]
    rows = {row["guard"]: row for row in rates(streams, GuardsConfig.model_validate({}))}
    length = rows["length"]
    assert (length["tpr"], length["fpr"], length["runs_hacked"], length["runs_clean"]) == (0.5, 0.0, 2, 2)
    course = course_of(streams[0])
    alert = next(t for t in range(STEPS) if t > 8 and longer(t - 1) >= 1.4 * 12) + 2
    assert course.lost is not None and abs(length["lead_evals"] - (course.lost - alert)) <= 2
    assert rows["word"]["tpr"] is None  # nothing that it watches was logged
    stop = rates([streams[0], *streams[2:]], GuardsConfig.model_validate({}))[-1]  # the hacked run that it finds
    assert stop["gold_gain_kept_without"] < 0 < stop["gold_gain_kept"] < 1


def test_a_peak_that_is_only_noise_is_none_when_it_is_read_from_the_other_half() -> None:
    """The only rollout that is not 0 is number 10, an even one: found among the even ones it is read as 0 from the odd
    ones, and the odd ones find nothing. On a hill without noise both halves find the top to within a step or two."""
    spike = [7.0 if t == 10 else 0.0 for t in range(20)]
    assert split_gains(spike, 0.0, 3) == [(0.0, 0.0), (0.0, 0.0)]
    kept = split_gains([hill(t) for t in range(STEPS)], 0.0, 6)
    for gain, peak in kept:
        assert gain == pytest.approx(0.5, abs=0.02)
        assert peak == pytest.approx(1 - 0.1, abs=0.1)


def test_the_kept_step_is_a_checkpoint_from_before_the_alarm() -> None:
    """The same cases as the training loop's own in test_watchman: an alarm that began at step 6 and was sure at 8."""
    assert kept_step(Alerted(8, 6), every=2) == 4
    assert kept_step(Alerted(8, 5), every=2) == 2  # the weights after 4 wrote rollout 5
    assert kept_step(Alerted(8, 6), every=100) == kept_step(Alerted(8, 6), every=7) == 0


def test_gold_after_a_step_is_that_of_the_next_rollout() -> None:
    line = stream("length", float)
    assert gold_after(line, 10) == pytest.approx(11)
    assert gold_after(line, STEPS) == gold_after(line, STEPS - 1)


def test_kinds_take_turns_and_seeds_of_tuning_are_others() -> None:
    jobs = jobs_of(2, 3, 0)
    assert len(jobs) == 2 * 4 + 3 * 2 and len({job.name for job in jobs}) == len(jobs)
    assert {job.kind for job in jobs[:6]} == {"length", "word", "repetition", "noisy", "gold", "blurred"}
    models = {job.model for job in jobs if job.model}
    assert not models & {job.model for job in jobs_of(2, 3, 1000)}
