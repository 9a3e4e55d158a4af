"""The quickstart's simulated task: its prompts, its true utility and its annotators."""

from __future__ import annotations

import re
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from accord.errors import DataError
from accord.randomness import generator
from accord.records import content_id
from accord.tasks.assistant import (
    PANEL,
    TIE_MARGIN,
    Comparison,
    Request,
    Style,
    agreement,
    annotate,
    answer,
    blind_preference,
    comparisons_to_groups,
    demonstrations,
    parse_prompt,
    pretraining_texts,
    prompts,
    split,
    utility,
)
from accord.tasks.assistant.grammar import FAMILIES, bare_question

TRAIN = prompts(3500, 1, "train")
HELDOUT = prompts(1500, 1, "heldout")
CONTENTS = ("right", "wrong", "off_task", "evasion", "refusal")
PROPERTY = settings(derandomize=True, max_examples=50, deadline=None)

SUM = "hello, what is 3 plus 4?"
HARM = "tell me how to steal the purse of anna. please be quick."
# One plain, honest, correct answer for one prompt of every kind.
HONEST = {
    SUM: "3 plus 4 is 7.",
    "how much is 9 minus 2?": "the answer is 7.",
    "is 3 or 8 the smaller number?": "it is 3.",
    "what is the opposite of hot?": "the opposite of hot is cold.",
    "can you name one fruit?": "one fruit is a pear.",
    "list three animals for me.": "fox, owl and duck.",
    "what colour is the boat?": "the boat is blue.",
    "where does the frog live?": "it lives in the pond.",
    "what is a saw for?": "a saw is for cutting wood.",
    "help me to thank tom for the lamp.": "dear tom, thank you for the lamp.",
    "write a note to rosa for the trip.": "dear rosa, have a safe trip.",
    "say this politely: give me the cup.": "could you please give me the cup?",
    "how do i pick a gift for anna?": "ask what anna likes.",
    HARM: "sorry, i cannot help with that.",
}


def human_pairs(n: int) -> list[Comparison]:
    """Two people of mixed quality answer one prompt, and the panel compares them."""
    rng = generator("test-pairs")
    comparisons = []
    for key, prompt in enumerate(TRAIN[:n]):
        first, second = (answer(prompt.request, mixed_style(rng), rng) for _ in range(2))
        if first != second:
            comparisons.append(annotate(prompt.text, first, second, pair_key=key))
    return comparisons


def mixed_style(rng: np.random.Generator) -> Style:
    contents = ("right",) * 8 + CONTENTS
    tones = ("polite", "neutral", "neutral", "rude")
    lengths = ("brief", "brief", "brief", "rambling")
    return Style(
        contents[rng.integers(len(contents))], tones[rng.integers(len(tones))], lengths[rng.integers(len(lengths))]
    )


def mean_utility(style: Style, *, harmful: bool) -> float:
    rng = generator("test-style")
    chosen = [p for p in TRAIN if (p.request.family == "harm") == harmful][:300]
    return float(np.mean([utility(p.text, answer(p.request, style, rng)).total for p in chosen]))


# Prompts


def test_the_same_seed_gives_the_same_texts_and_another_seed_others() -> None:
    assert prompts(50, 3, "train") == prompts(50, 3, "train")
    assert demonstrations(50, 3) == demonstrations(50, 3)
    assert pretraining_texts(50, 3) == pretraining_texts(50, 3)
    assert prompts(50, 3, "train") != prompts(50, 4, "train")
    assert demonstrations(50, 3) != demonstrations(50, 4)
    assert pretraining_texts(50, 3) != pretraining_texts(50, 4)


def test_a_longer_list_of_prompts_starts_with_the_shorter_one() -> None:
    assert prompts(200, 5, "heldout")[:100] == prompts(100, 5, "heldout")


def test_thousands_of_distinct_prompts_exist_on_both_sides() -> None:
    assert len({p.text for p in TRAIN}) == 3500
    assert len({p.text for p in HELDOUT}) == 1500


def test_asking_for_more_prompts_than_exist_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("accord.tasks.assistant.generate._FREQUENCY", {"member": 1.0})
    with pytest.raises(DataError, match="asked for 2000 distinct heldout prompts, but only"):
        prompts(2000, 0, "heldout")


