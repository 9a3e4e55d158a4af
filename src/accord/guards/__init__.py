"""Alarms over the stream of logged metrics: pure detectors, the monitor that holds their state, the record they leave.

Torch-free. A guard watches whatever stage logs its metrics, so every method has the guards that its log can feed.
"""

from accord.guards.detectors import GUARDS, Guard, Reading
from accord.guards.monitor import LEVELS, GuardMonitor, Verdict
from accord.guards.record import GUARD_LOG, guard_account, guard_ending, read_guard_log
from accord.guards.tracks import Track, View

__all__ = [
    "GUARDS",
    "GUARD_LOG",
    "LEVELS",
    "Guard",
    "GuardMonitor",
    "Reading",
    "Track",
    "Verdict",
    "View",
    "guard_account",
    "guard_ending",
    "read_guard_log",
]
