"""The clock of a profile: every second counts once, for the innermost phase."""

from __future__ import annotations

from typing import Any

import pytest

from accord import phases
from accord.phases import EVALUATION, ITERATION, Clock, passing, phase, projecting


class Watch:
    """A time that passes only when told to."""

    def __init__(self) -> None:
        self.time = 100.0

    def __call__(self) -> float:
        return self.time

    def wait(self, seconds: float) -> None:
        self.time += seconds


def test_a_second_counts_for_the_innermost_phase_and_for_other_where_there_is_none() -> None:
    watch = Watch()
    clock = Clock(now=watch)

    @phase("optimiser")
    def update() -> None:
        watch.wait(16)

    watch.wait(1000)  # nobody's: the clock does not run yet
    with clock.running():
        with phase("data"):
            watch.wait(1)
        for _ in range(2):
            with phase(ITERATION):
                watch.wait(2)
                with phase("forward"):
                    watch.wait(4)
                    with phase("backward"):
                        watch.wait(8)
                    update()
                    watch.wait(0.5)
        watch.wait(32)
    each = {"other": 2.0, "forward": 4.5, "backward": 8.0, "optimiser": 16.0}
    assert clock.iterations == [each, each]
    assert [sum(seconds.values()) for seconds in clock.outside] == [1, 0, 32]
    assert clock.outside[0]["data"] == 1


def test_an_evaluation_is_one_phase_whatever_is_within() -> None:
    """Its batches and its passes are no part of what an iteration does every time."""
    watch = Watch()
    clock = Clock(now=watch)
    with clock.running(), phase(ITERATION):
        with phase("data"):
            watch.wait(1)
        with phase(EVALUATION), phase("scoring"):
            with phase("data"):
                watch.wait(2)
            watch.wait(4)
    assert clock.iterations == [{"other": 0.0, "data": 1.0, "evaluation": 6.0}]


def test_an_iteration_that_breaks_off_leaves_its_phases() -> None:
    watch = Watch()
    clock = Clock(now=watch)
    with clock.running():
        while True:
            with phase(ITERATION), phase("sampling"):
                watch.wait(3)
                break
        with pytest.raises(ValueError), phase("forward"):
            raise ValueError
        watch.wait(5)
    assert clock.iterations == [{"other": 0.0, "sampling": 3.0}]
    assert clock.outside[-1]["other"] == 5


def test_a_stopped_clock_adds_nothing() -> None:
    watch = Watch()
    clock = Clock(now=watch)
    with clock.running(), phase(ITERATION), phase("forward"):
        watch.wait(1)
        with clock.stopped():
            assert clock.name == "forward"
            watch.wait(50)
        watch.wait(2)
    assert clock.iterations[0]["forward"] == 3


def test_queued_work_is_settled_before_the_time_is_read() -> None:
    watch = Watch()
    queued: list[float] = []

    def settle() -> None:
        while queued:
            watch.wait(queued.pop())

    clock = Clock(now=watch, settle=settle)
    with clock.running(), phase(ITERATION):
        with phase("forward"):
            queued.append(7)
        watch.wait(1)
    assert clock.iterations[0] == {"other": 1.0, "forward": 7.0}


def test_without_a_clock_nothing_is_told() -> None:
    assert phases._clock is None
    seen: list[tuple[str, ...]] = []

    class Seen:
        def projecting(self, *told: Any) -> None:
            seen.append(("projecting", *told))

        def passing(self, *told: Any) -> None:
            seen.append(("passing", *told))

    with phase("forward"):
        projecting("earlier", "embedding", 0)
        passing("model", "ids", "mask", cached=5)
    with Clock(watcher=Seen()).running():
        projecting("states", "embedding", 3)
        passing("model", "ids", "mask", cached=5)
        with pytest.raises(RuntimeError, match="another clock"), Clock().running():
            pass
    projecting("later", "embedding", 0)
    assert seen == [("projecting", "states", "embedding", 3), ("passing", "model", "ids", "mask", 5, False, None)]