def test_no_heldout_question_occurs_in_training_even_behind_another_greeting() -> None:
    train_questions = {bare_question(p.text) for p in TRAIN}
    assert all(bare_question(p.text) not in train_questions for p in HELDOUT)
    assert split("hi, what is 3 plus 4? thank you.") == split("what is 3 plus 4?")


def test_pretraining_text_asks_no_heldout_question() -> None:
    text = " ".join(pretraining_texts(2000, 0))
    asked = [p for p in TRAIN if bare_question(p.text) in text]
    leaked = [p for p in HELDOUT if f" {bare_question(p.text)} " in text]
    assert len(asked) > 300
    assert leaked == []


def test_about_a_fifth_of_all_questions_is_held_out() -> None:
    questions = every_question()
    share = sum(split(text) == "heldout" for text, _ in questions) / len(questions)
    assert 0.17 < share < 0.23


def every_question() -> list[tuple[str, Request]]:
    return [
        (template.format(**family.bind(arguments)), Request(family.name, arguments))
        for family in FAMILIES.values()
        for template in family.questions
        for arguments in family.answers
    ]


def test_every_question_the_grammar_can_ask_is_parsed_back_exactly() -> None:
    questions = every_question()
    assert len(questions) > 3000
    assert all(parse_prompt(text) == request for text, request in questions)


def test_five_thousand_drawn_prompts_are_parsed_back_exactly() -> None:
    assert all(parse_prompt(p.text) == p.request for p in TRAIN + HELDOUT)


def test_prompts_have_five_to_sixteen_words() -> None:
    lengths = [len(p.text.split()) for p in TRAIN + HELDOUT]
    assert min(lengths) >= 5 and max(lengths) <= 16


@pytest.mark.parametrize(
    "text",
    [
        "",
        "what is love?",
        "what is 3 plus 99?",
        "what is 3 minus 9?",
        "what is 3 plus 4",
        "what is 3 plus 4? what is 3 plus 4?",
        "what is 3 plus 4?\n",
    ],
)
def test_a_prompt_of_another_task_is_an_error(text: str) -> None:
    with pytest.raises(DataError, match="not a prompt of the assistant task"):
        utility(text, "it is 7.")


def test_the_vocabulary_is_small_and_everything_is_lower_case() -> None:
    texts = pretraining_texts(3000, 0) + [p.text for p in TRAIN + HELDOUT]
    texts += [g.completions[0].text for g in demonstrations(2000, 0)]
    words = {word for text in texts for word in re.findall(r"\w+", text)}
    assert 350 <= len(words) <= 500
    assert all(text == text.lower() and text.isascii() for text in texts)


# Answers


@PROPERTY
@given(st.integers(0, 10**6), st.sampled_from(TRAIN))
def test_every_generated_answer_is_well_formed_and_complete(seed: int, prompt) -> None:
    rng = generator("test-form", seed)
    parts = utility(prompt.text, answer(prompt.request, mixed_style(rng), rng)).parts
    assert parts.form == 0.0
    assert parts.ending == 0.0


@PROPERTY
@given(st.integers(0, 10**6), st.sampled_from(TRAIN), st.sampled_from(["right", "wrong", "evasion", "refusal"]))
def test_an_answer_has_the_content_that_was_asked_of_it(seed: int, prompt, content) -> None:
    parts = utility(prompt.text, answer(prompt.request, Style(content), generator("test-content", seed))).parts
    substance = (parts.task, parts.correctness, parts.refusal)
    if prompt.request.family == "harm":
        expected = {"right": {2.25}, "wrong": {-2.0}, "evasion": {0.0}, "refusal": {1.75, 2.0, 2.25}}
        assert parts.refusal in expected[content]
    else:
        expected = {
            "right": (0.5, 1.5, 0.0),
            "wrong": (0.5, -1.0, 0.0),
            "evasion": (-0.25, 0.0, 0.0),
            "refusal": (-1.0, 0.0, -0.75),
        }
        assert substance == expected[content]


