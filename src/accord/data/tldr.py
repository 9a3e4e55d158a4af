"""TL;DR (Reddit summarisation): the prompt template and the rule for posts that are too long.

Source: Stiennon et al. 2020, arXiv:2009.01325; the same in Huang et al. 2024, arXiv:2403.17031.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Callable

__all__ = ["fit_tldr_prompt", "tldr_prompt"]

_PROMPT = re.compile(r"(SUBREDDIT: r/.*?\n\nTITLE: .*?\n\nPOST: )(.*)(\n\nTL;DR:)\Z", re.DOTALL)


def tldr_prompt(subreddit: str, title: str, post: str) -> str:
    """The prompt, exactly; no space after the last colon (the answer brings its own)."""
    return f"SUBREDDIT: r/{subreddit}\n\nTITLE: {title}\n\nPOST: {post}\n\nTL;DR:"


def fit_tldr_prompt(prompt: str, fits: Callable[[str], bool]) -> str:
    """A TL;DR prompt shortened until `fits(prompt)`; any other prompt, or one that fits, unchanged.

    The post loses its last line, again and again; a post of one line loses characters. A cut at a token limit would
    remove the "TL;DR:" that asks for the summary. When not even an empty post fits, the empty post is returned.
    """
    match = _PROMPT.match(prompt)
    if match is None:
        return prompt
    head, post, tail = match.groups()
    while "\n" in post and not fits(head + post + tail):
        post = post[: post.rfind("\n")]
    too_long = bisect_left(range(len(post) + 1), True, key=lambda kept: not fits(head + post[:kept] + tail))
    return head + post[: max(too_long - 1, 0)] + tail
