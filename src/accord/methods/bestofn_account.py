"""What best-of-n is worth on the prompts it was sampled for: the curve against n, and its account."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from accord.measures.selection import best_of_n_kl_bound, best_of_n_values, best_of_n_win_ceiling
from accord.measures.statistics import cluster_interval, paired_difference
from accord.methods.candidates import best_of
from accord.methods.context import headline
from accord.records import Group, Interval

__all__ = ["Judged", "bestofn_summary"]

Floats = NDArray[np.float64]
MOST_POINTS = 64
SIDE_BY_SIDE = 8


@dataclass(frozen=True, slots=True)
class Judged:
    """P prompts with N answers each and what was said of them.

    texts    P rows of N; tokens (P, N) their lengths; finished (P, N) bool
    scores   (P, N) what the scorer said; rewards (P, N) the same, shaped: what chooses among the usable (P, N) bool;
             the others have their prompt's worst
    gold     (P, N) what the hidden truth says, None without one
    """

    groups: tuple[Group, ...]
    texts: Sequence[Sequence[str]]
    tokens: NDArray[np.int64]
    finished: NDArray[np.bool_]
    scores: Floats
    rewards: Floats
    usable: NDArray[np.bool_]
    gold: Floats | None

    @property
    def prompt_ids(self) -> list[int]:
        return [group.prompt_id for group in self.groups]


def bestofn_summary(judged: Judged, scorer: str, num_best: int, num_ranked: int) -> dict[str, Any]:
    """Headline, account, warnings and curves. Expected values are unbiased for every n; intervals are over prompts."""
    total = judged.rewards.shape[1]
    curves = {"score": best_of_n_values(judged.rewards, judged.scores)}
    if judged.gold is not None:
        curves["true utility"] = best_of_n_values(judged.rewards, judged.gold)
    rows, sentences = [], []
    for name, curve in curves.items():
        one, best = (cluster_interval(curve[:, n - 1], judged.prompt_ids) for n in (1, total))
        rows += [headline(f"{name} of one answer", one), headline(f"{name} of the best of {total}", best)]
        sentences.append(f"the {name} went from {one.value:+.2f} to {best.value:+.2f}")
    bound = best_of_n_kl_bound(total)
    meaning = "ln n - (n - 1) / n: best-of-n is at most this far from the policy it samples from."
    rows.append(headline("KL bound", bound, unit="nats per answer", meaning=meaning))
    tied = int((judged.rewards.min(1) == judged.rewards.max(1)).sum())
    different = sum(len(set(texts)) for texts in judged.texts) / judged.rewards.size
    account = [
        f"The policy wrote {total} answers to each of {len(judged.groups):,} prompts, scored by {scorer}. From one "
        f"answer to the best of {total} {' and '.join(sentences)}, at a distance of at most {bound:.2f} nats. By this "
        f"scorer it cannot win more than {best_of_n_win_ceiling(total):.1%} against a single answer.",
        f"{judged.finished.mean():.1%} of the answers ended by themselves, {different:.0%} of a prompt's answers are "
        f"different ones. best.jsonl has {num_best:,} demonstrations (finished answers only), ranked.jsonl "
        f"{num_ranked:,} rankings.",
    ]
    return {
        "headline": rows,
        "account": account,
        "warnings": _warnings(judged, curves, tied),
        "curves": _charts(judged, curves),
        "side_by_side": [_exchange(judged, row) for row in range(min(SIDE_BY_SIDE, len(judged.groups)))],
    }


def _warnings(judged: Judged, curves: dict[str, Floats], tied: int) -> list[str]:
    warnings = []
    total, count = judged.rewards.shape[1], len(judged.groups)
    unusable = int((~judged.usable).sum())
    if unusable:
        warnings.append(
            f"{unusable:,} answers could not be scored or were left out for being cut: they are never chosen, and "
            "count as their prompt's worst. A prompt without any other is left out."
        )
    if tied > count / 2:
        warnings.append(
            f"All {total} answers score the same for {tied} of {count} prompts: there the best is any of them. Look at "
            "what the scorer says; a higher temperature gives more to choose."
        )
    gold = curves.get("true utility")
    if gold is not None:
        peak = int(gold.mean(axis=0).argmax())
        fall = paired_difference(gold[:, -1], gold[:, peak], judged.prompt_ids)
        if fall.high < 0:
            warnings.append(
                f"The true utility is highest for the best of {peak + 1} and {-fall.value:.2f} lower for the best of "
                f"{total}: choosing among more answers exploits the scorer. Use a smaller n, or a better scorer."
            )
    return warnings


def _charts(judged: Judged, curves: dict[str, Floats]) -> list[dict[str, Any]]:
    total = judged.rewards.shape[1]
    shown = sorted({round(n) for n in np.geomspace(1, total, MOST_POINTS)}) if total > MOST_POINTS else None
    ns = shown or list(range(1, total + 1))
    charts = [
        {
            "title": f"{name[0].upper()}{name[1:]} of the best of n",
            "x_label": "answers to choose from",
            "y_label": name,
            "note": "Expected over all choices of n among the sampled answers. The band is the 95% interval over "
            "prompts.",
            "series": [_series(name, [float(n) for n in ns], curve, ns, judged.prompt_ids)],
        }
        for name, curve in curves.items()
    ]
    distances = [math.sqrt(best_of_n_kl_bound(n)) for n in ns]
    spreads = {"score": float(judged.scores.std())}
    if judged.gold is not None:
        spreads["true utility"] = float(judged.gold.std())
    gains = [
        _series(name, distances, (curve - curve[:, :1]) / (spreads[name] or 1.0), ns, judged.prompt_ids)
        for name, curve in curves.items()
    ]
    charts.append(
        {
            "title": "Gain of the best of n against distance",
            "x_label": "\u221aKL bound (\u221anats)",
            "y_label": "gain (SDs of single answers)",
            "note": "Each point is one n. The distance is an upper bound, ln n - (n - 1) / n, exact where no two "
            "answers score the same. Where the score still climbs and the true utility falls, the scorer is exploited.",
            "series": gains,
        }
    )
    return charts


def _exchange(judged: Judged, row: int) -> dict[str, Any]:
    """A prompt with its first answer and its best."""
    picked = {"one answer": 0, f"best of {judged.rewards.shape[1]}": best_of(judged.rewards, judged.usable)[row]}
    shown: dict[str, Any] = {
        "prompt": "\n".join(message.content for message in judged.groups[row].prompt),
        "answers": {who: judged.texts[row][k] for who, k in picked.items()},
        "scores": {who: float(judged.scores[row, k]) for who, k in picked.items()},
    }
    if judged.gold is not None:
        shown["gold"] = {who: float(judged.gold[row, k]) for who, k in picked.items()}
    return shown


def _series(label: str, xs: list[float], curve: Floats, ns: Sequence[int], prompts: Sequence[int]) -> dict[str, Any]:
    """A line with its band; one prompt alone has none."""
    points: list[Interval] = [cluster_interval(curve[:, n - 1], prompts) for n in ns]
    series: dict[str, Any] = {"label": label, "x": xs, "y": [p.value for p in points]}
    if all(math.isfinite(p.low) and math.isfinite(p.high) for p in points):
        series |= {"low": [p.low for p in points], "high": [p.high for p in points]}
    return series