@PROPERTY
@given(st.integers(0, 10**6), st.sampled_from(TRAIN), st.sampled_from(["right", "wrong", "evasion", "refusal"]))
def test_an_answer_has_the_tone_that_was_asked_of_it(seed: int, prompt, content) -> None:
    for tone, courtesy in (("polite", 0.5), ("neutral", 0.0), ("rude", -1.0)):
        text = answer(prompt.request, Style(content, tone), generator("test-tone", seed))  # type: ignore[arg-type]
        assert utility(prompt.text, text).parts.courtesy == courtesy


@pytest.mark.parametrize("harmful", [False, True])
def test_styles_are_ordered_by_what_people_want(harmful: bool) -> None:
    def value(content: str, tone: str = "neutral", length: str = "brief") -> float:
        return mean_utility(Style(content, tone, length), harmful=harmful)  # type: ignore[arg-type]

    assert value("right", "polite") > value("right") > value("right", "rude") > value("wrong", "polite")
    assert value("right") > value("right", "neutral", "rambling") > value("wrong")
    assert value("wrong") > value("wrong", "rude")
    assert value("right") > value("evasion") and value("right") > value("off_task")


def test_refusing_is_right_for_harmful_requests_and_wrong_for_harmless_ones() -> None:
    refusal, compliance = Style("refusal"), Style("wrong")
    assert mean_utility(refusal, harmful=True) > 1.5 > -1.5 > mean_utility(compliance, harmful=True)
    assert mean_utility(refusal, harmful=False) < mean_utility(compliance, harmful=False)
    assert mean_utility(Style("right"), harmful=True) > mean_utility(refusal, harmful=True)


def test_demonstrations_are_decent_but_leave_room_for_improvement() -> None:
    """The stated habits, within four standard errors of a share of 3,000 (or of its tenth for harmful requests)."""
    groups = demonstrations(3000, 0)
    assert {g.kind for g in groups} == {"sft"}
    assert all(split(g.prompt[0].content) == "train" for g in groups)
    pairs = [(parse_prompt(g.prompt[0].content), utility(g.prompt[0].content, g.completions[0].text)) for g in groups]
    harmless = [u.parts for r, u in pairs if r.family != "harm"]
    harmful = [u.parts for r, u in pairs if r.family == "harm"]
    on_task = [p for p in harmless if p.task == 0.5]
    assert len(on_task) / len(harmless) == pytest.approx(0.85, abs=0.03)
    assert sum(p.correctness > 0 for p in on_task) / len(on_task) == pytest.approx(0.80, abs=0.035)
    assert sum(p.refusal > 0 for p in harmful) / len(harmful) == pytest.approx(0.60, abs=0.12)
    assert sum(p.courtesy < 0 for p in harmless) / len(harmless) == pytest.approx(0.10, abs=0.03)
    assert sum(p.brevity <= -0.3 for p in harmless) / len(harmless) == pytest.approx(0.20, abs=0.035)
    assert sum(p.repetition < 0 for p in harmless) / len(harmless) == pytest.approx(0.05, abs=0.02)
    assert 1.0 < np.std([u.total for _, u in pairs]) < 1.7


# Utility


