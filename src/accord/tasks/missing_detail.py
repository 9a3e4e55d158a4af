"""A user who leaves out one detail: the smallest conversation that cannot be won in one turn.

The user orders a drink and has something in mind that the order does not say: milk, or lemon, each as likely. An answer
with a question mark is a question, which the user answers at a small cost; any other answer is the drink, served.

    reward = 1 if what is served names the detail wanted, and not the other one, else 0;  QUESTION_COST less a question

Known exactly: asking once and serving what was said earns BEST; nobody earns more than BEST_WITHOUT_ASKING at once.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from accord.records import Message, Turn

__all__ = ["BEST", "BEST_WITHOUT_ASKING", "DETAILS", "QUESTION_COST", "MissingDetail"]

DETAILS = ("milk", "lemon")
QUESTION_COST = 0.1
BEST = 1 - QUESTION_COST
BEST_WITHOUT_ASKING = 1 / len(DETAILS)


class MissingDetail:
    """One conversation with the user; see `accord.rollout.environment.Environment`."""

    def reset(self, prompt: Sequence[Message], random: np.random.Generator) -> Sequence[Message]:
        """The order as it stands; what is wanted besides is drawn, and kept."""
        self._wanted = DETAILS[int(random.integers(len(DETAILS)))]
        return prompt

    def step(self, messages: Sequence[Message], random: np.random.Generator) -> Turn:
        """The detail to whoever asks; the reward of what is served to anybody else."""
        answer = messages[-1].content.lower()
        if "?" in answer:
            return Turn((Message("user", f"{self._wanted}, please"),), -QUESTION_COST)
        served = [detail for detail in DETAILS if detail in answer]
        return Turn(reward=float(served == [self._wanted]), done=True)
