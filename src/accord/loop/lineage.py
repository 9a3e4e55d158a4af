"""Where every policy comes from and what was measured of it: lineage.json, the run's summary and its report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from accord.atomic import write_json
from accord.loop.rule import Standing, improved
from accord.loop.stages import Policy
from accord.methods.catalogue import STAGES
from accord.methods.context import Context, headline, weights_hash
from accord.records import Interval
from accord.report.overview import overview_report
from accord.training.runfolder import read_summary

__all__ = ["Round", "rate_of", "write_story"]

KL = "rollout/kl_per_sequence_nats"


@dataclass(frozen=True, slots=True)
class Round:
    """One round's stages, by their summaries. `newest` is the policy that was sampled and judged against `best`; where
    the loop goes on, the next one is trained from `start` (`reward` and `policy` are the summaries of that)."""

    number: int
    folder: Path
    newest: Policy
    best: Policy | None
    sampled: Mapping[str, Any]
    labelled: Mapping[str, Any]
    standing: Standing
    start: Policy | None = None
    reward: Mapping[str, Any] | None = None
    policy: Mapping[str, Any] | None = None

    @property
    def rate(self) -> Interval | None:
        """The newest policy's win rate over the best before it; None in the first round."""
        return rate_of(self.labelled)

    @property
    def drift(self) -> Interval | None:
        """How often the reward model of the round before agrees with the new labels."""
        return _interval(self.labelled.get("drift"))

    @property
    def accuracy(self) -> Interval | None:
        """The refitted reward model on the held-out share of all labels so far."""
        return _interval(_row(self.reward, "eval/accuracy"))

    @property
    def kl(self) -> float | None:
        """The distance of the policy that was trained from the one it started from, nats an answer."""
        row = _row(self.policy, KL)
        return None if row is None else row["value"]

    def gold(self, policy: int) -> Interval | None:
        return _interval(self.labelled.get("gold", {}).get(str(policy)))


def rate_of(labelled: Mapping[str, Any]) -> Interval | None:
    """The win rate that a label stage found; None where nothing was compared."""
    rows = labelled.get("comparisons")
    return _interval(rows[0]) if rows else None


def write_story(
    context: Context,
    online: str,
    policies: Sequence[Policy],
    rounds: Sequence[Round],
    standing: Standing,
    *,
    finished: bool,
) -> dict[str, Any]:
    """Write lineage.json, summary.json and report.html into the root; returns the summary."""
    root = context.root
    write_json(root / "lineage.json", _lineage(root, online, policies, rounds))
    best = policies[standing.best]
    stages = _stages(root, online, rounds)
    summaries = [summary for stage in stages if (summary := read_summary(root / stage)) is not None]
    summary = {
        "name": context.recipe.name,
        "seconds": sum(one["seconds"] for one in summaries),
        "stages": stages,
        "result": best.name,
        "model": _relative(best.model, root),
        "headline": [row for done in rounds for row in _numbers(done)],
        "account": _account(online, policies, rounds, standing, context, finished=finished),
        "warnings": _warnings(rounds),
        "comparisons": [row for done in rounds for row in done.labelled.get("comparisons", ())],
        "curves": _curves(policies, rounds),
    }
    write_json(root / "summary.json", summary)
    page = overview_report(root, stages)
    if finished:
        context.console.print(_table(rounds))
        for text in summary["account"]:
            context.say(text)
    context.console.print(f"\nreport: {page}", highlight=False)
    return summary


def _stages(root: Path, online: str, rounds: Sequence[Round]) -> list[str]:
    names = ["base", "sft"]
    for done in rounds:
        names += [f"{done.folder.name}/{stage}" for stage in ("sample", "label", "reward", online)]
    return [name for name in names if (root / name / "summary.json").exists()]


def _lineage(root: Path, online: str, policies: Sequence[Policy], rounds: Sequence[Round]) -> dict[str, Any]:
    """Everything by number; what is not known (yet) is null."""
    trained = {done.number: done for done in rounds if done.policy is not None}
    judged = {done.newest.number: done for done in rounds if done.best is not None}
    return {
        "policies": [_born(root, online, policy, trained, judged, rounds) for policy in policies],
        "rounds": [_measured(root, done) for done in rounds],
    }