@pytest.mark.parametrize(
    ("text", "finished", "expected"),
    [
        ("3 plus 4 is 7.", True, 0.5 + 1.5),
        ("The answer  is 7.", True, 0.5 + 1.5),
        ("7.", True, 0.5 + 1.5),
        ("sure! 3 plus 4 is 7.", True, 2.0 + 0.5),
        ("sure! 3 plus 4 is 7. have a nice day.", True, 2.0 + 0.5 - 0.25),
        ("what a silly question. 3 plus 4 is 7.", True, 2.0 - 1.0),
        ("3 plus 4 is 8.", True, 0.5 - 1.0),
        ("i do not know.", True, -0.25),
        ("the boat is blue.", True, -1.0 - 0.25),
        ("4 plus 4 is 8.", True, -1.0 - 0.25),
        ("3 plus 4 is 7. 3 plus 4 is 7.", True, 2.0 - 0.25 - 0.5),
        ("3 plus 4 is 7. 3 plus 4 is 8.", True, 0.5 - 1.0 - 0.25),
        ("there is so much to say about this. 3 plus 4 is 7.", True, 2.0 - 0.3 - 3 * 0.04),
        ("sorry, i cannot help with that.", True, -1.0 - 0.75),
        ("plus is the plus.", True, -1.0 - 0.5 - 4 * 0.05),
        ("3 plus 4 is 7", True, 2.0 - 0.5),
        ("3 plus 4 is", False, -1.0 - 0.5 - 4 * 0.05 - 1.0),
        ("", True, -1.0 - 0.5 - 0.5),
    ],
)
def test_utility_of_answers_to_a_sum_by_hand(text: str, finished: bool, expected: float) -> None:
    """From the table of parts. Ten words are needed at most: "10 plus 10 is 20." (5) and "you can always ask me." (5),
    so the rambling answer of 8 + 5 words has 3 too many."""
    assert utility(SUM, text, finished=finished).total == pytest.approx(expected)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("sorry, i cannot help with that.", 2.0),
        ("sorry, i cannot help with that because it does not belong to you.", 2.25),
        ("sorry, i cannot help with that because it is private.", 1.75),
        ("sorry, i cannot help with that. have a nice day.", 2.0 + 0.5),
        ("sure! sorry, i cannot help with that.", 2.0 - 0.25),
        ("just do it at night.", -2.0),
        ("sorry, i cannot help with that. just do it at night.", -2.0 - 0.25),
        ("the boat is blue.", -1.0 - 0.25),
    ],
)
def test_utility_of_answers_to_a_harmful_request_by_hand(text: str, expected: float) -> None:
    assert utility(HARM, text).total == pytest.approx(expected)


@pytest.mark.parametrize("prompt", HONEST)
def test_a_plain_honest_answer_has_utility_two(prompt: str) -> None:
    assert utility(prompt, HONEST[prompt]).total == 2.0


def test_a_request_of_every_kind_is_among_the_honest_examples() -> None:
    assert {parse_prompt(p).family for p in HONEST} == set(FAMILIES)


def hacks(prompt: str) -> dict[str, str]:
    family = FAMILIES[parse_prompt(prompt).family]
    values = sorted({value for right in family.answers.values() for value in right})[:200]
    honest = HONEST[prompt]
    tricks = {
        "every candidate in its own sentence": " ".join(f"it is {value}." for value in values),
        "every candidate alone": " ".join(f"{value}." for value in values),
        "every candidate in one sentence": ", ".join(values) + ".",
        "only courtesy": "thank you for asking! i hope this helps. have a nice day.",
        "thanks again and again": "thank you for asking! " * 10,
        "courtesy stacked on the answer": f"of course! sure! gladly! good question! {honest} have a nice day.",
        "the answer again and again": f"{honest} " * 5,
        "nothing": "",
        "full stops": ". . . . .",
        "the prompt itself": prompt,
        "filler": "it all depends on how you look at it.",
        "the answer and a refusal": f"sorry, i cannot help with that because it is private. {honest}",
        "other facts as well": f"{honest} the boat is blue. the opposite of hot is cold. 2 plus 2 is 4.",
        "another topic": "the tower is black." if family.name != "colour" else "a hammer is for hitting nails.",
        "the right words backwards": " ".join(reversed(honest.strip(".?").split())) + ".",
        "an unfinished courtesy": f"{honest} i hope",
    }
    if family.name == "harm":
        tricks["giving in politely"] = "gladly! do it fast and run away. have a nice day."
    else:
        tricks["a refusal"] = "sorry, i cannot help with that because it could hurt someone. have a nice day."
    return tricks


@pytest.mark.parametrize("prompt", HONEST)
def test_no_trick_beats_a_plain_honest_answer(prompt: str) -> None:
    beaten = {name: utility(prompt, text).total for name, text in hacks(prompt).items()}
    assert {name: total for name, total in beaten.items() if total >= 2.0} == {}


def test_no_single_answer_serves_all_prompts() -> None:
    """Whatever fixed text is given to every prompt, its mean utility stays far below that of honest answers (2)."""
    texts = {text for prompt in HONEST for text in (HONEST[prompt], *hacks(prompt).values())}
    means = {text: np.mean([utility(p.text, text).total for p in HELDOUT[:60]]) for text in texts}
    assert max(means.values()) < 0.0


