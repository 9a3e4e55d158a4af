"""Stopping between two steps instead of in the middle of one: what SIGTERM and SIGINT do to a run."""

from __future__ import annotations

import os
import signal
import time
from types import FrameType
from typing import Any

__all__ = ["GracefulStop"]

# Supervisors such as `timeout` signal the process and then its group, so one request can arrive twice.
SAME_REQUEST_SECONDS = 0.2


class GracefulStop:
    """While entered, SIGTERM and SIGINT only set `requested`; the loop looks at it between steps, saves and stops.

    A second signal ends the process at once with 128 + its number, for whoever cannot wait. Main thread only.
    """

    def __init__(self) -> None:
        self.requested: int | None = None
        self._requested_at = 0.0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> GracefulStop:
        self._previous = {number: signal.signal(number, self._handle) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if self.requested is None:
            self.requested, self._requested_at = number, time.monotonic()
        elif time.monotonic() - self._requested_at > SAME_REQUEST_SECONDS:
            os._exit(128 + number)