def _born(
    root: Path,
    online: str,
    policy: Policy,
    trained: Mapping[int, Round],
    judged: Mapping[int, Round],
    rounds: Sequence[Round],
) -> dict[str, Any]:
    birth, trial = trained.get(policy.number), judged.get(policy.number)
    rate = None if trial is None else trial.rate
    parents: dict[str, Any] = {"parent": None, "reward_model": None}
    if birth is not None and birth.start is not None and birth.reward is not None:
        parents = {
            "parent": birth.start.number,
            "reward_model": {
                "folder": _relative(birth.folder / "reward" / "model", root),
                "weights": birth.reward.get("weights"),
                "labels_of_rounds": list(range(1, birth.number + 1)),
            },
        }
    return {
        "policy": policy.number,
        "folder": _relative(policy.model, root),
        "weights": "".join(weights_hash(policy.model).values()),
        **parents,
        "method": None if birth is None else online,
        "kl_to_parent_nats": None if birth is None else birth.kl,
        "judged_against": None if trial is None or trial.best is None else trial.best.number,
        "win_rate": _dict(rate),
        "improved": None if rate is None else improved(rate),
        "gold_utility": _dict(_gold(policy, rounds)),
    }


def _measured(root: Path, done: Round) -> dict[str, Any]:
    return {
        "round": done.number,
        "folder": _relative(done.folder, root),
        "sampled_from": done.newest.number,
        "labels": done.labelled["headline"][0]["value"],
        "pairs_without_label": done.labelled["failed"],
        "labels_sha256": done.labelled["fingerprint"],
        "pairs_sha256": done.sampled["fingerprint"],
        "equal_pairs_left_out": done.sampled["equal"],
        "empty_pairs_left_out": done.sampled["empty"],
        "old_reward_model_agrees": _dict(done.drift),
        "new_reward_model_accuracy": _dict(done.accuracy),
        "best_so_far": done.standing.best,
    }


def _gold(policy: Policy, rounds: Sequence[Round]) -> Interval | None:
    """The hidden truth of a policy's held-out answers, which are the same in every round that asks for them."""
    return next((found for done in rounds if (found := done.gold(policy.number)) is not None), None)


# --- in words and pictures --------------------------------------------------------------------------------------------


def _account(
    online: str,
    policies: Sequence[Policy],
    rounds: Sequence[Round],
    standing: Standing,
    context: Context,
    *,
    finished: bool,
) -> list[str]:
    config = context.recipe.loop
    assert config is not None
    texts = [_verdict(done, done.best, done.rate) for done in rounds if done.best is not None and done.rate is not None]
    best = policies[standing.best]
    gold = [(policy, found) for policy in policies if (found := _gold(policy, rounds)) is not None]
    if gold:
        said = ", ".join(f"{policy.name} {found.value:+.3f}" for policy, found in gold)
        texts.append(f"The true utility of their held-out answers, which no stage saw but through labels: {said}.")
    if not finished:
        return [*texts, f"The loop is not finished: {len(policies) - 1} of at most {config.rounds} rounds are trained."]
    why = (
        f"it stopped because {_policies(standing.misses)} in a row {'was' if standing.misses == 1 else 'were'} not "
        f"shown to be better than the best before"
        if len(policies) - 1 < config.rounds
        else "all its rounds are done"
    )
    result = (
        f"The result is {best.name}, in {best.model}"
        if best.number
        else f"No policy was shown to be better than the one the loop started from, which remains: {best.model}"
    )
    return [f"The loop trained {_policies(len(policies) - 1)} by {STAGES[online].verb}; {why}.", f"{result}.", *texts]


def _policies(count: int) -> str:
    return f"{count} {'policy' if count == 1 else 'policies'}"


def _verdict(done: Round, best: Policy, rate: Interval) -> str:
    words = (
        "is better than" if improved(rate) else "is worse than" if rate.high < 0.5 else "is not shown to differ from"
    )
    return (
        f"{done.newest.name.capitalize()} {words} {best.name}: win rate {rate.value:.1%} (95% interval {rate.low:.1%} "
        f"to {rate.high:.1%}, {rate.n} held-out prompts, ties counted half)."
    )


def _warnings(rounds: Sequence[Round]) -> list[str]:
    return [
        f"The reward model of round {done.number - 1} was not distinguishable from guessing on answers of "
        f"{done.newest.name}, which was trained against it: it was exploited, or the answers hardly differ."
        for done in rounds
        if done.drift is not None and done.drift.low <= 0.5
    ]