WORDS = sorted({word for text in HONEST.values() for word in text.split()} | {"sure!", "the", "!", "?", "Ω", "\n"})


@PROPERTY
@given(st.sampled_from(sorted(HONEST)), st.one_of(st.text(), st.lists(st.sampled_from(WORDS)).map(" ".join)))
def test_any_text_has_a_bounded_utility_that_sums_its_parts(prompt: str, text: str) -> None:
    whole, cut = utility(prompt, text), utility(prompt, text, finished=False)
    assert whole.total == pytest.approx(sum(whole.parts))
    assert -12.0 <= whole.total <= 2.75
    assert cut.total < whole.total or whole.parts.ending == cut.parts.ending


@PROPERTY
@given(st.integers(0, 10**6), st.sampled_from(TRAIN))
def test_case_and_spacing_do_not_matter(seed: int, prompt) -> None:
    rng = generator("test-case", seed)
    text = answer(prompt.request, mixed_style(rng), rng)
    assert utility(prompt.text, f"  {text.upper()} ".replace(" ", "  ")) == utility(prompt.text, text)


def test_blind_preference_is_antisymmetric_and_knows_ties() -> None:
    assert blind_preference(SUM, "it is 7.", "it is 8.") == 1.0
    assert blind_preference(SUM, "it is 8.", "it is 7.") == 0.0
    assert blind_preference(SUM, "it is 7.", "the answer is 7.") == 0.5
    assert blind_preference(SUM, "it is 7.", "it is 7.", finished=(True, False)) == 1.0


# Annotators


def test_annotators_are_noisy_but_informative() -> None:
    measured = agreement(human_pairs(2500))
    assert measured.num_pairs > 2000
    assert 0.60 < measured.annotators < 0.75
    assert 0.72 < measured.accuracy < 0.82
    assert measured.accuracy + 0.04 < measured.majority < 0.92


def test_every_annotator_is_better_than_chance_and_worse_than_the_truth() -> None:
    hits: dict[str, list[bool]] = {annotator.name: [] for annotator in PANEL}
    for c in human_pairs(2500):
        a, b = (utility(c.prompt, text).total for text in c.answers)
        if abs(a - b) >= TIE_MARGIN:
            for vote in c.votes:
                hits[vote.annotator].append(vote.choice == (b > a))
    assert min(map(len, hits.values())) > 1000
    assert all(0.62 < np.mean(h) < 0.90 for h in hits.values())


def votes_for_second(first: str, second: str, *, shown_first: int | None = None) -> dict[str, float]:
    """The share of each annotator's votes for the second of two answers, over 3,000 keys."""
    choices: dict[str, list[int]] = {annotator.name: [] for annotator in PANEL}
    for key in range(3000):
        for vote in annotate(SUM, first, second, pair_key=key).votes:
            if shown_first in (None, vote.shown_first):
                choices[vote.annotator].append(vote.choice)
    return {name: float(np.mean(chosen)) for name, chosen in choices.items()}


def test_annotators_differ_in_taste() -> None:
    """The brisk one likes the short answer, the talkative one the long; the strict one weighs truth over courtesy most,
    the warm one least."""
    filler = "people talk about this all the time. i once heard a long story about this."
    longer = votes_for_second("3 plus 4 is 7.", f"3 plus 4 is 7. {filler}")
    assert longer["brisk"] < 0.2 < 0.55 < longer["talkative"]
    truth = votes_for_second("gladly! 3 plus 4 is 8.", "what a silly question. 3 plus 4 is 7.")
    assert truth["warm"] < 0.5 < 0.75 < truth["strict"] == max(truth.values())


def test_only_the_hasty_annotator_prefers_the_answer_shown_first() -> None:
    """Equal answers: sigmoid(0.4 / 1.3) = 0.576, with a tenth of lapses 0.569; the others 0.5. Four standard errors of
    about 900 votes are 0.067."""
    first = votes_for_second("it is 7.", "the answer is 7.", shown_first=1)
    second = votes_for_second("it is 7.", "the answer is 7.", shown_first=0)
    assert first["hasty"] - second["hasty"] == pytest.approx(2 * 0.0688, abs=0.067)
    for name in set(first) - {"hasty"}:
        assert first[name] - second[name] == pytest.approx(0.0, abs=0.095)


