"""Whom the policy talks with: a user simulator, a game, a tool. One object a conversation, made by a factory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from accord.records import Message, Turn

__all__ = ["Environment", "EnvironmentFactory"]


class Environment(Protocol):
    """The other side of one conversation.

    Whatever is random in it must come from the generator that it is given: its numbers follow from the seed, the step,
    the prompt and, in `step`, the sample and the turn, so that a conversation depends neither on others nor on
    restarts. Nothing may be kept between conversations.
    """

    def reset(self, prompt: Sequence[Message], random: np.random.Generator) -> Sequence[Message]:
        """The messages that the policy answers first: `prompt`, longer or replaced.

        All samples of a prompt begin alike, or they could not be compared: each gets a generator with the same numbers.
        """
        ...

    def step(self, messages: Sequence[Message], random: np.random.Generator) -> Turn:
        """What follows the policy's answer, the last of `messages`, which are the whole conversation so far.

        It is called once after every answer, also after the last one allowed and one that was cut by length.
        """
        ...


EnvironmentFactory = Callable[[], Environment]