def _numbers(done: Round) -> list[dict[str, Any]]:
    """A round's column in the report's table."""
    name = done.folder.name
    found: list[tuple[str, str, str, float | Interval | None]] = [
        ("labels", "", "Pairs that were labelled.", done.labelled["headline"][0]["value"]),
        ("old reward model agrees", "fraction", "With the new labels, which it never saw.", done.drift),
        ("new reward model agrees", "fraction", "On held-out comparisons of all rounds so far.", done.accuracy),
        ("KL to its parent", "nats an answer", "How far this round's policy went.", done.kl),
        (
            "win rate of the policy sampled here",
            "fraction",
            "On held-out prompts, over the best policy before it, by the labeller.",
            done.rate,
        ),
        (
            "true utility of the policy sampled here",
            "",
            "Of its held-out answers. No stage saw it but through labels.",
            done.gold(done.newest.number),
        ),
    ]
    return [
        headline(title, value, unit=unit or None, meaning=meaning) | {"model": name}
        for title, unit, meaning, value in found
        if value is not None
    ]


def _table(rounds: Sequence[Round]) -> Table:
    table = Table(
        "round",
        "policy",
        "win rate over the best before, 95%",
        "KL to parent",
        "labels",
        "old RM agrees",
        "new RM agrees",
    )
    for done in rounds:
        against = f"  over policy {done.best.number}" if done.best is not None else ""
        table.add_row(
            done.folder.name.removeprefix("round-"),
            f"samples {done.newest.number}" + (f", trains {done.number}" if done.policy is not None else ""),
            f"{_short(done.rate)}{against}",
            "-" if done.kl is None else f"{done.kl:.2f}",
            f"{done.labelled['headline'][0]['value']:,}",
            _short(done.drift),
            _short(done.accuracy),
        )
    table.caption = "RM: reward model; the old one on new labels it never saw, the refitted one on held-out labels"
    return table


def _curves(policies: Sequence[Policy], rounds: Sequence[Round]) -> list[dict[str, Any]]:
    """What became of the policies, and of the reward models."""
    rates = [(done.newest.number, done.rate) for done in rounds if done.rate is not None]
    golds = [(policy.number, found) for policy in policies if (found := _gold(policy, rounds)) is not None]
    drifts = [(done.number, done.drift) for done in rounds if done.drift is not None]
    accuracies = [(done.number, done.accuracy) for done in rounds if done.accuracy is not None]
    curves = [
        (
            "Is each policy better than the best before it?",
            "policy",
            "win rate",
            "By the labeller, on held-out prompts; the band is the 95% interval. Above one half: better.",
            {"win rate": rates},
        ),
        (
            "True utility of the policies",
            "policy",
            "true utility",
            "Mean over held-out answers with its 95% interval. No stage saw it but through labels.",
            {"true utility": golds},
        ),
        (
            "How well the reward models judge",
            "round",
            "agreement with the labels",
            "Where the old one falls far below the new one, the policy has left what it knew.",
            {"the new one, held out": accuracies, "the old one, on new answers": drifts},
        ),
    ]
    return [
        {
            "title": title,
            "x_label": x,
            "y_label": y,
            "note": note,
            "series": [_series(label, points) for label, points in series.items() if points],
        }
        for title, x, y, note, series in curves
        if any(series.values())
    ]


def _series(label: str, points: Sequence[tuple[int, Interval]]) -> dict[str, Any]:
    return {
        "label": label,
        "x": [number for number, _ in points],
        "y": [found.value for _, found in points],
        "low": [found.low for _, found in points],
        "high": [found.high for _, found in points],
    }


def _short(found: Interval | None) -> str:
    return "-" if found is None else f"{found.value:.1%} [{found.low:.1%}, {found.high:.1%}]"


def _row(summary: Mapping[str, Any] | None, name: str) -> Mapping[str, Any] | None:
    return next((row for row in (summary or {}).get("headline", ()) if row["name"] == name), None)


def _interval(row: Mapping[str, Any] | None) -> Interval | None:
    if row is None or "low" not in row:
        return None
    return Interval(row["value"], row["low"], row["high"], row["n"])


def _dict(found: Interval | None) -> dict[str, Any] | None:
    return None if found is None else found.as_dict()


def _relative(path: Path | str, root: Path) -> str:
    """Paths inside the run's folder relative to it, so that the folder can be moved."""
    inside = isinstance(path, Path) and path.is_relative_to(root)
    return path.relative_to(root).as_posix() if isinstance(path, Path) and inside else str(path)
