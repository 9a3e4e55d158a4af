"""The quickstart's task: short instructions to an assistant, and simulated annotators who judge its answers.

The annotators' true utility is known to the simulator and hidden from training, so that alignment can be measured.
"""

from accord.tasks.assistant.annotators import (
    PANEL,
    VOTES_PER_PAIR,
    Agreement,
    Annotator,
    Comparison,
    Vote,
    agreement,
    annotate,
    comparisons_to_groups,
)
from accord.tasks.assistant.generate import (
    Prompt,
    Split,
    Style,
    answer,
    demonstrations,
    pretraining_texts,
    prompts,
    split,
)
from accord.tasks.assistant.grammar import Request, parse_prompt
from accord.tasks.assistant.utility import TIE_MARGIN, Parts, Utility, blind_preference, utility

__all__ = [
    "PANEL",
    "TIE_MARGIN",
    "VOTES_PER_PAIR",
    "Agreement",
    "Annotator",
    "Comparison",
    "Parts",
    "Prompt",
    "Request",
    "Split",
    "Style",
    "Utility",
    "Vote",
    "agreement",
    "annotate",
    "answer",
    "blind_preference",
    "comparisons_to_groups",
    "demonstrations",
    "parse_prompt",
    "pretraining_texts",
    "prompts",
    "split",
    "utility",
]