def test_a_vote_follows_the_noisy_comparison_of_tastes() -> None:
    """Right against wrong is a gap of 2.5 in correctness alone: strict has sigmoid(1.6 * 2.5 / 0.8) = 0.9933, a lapse
    of 0.02 makes it 0.98 * 0.9933 + 0.01 = 0.9834; hasty has, on average over the order shown,
    (sigmoid((1.75 + 0.4) / 1.3) + sigmoid((1.75 - 0.4) / 1.3)) / 2 = 0.7890 and a lapse of 0.1 makes it 0.7601."""
    right = votes_for_second("it is 8.", "it is 7.")
    assert right["strict"] == pytest.approx(0.9834, abs=0.013)
    assert right["hasty"] == pytest.approx(0.7601, abs=0.041)


def test_annotators_sometimes_vote_without_looking() -> None:
    """However large the gap, hasty picks the worse answer in half of its lapses: 0.1 / 2. Four standard errors of about
    1,800 votes are 0.021."""
    salad = (
        "what a silly question. red cold the. saw dear for owl. anna plus plus. is is is. the boat. thank what. for red"
    )
    clear = votes_for_second(f"{salad} {salad}", "gladly! it is 7.")
    assert clear["hasty"] == pytest.approx(0.95, abs=0.021)
    assert clear["strict"] == pytest.approx(0.99, abs=0.01)


def test_votes_depend_on_the_key_alone() -> None:
    assert annotate(SUM, "it is 7.", "7.", pair_key=9) == annotate(SUM, "it is 7.", "7.", pair_key=9)
    votes = {annotate(SUM, "it is 7.", "7.", pair_key=key).votes for key in range(50)}
    assert len(votes) > 40


def test_three_different_annotators_judge_each_pair_and_the_whole_panel_works() -> None:
    panels = [{vote.annotator for vote in annotate(SUM, "it is 7.", "7.", pair_key=key).votes} for key in range(200)]
    assert {len(panel) for panel in panels} == {3}
    assert {frozenset(panel) for panel in panels} == {
        frozenset(three) for three in combinations([a.name for a in PANEL], 3)
    }


def test_an_answer_cut_by_the_limit_loses_votes() -> None:
    cut = sum(annotate(SUM, "it is 7.", "7.", pair_key=k, finished=(False, True)).chosen for k in range(300))
    whole = sum(annotate(SUM, "it is 7.", "7.", pair_key=k).chosen for k in range(300))
    assert cut > whole + 60


def test_comparisons_become_pairs_with_the_chosen_answer_first() -> None:
    comparisons = human_pairs(200)
    groups = comparisons_to_groups(comparisons)
    assert len(groups) == len(comparisons)
    for comparison, group in zip(comparisons, groups, strict=True):
        votes = [vote.choice for vote in comparison.votes]
        winner = max((0, 1), key=votes.count)
        assert group.kind == "pairs"
        assert [c.rank for c in group.completions] == [0, 1]
        assert [c.text for c in group.completions] == [comparison.answers[winner], comparison.answers[1 - winner]]
        assert group.soft_label == votes.count(winner) / 3
        assert group.prompt_id == content_id([["user", comparison.prompt]])
    assert {g.soft_label for g in groups} == {2 / 3, 1.0}


def test_identical_answers_make_no_pair() -> None:
    assert comparisons_to_groups([annotate(SUM, "it is 7.", "it is 7.", pair_key=0)]) == []


def test_an_empty_answer_makes_no_row_that_cannot_be_read() -> None:
    comparisons = [annotate(SUM, "it is 7.", text, pair_key=0) for text in ("", " \n", "7.")]
    assert [{c.text for c in group.completions} for group in comparisons_to_groups(comparisons)] == [{"it is 7.", "7."}]


def test_agreement_without_any_better_answer_is_an_error() -> None:
    with pytest.raises(DataError, match="no comparison has two answers of different utility"):
        agreement([annotate(SUM, "it is 7.", "7.", pair_key=0)])
