"""People's reference answers in an evaluation: as an opponent, and as what ROUGE is measured against."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from accord.evaluation.compare import Answers
from accord.measures.statistics import cluster_interval, paired_difference
from accord.measures.text import num_words, rouge_l
from accord.records import Group, Interval, ScoreRequest
from accord.rewards.scorers import Scorer, values_of

__all__ = ["HUMAN", "human_answers", "overlap_account"]

HUMAN = "reference answers"

_EXPECTED = (
    "ROUGE is expected to fall when a policy is trained on preferences, while people like its answers more: it counts "
    "the words shared with one reference, not what a reader thinks of the answer. Judge such a policy by preference."
)


def human_answers(groups: Sequence[Group], judges: Mapping[str, Scorer]) -> tuple[Answers, dict[str, Interval | float]]:
    """The reference answer of every prompt, judged as a model's answer is, and what can be said of it."""
    requests = tuple(ScoreRequest(g.prompt, g.reference or "", True, g.prompt_id) for g in groups)
    scores = {name: tuple(values_of(judge, requests)) for name, judge in judges.items()}
    words = cluster_interval([num_words(r.completion) for r in requests], [r.prompt_id for r in requests])
    return Answers(HUMAN, (), (), requests, scores), {"eval/completion_words/mean": words}


def overlap_account(
    answers: Mapping[str, Answers], references: Sequence[str | None], pairs: Sequence[tuple[str, str]]
) -> list[str]:
    """For the account: how ROUGE-L moves from each model to the one compared with it, prompt by prompt, and what a fall
    means. Nothing where no prompt has a reference."""
    known = [index for index, reference in enumerate(references) if reference]
    if not known:
        return []
    shares = {
        name: [rouge_l(answer.requests[i].completion, references[i] or "") for i in known]
        for name, answer in answers.items()
    }
    account = []
    for name, base in pairs:
        prompts = [answers[name].requests[i].prompt_id for i in known]
        change = paired_difference(shares[name], shares[base], prompts)
        account.append(
            f"ROUGE-L against the reference answers is {sum(shares[name]) / len(known):.3f} for {name} and "
            f"{sum(shares[base]) / len(known):.3f} for {base}: a difference of {change.value:+.3f} (95% interval "
            f"{change.low:+.3f} to {change.high:+.3f}, {change.n:,} prompts)."
        )
    return [*account, _EXPECTED]
