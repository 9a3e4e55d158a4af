"""Each signal test runs a small loop in a process of its own; "step" lines show that it is inside the context."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from accord.training.signals import GracefulStop

LOOP = """
import sys, time
from accord.errors import Terminated
from accord.training.signals import GracefulStop

with GracefulStop() as stop:
    while True:
        print("step", flush=True)
        deadline = time.monotonic() + STEP_SECONDS
        while time.monotonic() < deadline:
            time.sleep(0.01)
        if stop.requested is not None:
            print("saved", flush=True)
            sys.exit(Terminated("stopped", exit_code=128 + stop.requested).exit_code)
"""


@contextmanager
def loop(step_seconds: float, *launcher: str) -> Iterator[subprocess.Popen[str]]:
    program = LOOP.replace("STEP_SECONDS", str(step_seconds))
    process = subprocess.Popen([*launcher, sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "step\n"
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_lets_the_step_end_and_the_state_be_saved(number: signal.Signals, exit_code: int) -> None:
    with loop(0.3) as process:
        process.send_signal(number)
        output, _ = process.communicate(timeout=20)
        assert process.returncode == exit_code
        assert output.splitlines()[-1] == "saved"


@pytest.mark.parametrize(("second", "exit_code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_second_signal_ends_the_process_at_once(second: signal.Signals, exit_code: int) -> None:
    with loop(60) as process:
        process.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        assert process.poll() is None
        process.send_signal(second)
        output, _ = process.communicate(timeout=20)
        assert process.returncode == exit_code
        assert "saved" not in output


def test_one_request_delivered_twice_is_still_one_request() -> None:
    with loop(0.5) as process:
        for _ in range(20):
            process.send_signal(signal.SIGTERM)
            time.sleep(0.001)
        output, _ = process.communicate(timeout=20)
        assert process.returncode == 143
        assert output.splitlines()[-1] == "saved"


def test_the_handlers_from_before_are_back_after_the_context() -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    with pytest.raises(RuntimeError, match="in the loop"), GracefulStop() as stop:
        assert all(signal.getsignal(number) != handler for number, handler in before.items())
        assert stop.requested is None
        raise RuntimeError("in the loop")
    assert {number: signal.getsignal(number) for number in before} == before
