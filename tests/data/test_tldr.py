"""TL;DR prompts: the exact template, and cuts that never take the question."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from accord.data.tldr import fit_tldr_prompt, tldr_prompt


def test_the_prompt_is_the_published_template_to_the_character() -> None:
    assert tldr_prompt("cats", "Hi", "Two\nlines") == "SUBREDDIT: r/cats\n\nTITLE: Hi\n\nPOST: Two\nlines\n\nTL;DR:"


def test_a_long_post_loses_whole_lines_from_its_end() -> None:
    prompt = tldr_prompt("cats", "Hi", "one\ntwo\nthree")
    assert fit_tldr_prompt(prompt, lambda text: "three" not in text) == tldr_prompt("cats", "Hi", "one\ntwo")
    assert fit_tldr_prompt(prompt, lambda text: "two" not in text) == tldr_prompt("cats", "Hi", "one")


def test_a_post_of_one_line_loses_characters() -> None:
    size = len(tldr_prompt("cats", "Hi", ""))
    assert fit_tldr_prompt(tldr_prompt("cats", "Hi", "abcdef"), lambda text: len(text) <= size + 4) == tldr_prompt(
        "cats", "Hi", "abcd"
    )


def test_a_prompt_that_fits_and_any_other_text_are_unchanged() -> None:
    prompt = tldr_prompt("cats", "Hi", "one\ntwo")
    assert fit_tldr_prompt(prompt, lambda text: True) == prompt
    assert fit_tldr_prompt("POST: one\ntwo", lambda text: False) == "POST: one\ntwo"


@settings(derandomize=True, max_examples=50, deadline=None)
@given(st.text(alphabet="ab \n", max_size=60), st.integers(0, 120))
def test_the_result_fits_whenever_anything_can_and_keeps_as_much_of_the_last_line_as_fits(
    post: str, limit: int
) -> None:
    """The oracle tries the rule's candidates in order: cuts at newlines from the end, then in the first line."""
    first = post.split("\n")[0]
    candidates = [post] + [post[:i] for i in range(len(post) - 1, -1, -1) if post[i] == "\n"]
    candidates += [first[:i] for i in range(len(first), -1, -1)]
    expected = next((c for c in candidates if len(tldr_prompt("r", "t", c)) <= limit), "")
    assert fit_tldr_prompt(tldr_prompt("r", "t", post), lambda text: len(text) <= limit) == tldr_prompt(
        "r", "t", expected
    )
