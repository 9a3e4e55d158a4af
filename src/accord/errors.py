"""The errors Accord raises on purpose, and the exit code each one maps to.

An error here is a sentence for the user: what was found, where, what was expected, and the fix. Everything else that
escapes is a bug in Accord and keeps its traceback.
"""

from __future__ import annotations

__all__ = [
    "AccordError",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "GuardAlert",
    "LabelsWanted",
    "RewardError",
    "Terminated",
    "TrainingError",
]


class AccordError(Exception):
    """Base of all deliberate errors. `exit_code` is what the command line returns."""

    exit_code = 1


class ConfigError(AccordError):
    """The configuration contradicts itself or names something unknown. Names the key."""

    exit_code = 2


class DataError(AccordError):
    """A file cannot be used. Names `file:line` where there is one."""

    exit_code = 2


class RewardError(AccordError):
    """A reward function or reward model failed on a prompt. Names the prompt."""

    exit_code = 1


class LabelsWanted(AccordError):
    """Nothing is wrong: people have to label pairs of answers before the same command can go on. Names the file."""

    exit_code = 4


class CheckpointError(AccordError):
    """No usable checkpoint, or a run folder that belongs to a different configuration."""

    exit_code = 2


class TrainingError(AccordError):
    """Training cannot go on (for example: the loss is not finite several steps in a row)."""

    exit_code = 1


class GuardAlert(AccordError):
    """A guard paused the run and the state was saved. Names the guard, and how to go on."""

    exit_code = 3


class Terminated(AccordError):
    """A signal asked the run to stop and the state was saved: 143 after SIGTERM, 130 after SIGINT."""

    exit_code = 143

    def __init__(self, message: str, *, exit_code: int = 143) -> None:
        super().__init__(message)
        self.exit_code = exit_code
