"""ROUGE of a model's answers against reference answers, with intervals over prompts. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence

from accord.measures.statistics import cluster_interval
from accord.measures.text import rouge
from accord.records import Interval

__all__ = ["ROUGE_METRICS", "rouge_intervals"]

ROUGE_METRICS = ("eval/rouge_1", "eval/rouge_2", "eval/rouge_l")


def rouge_intervals(
    texts: Sequence[str], references: Sequence[str | None], clusters: Sequence[int]
) -> dict[str, Interval]:
    """The mean of each ROUGE over the answers that have a reference, by metric name; empty where none has one.

    texts, references, clusters: one for each answer; `clusters` names its prompt, as in `cluster_interval`.
    """
    known = [(rouge(text, ref), c) for text, ref, c in zip(texts, references, clusters, strict=True) if ref]
    if not known:
        return {}
    return {
        metric: cluster_interval(
            [getattr(score, metric.removeprefix("eval/")) for score, _ in known], [c for _, c in known]
        )
        for metric in ROUGE_METRICS
    }
