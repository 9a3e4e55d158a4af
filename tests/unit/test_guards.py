"""The guards on made-up streams of metrics: what fires, what does not, how soon, and what survives a restart."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from typing import Any, get_args

import pytest

from accord.config import GuardName, GuardsConfig, recipe_from
from accord.errors import ConfigError
from accord.guards import GUARDS, GuardMonitor, Track, Verdict, guard_account
from accord.metrics import METRICS

STEPS = 20
Stream = dict[str, Callable[[int], float]]


def config(**keys: Any) -> GuardsConfig:
    return GuardsConfig.model_validate(keys)


def watched(stream: Stream, steps: Iterable[int] = range(1, STEPS + 1), **keys: Any) -> list[Verdict]:
    monitor = GuardMonitor(config(**keys))
    return [v for step in steps for v in monitor.observe(step, {name: f(step) for name, f in stream.items()})]


def alerted(verdicts: list[Verdict]) -> set[str]:
    return {v.guard for v in verdicts if v.level == "ALERT"}


def wobble(step: int) -> float:
    """Noise in -1 ... 1 that goes nowhere."""
    return (step * 7 % 11 - 5) / 5


def ramp(start: float, end: float, begin: int = 6, length: int = 8) -> Callable[[int], float]:
    """From `start` to `end` over `length` steps after step `begin`."""
    return lambda step: start + (end - start) * min(1.0, max(0.0, (step - begin) / length))


# For each guard: a stream that must raise it, and one that looks alike and must not.
BAD: dict[str, Stream] = {
    "kl": {"rollout/kl_per_sequence_nats": ramp(0, 100)},
    "length": {"rollout/completion_tokens/mean": ramp(12, 40)},
    "word": {"rollout/word_rise": ramp(0.1, 0.95)},
    "repetition": {"rollout/repetition": ramp(0.01, 0.5)},
    "diversity": {"rollout/distinct_2": ramp(0.5, 0.05)},
    "entropy": {"rollout/entropy_nats": ramp(1.0, 0.05)},
    "duplicates": {"rollout/duplicate_fraction": ramp(0.05, 0.9)},
    "ceiling": {"rollout/ceiling_fraction": ramp(0.02, 1.0)},
    "disagreement": {"rollout/ensemble_std": ramp(0.2, 1.0)},
    "outliers": {"rollout/outlier_fraction": ramp(0.01, 0.9)},
    "holdout": {
        "rollout/score/mean": ramp(0, 3),
        "rollout/holdout_score/mean": lambda step: ramp(1, -1)(step) + 0.05 * wobble(step),
    },
    "likelihood": {"train/chosen_logprob/mean": ramp(-20, -60), "train/margin/mean": ramp(0, 5)},
    "overfit": {"train/loss": ramp(1, 0.1), "eval/loss": ramp(1, 2)},
}
FINE: dict[str, Stream] = {
    "kl": {"rollout/kl_per_sequence_nats": ramp(0, 5)},
    "length": {"rollout/completion_tokens/mean": lambda step: 12 + wobble(step)},
    "word": {"rollout/word_rise": lambda step: 0.15 + 0.05 * wobble(step)},
    "repetition": {"rollout/repetition": lambda step: 0.02 + 0.01 * wobble(step)},
    "diversity": {"rollout/distinct_2": ramp(0.5, 0.45), "rollout/self_similarity": ramp(0.1, 0.15)},
    "entropy": {"rollout/entropy_nats": ramp(1.0, 0.8)},
    "duplicates": {"rollout/duplicate_fraction": lambda step: 0.3 + 0.05 * wobble(step)},
    "ceiling": {"rollout/ceiling_fraction": lambda step: 0.1 + 0.05 * wobble(step)},
    "disagreement": {"rollout/ensemble_std": ramp(0.2, 0.22)},
    "outliers": {"rollout/outlier_fraction": lambda step: 0.02 + 0.02 * wobble(step)},
    "holdout": {
        "rollout/score/mean": ramp(0, 3),
        "rollout/holdout_score/mean": lambda step: ramp(0, 2)(step) + 0.05 * wobble(step),
    },
    "likelihood": {"train/chosen_logprob/mean": ramp(-20, -21), "train/margin/mean": ramp(0, 5)},
    "overfit": {"train/loss": ramp(1, 0.5), "eval/loss": ramp(1, 0.6)},
}


def test_every_guard_has_a_name_in_the_recipe_and_watches_declared_metrics() -> None:
    assert tuple(GUARDS) == get_args(GuardName) == tuple(BAD) == tuple(FINE)
    assert [name for guard in GUARDS.values() for name in guard.watches if name not in METRICS] == []


@pytest.mark.parametrize("name", GUARDS)
def test_each_guard_raises_an_alert_after_a_warning_and_says_what_to_do(name: str) -> None:
    verdicts = [v for v in watched(BAD[name]) if v.guard == name]
    assert verdicts[0].level == "OK"
    assert verdicts[-1].level == "ALERT"
    assert all(len(v.advice) > 30 for v in verdicts[1:])
    assert all((0 if name == "holdout" else 6) < v.begun <= v.step for v in verdicts[1:])


@pytest.mark.parametrize("name", GUARDS)
def test_no_guard_warns_of_what_is_ordinary(name: str) -> None:
    assert [(v.guard, v.level) for v in watched(FINE[name]) if v.level != "OK"] == []


def test_the_second_judge_does_not_alarm_where_the_score_does_not_rise_either() -> None:
    both = BAD["holdout"] | {"rollout/score/mean": ramp(0, -3)}
    assert alerted(watched(both)) == set()


def test_the_second_judges_fall_began_at_its_best_and_not_where_it_was_noticed() -> None:
    judge = {"rollout/holdout_score/mean": lambda step: (step if step < 9 else 17 - step) + 0.01 * wobble(step)}
    verdicts = [v for v in watched({"rollout/score/mean": float} | judge, window=1) if v.level == "ALERT"]
    assert verdicts[0].begun == 9
    assert verdicts[0].step > verdicts[0].begun + 1


def test_desirable_answers_that_become_unlikely_are_seen_without_pairs() -> None:
    kto = {"train/desirable_logprob/mean": ramp(-20, -60), "train/accuracy": ramp(0.5, 0.9)}
    assert alerted(watched(kto)) == {"likelihood"}
    assert alerted(watched(kto | {"train/accuracy": ramp(0.5, 0.4)})) == set()


def test_shorter_answers_are_a_drift_too() -> None:
    assert alerted(watched({"rollout/completion_tokens/mean": ramp(30, 8)})) == {"length"}


def test_a_guard_without_its_metrics_says_nothing() -> None:
    assert watched({"train/loss": ramp(1, 0)}) == []


def test_one_odd_evaluation_changes_nothing_and_a_level_must_last_to_be_left() -> None:
    spike = {"rollout/ceiling_fraction": lambda step: 1.0 if step == 8 else 0.1}
    assert alerted(watched(spike, window=1, patience=2)) == set()
    pulse = {"rollout/ceiling_fraction": lambda step: 1.0 if 8 <= step < 13 and step != 10 else 0.1}
    told = [(v.step, v.was, v.level) for v in watched(pulse, window=1, patience=2)]
    assert told == [(3, None, "OK"), (9, "OK", "ALERT"), (14, "ALERT", "OK")]


def test_rollouts_and_fixed_data_have_windows_of_their_own() -> None:
    """A metric is read once its window is full: by default 5 rollouts, and 3 of anything else."""
    both = FINE["length"] | {"train/entropy_nats": ramp(1.0, 0.8)}
    assert {v.guard: v.step for v in watched(both)} == {"length": 5, "entropy": 3}
    assert {v.guard: v.step for v in watched(both, window=4, fixed_window=7)} == {"length": 4, "entropy": 7}


def test_answers_may_become_shorter_by_more_than_they_may_become_longer() -> None:
    assert alerted(watched({"rollout/completion_tokens/mean": ramp(12, 12 * 1.5)})) == {"length"}
    assert alerted(watched({"rollout/completion_tokens/mean": ramp(12, 12 / 1.5)})) == set()
    assert alerted(watched({"rollout/completion_tokens/mean": ramp(12, 12 / 2.5)})) == {"length"}


def test_a_guard_that_is_alarmed_from_its_first_reading_on_needs_as_many_as_any_other() -> None:
    told = [(v.step, v.level) for v in watched({"rollout/ceiling_fraction": lambda step: 0.9}, window=3, patience=3)]
    assert told == [(3, "OK"), (5, "ALERT")]


def test_a_guard_that_is_alarmed_from_its_first_reading_on_suspects_all_that_the_reading_sums_up() -> None:
    late = {"rollout/kl_per_sequence_nats": lambda step: 60.0 if step > 1 else 0.0}
    (verdict,) = (v for v in watched(late, window=4, baseline=1, patience=2) if v.level == "ALERT")
    assert (verdict.step, verdict.begun) == (5, 1)
    monitor = GuardMonitor(config(window=4, baseline=1))
    assert [monitor.observe(step, {"rollout/kl_per_sequence_nats": 60.0}) for step in (1, 2)] == [[], []]
    assert monitor.earliest(2) == 1  # so that the checkpoint from before it is kept


@pytest.mark.parametrize(
    ("key", "limits", "expected"),
    [
        ("kl_nats", [20, 10], "the second above the first"),
        ("kl_nats", [-2, -1], "both above 0"),
        ("holdout_drop", [1, 1], "the second above the first"),
        ("length_ratio", [0.1, 1.4], "neither limit may be below it"),
    ],
)
def test_limits_that_would_switch_a_guard_off_are_refused(key: str, limits: list[float], expected: str) -> None:
    with pytest.raises(ConfigError, match=rf"guards\.{key}.*{expected}"):
        recipe_from({"guards": {key: limits}})


def test_a_level_rises_only_as_far_as_the_readings_agree() -> None:
    steps = {"rollout/ceiling_fraction": lambda step: {8: 0.7, 9: 0.9, 10: 0.9}.get(step, 0.1)}
    told = [(v.step, v.level) for v in watched(steps, range(1, 11), window=1, patience=2)]
    assert told == [(3, "OK"), (9, "WARN"), (10, "ALERT")]


def test_held_out_metrics_are_counted_where_they_were_measured() -> None:
    """Three training steps between evaluations: the guard is asked at evaluations, so that patience counts those."""
    monitor = GuardMonitor(config(patience=2, fixed_window=1, baseline=1))
    asked = []
    for step in range(1, 16):
        row = {"train/loss": 1.0 / step} | ({"eval/loss": 1.0 + 0.1 * step} if step % 3 == 0 else {})
        asked += [(v.step, v.level) for v in monitor.observe(step, row)]
    assert asked == [(3, "OK"), (9, "ALERT")]


@pytest.mark.parametrize("cut", (2, 7, 9, 12))
def test_restored_from_its_state_the_monitor_gives_the_same_verdicts(cut: int) -> None:
    stream = {name: f for one in BAD.values() for name, f in one.items()}
    whole = watched(stream)
    first = GuardMonitor(config())
    told = [v for s in range(1, cut + 1) for v in first.observe(s, {name: f(s) for name, f in stream.items()})]
    second = GuardMonitor(config())
    second.restore(json.loads(json.dumps(first.state())))
    for s in range(cut + 1, STEPS + 1):
        told += second.observe(s, {name: f(s) for name, f in stream.items()})
    assert told == whole
    assert second.alerts() and alerted(whole) == set(GUARDS)


def test_guards_that_are_off_do_not_watch_and_acknowledged_ones_do_not_alarm() -> None:
    stream = BAD["length"] | BAD["entropy"]
    assert alerted(watched(stream, off=["length"])) == {"entropy"}
    monitor = GuardMonitor(config(acknowledge=["length"]))
    for step in range(1, STEPS + 1):
        monitor.observe(step, {name: f(step) for name, f in stream.items()})
    assert list(monitor.alerts()) == ["entropy"]


def test_noise_is_told_from_a_trend() -> None:
    """x = 3t has differences of 3, so sigma^2 = 9 / 2; +-1 in turn has differences of 2, so sigma^2 = 4 / 2. The mean
    of a window of 4 has a quarter of that variance."""
    trend, noise = Track(), Track()
    for t in range(10):
        trend.add(t, 3.0 * t, baseline=3, window=4)
        noise.add(t, (-1.0) ** t, baseline=3, window=4)
    assert trend.standard_error == pytest.approx((9 / 2 / 4) ** 0.5)
    assert noise.standard_error == pytest.approx((4 / 2 / 4) ** 0.5)
    assert (trend.start, trend.now, trend.high, trend.high_at, trend.low) == (3.0, 22.5, 22.5, 9, 4.5)


def test_the_account_keeps_the_worst_of_each_guard_and_how_it_ended() -> None:
    rows = [
        {"step": 3, "guard": "length", "level": "OK", "seen": "a", "advice": ""},
        {"step": 5, "guard": "length", "level": "ALERT", "seen": "b", "advice": "c"},
        {"step": 9, "guard": "length", "level": "OK", "seen": "d", "advice": ""},
        {"step": 9, "ended": "why"},
    ]
    (row,) = guard_account(rows)
    assert (row["worst"], row["step"], row["at_end"], row["seen"], row["advice"]) == ("ALERT", 5, "OK", "b", "c")


def test_a_guard_that_does_not_exist_is_named(tmp_path: Any) -> None:
    with pytest.raises(ConfigError, match=r"guards\.off"):
        recipe_from({"guards": {"off": ["lenght"]}})
