"""The two stages that the loop adds in front of the ordinary ones: pairs of answers, and their labels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accord.config import remote_identity
from accord.data.convert import writing
from accord.errors import DataError, RewardError
from accord.loop.labellers import Labeller, scores_of, truth_of
from accord.loop.plan import fixed_prompts, held_out, round_prompts
from accord.loop.sheet import (
    Choice,
    Labels,
    Pair,
    comparisons,
    fingerprint,
    outcomes,
    read_labels,
    read_pairs,
    write_labels,
    write_pairs,
    write_sheet,
)
from accord.measures.statistics import cluster_interval, win_rate
from accord.methods.context import Context, LoadedPolicy, headline, run_stage, tokenised, weights_hash
from accord.methods.corpus import Part
from accord.methods.judges import model_scorer
from accord.models.load import load_reward_model
from accord.randomness import generator, permutation
from accord.records import Group, Interval
from accord.rewards.scorers import Scorer
from accord.rollout.native import NativeSampler, PromptTokens
from accord.rollout.sampling import Sampling
from accord.training.runfolder import RunFolder

__all__ = ["Policy", "Sheet", "labels_of", "run_label", "run_sample"]

SIDE_BY_SIDE = 8


@dataclass(frozen=True, slots=True)
class Policy:
    """A policy of the loop: its number (0 = where the loop starts), the stage's folder it came from, None for a model
    that no stage made, and the folder (or hub id) of its weights."""

    number: int
    stage: Path | None
    model: Path | str

    @property
    def name(self) -> str:
        return f"policy {self.number}"


@dataclass(frozen=True, slots=True)
class Sheet:
    """What one sheet asks: the round it belongs to, who answers twice (`teach` prompts), and whether the newest policy
    is compared with the best before it (None: there is none yet)."""

    number: int
    teach: bool
    newest: Policy
    best: Policy | None


# --- sample ----------------------------------------------------------------------------------------------------------


def run_sample(context: Context, online: str, sheet: Sheet) -> dict[str, Any]:
    """Write (or find finished) a round's pairs of answers, and the sheet that a labeller fills in."""
    config, section = context.recipe.loop, getattr(context.recipe, online)
    assert config is not None
    corpus = fixed_prompts(context.corpus)
    sources = corpus.prompts.sources | corpus.evaluation.sources
    for policy in filter(None, (sheet.newest, sheet.best)):
        sources |= {f"weights of {policy.name}": "".join(weights_hash(policy.model).values())}

    def body(run: RunFolder) -> dict[str, Any]:
        groups = corpus.prompts.groups
        chosen = round_prompts(sheet.number, config.comparisons, len(groups), context.seed)
        asked = [groups[i] for i in chosen] if sheet.teach else []
        drawn = _Drawn(context, online)
        teach = drawn.twice(sheet.newest, asked, sheet.number)
        judged: list[Pair] = []
        if sheet.best is not None:
            others = held_out(context.corpus, context.recipe.data.holdout)
            order = permutation(len(others), "loop-holdout", context.seed)[: config.holdout_pairs]
            judged = drawn.each((sheet.newest, sheet.best), [others[i] for i in sorted(order)], sheet.number)
        useful = [pair for pair in teach if not (pair.equal or pair.empty)]
        pairs = _shuffled([*useful, *judged], context.seed, sheet.number)
        write_pairs(run.path / "pairs.jsonl", pairs)
        write_sheet(run.path / "sheet.jsonl", pairs)
        return _sample_summary(sheet, teach, judged) | {"fingerprint": fingerprint(run.path / "pairs.jsonl")}

    sampling = {"max_new_tokens": section.max_new_tokens, "temperature": section.temperature}
    amounts = {"round": sheet.number, "comparisons": config.comparisons if sheet.teach else 0}
    amounts |= {"holdout_pairs": config.holdout_pairs} if sheet.best is not None else {}
    data = context.recipe.data.model_dump(mode="json", include={"holdout", "max_tokens", "max_prompt_tokens"})
    return run_stage(
        context, "sample", settings={"sample": amounts | sampling, "data": data}, sources=sources, body=body
    )


class _Drawn:
    """Answers as pairs, sampled as the online stage samples."""

    def __init__(self, context: Context, online: str) -> None:
        self._context, self._section = context, getattr(context.recipe, online)

    def twice(self, policy: Policy, groups: Sequence[Group], number: int) -> list[Pair]:
        """Two answers of one policy to each prompt."""
        answers = self._answers(policy, groups, 2, ("loop", self._context.seed, number)) if groups else []
        return [
            Pair("", group.prompt, first[0], second[0], (policy.number, policy.number), (first[1], second[1]))
            for group, (first, second) in answers
        ]

    def each(self, policies: tuple[Policy, Policy], groups: Sequence[Group], number: int) -> list[Pair]:
        """One answer of each policy to each prompt, in an order that says nothing of who wrote which. The key holds
        neither policy nor round: equal policies give equal answers, and a policy gives the same ones in every round."""
        key = ("loop-holdout", self._context.seed)
        ours, theirs = (self._answers(policy, groups, 1, key) for policy in policies)
        pairs = []
        for (group, mine), (_, other) in zip(ours, theirs, strict=True):
            both = [(*mine[0], policies[0].number), (*other[0], policies[1].number)]
            if generator("loop-order", self._context.seed, number, group.prompt_id).random() < 0.5:
                both.reverse()
            (a, a_ended, writer), (b, b_ended, second) = both
            pairs.append(Pair("", group.prompt, a, b, (writer, second), (a_ended, b_ended)))
        return pairs

    def _answers(
        self, policy: Policy, groups: Sequence[Group], n: int, key: tuple[int | str, ...]
    ) -> list[tuple[Group, list[tuple[str, bool]]]]:
        """For each prompt that fits, `n` answers as (text, whether it ended by itself)."""
        context, section, data = self._context, self._section, self._context.recipe.data
        loaded = LoadedPolicy.of(context, policy.model)
        room = data.max_tokens - section.max_new_tokens
        limits = {"max_tokens": room, "max_prompt_tokens": min(room, data.max_prompt_tokens or room)}
        prompts = tokenised(context, list(groups), loaded.template, "prompts", **limits)
        wanted = [PromptTokens(tokens.prompt_ids, tokens.prompt_id) for _, tokens in prompts]
        sampling = Sampling(
            section.max_new_tokens, temperature=section.temperature, stop_ids=loaded.template.stop_ids
        )  # fmt: skip
        sampled = NativeSampler(loaded.model, pad_id=loaded.pad_id).generate(wanted, n, sampling, key)
        return [
            (group, [(loaded.template.decode(s.ids), s.finish_reason == "stop") for s in samples])
            for (group, _), samples in zip(prompts, sampled, strict=True)
        ]


def _shuffled(pairs: Sequence[Pair], seed: int, number: int) -> list[Pair]:
    """In an order that mixes both kinds, with ids that tell them not apart."""
    order = permutation(len(pairs), "loop-sheet", seed, number)
    return [_named(pairs[index], f"{number}-{place}") for place, index in enumerate(order, start=1)]


def _named(pair: Pair, name: str) -> Pair:
    return Pair(name, pair.prompt, pair.a, pair.b, pair.writers, pair.finished)


def _sample_summary(sheet: Sheet, teach: Sequence[Pair], judged: Sequence[Pair]) -> dict[str, Any]:
    equal, ties = sum(pair.equal for pair in teach), sum(pair.equal for pair in judged)
    empty = sum(pair.empty and not pair.equal for pair in teach)
    wanted = len(teach) - equal - empty + len(judged) - ties
    account = []
    if teach:
        account.append(
            f"{sheet.newest.name.capitalize()} answered {len(teach):,} prompts twice; {equal:,} pairs were two equal "
            "answers and are left out" + (f", and {empty:,} with an empty answer." if empty else ".")
        )
    if sheet.best is not None:
        account.append(
            f"{sheet.newest.name.capitalize()} and {sheet.best.name}, the best before it, answered {len(judged):,} "
            f"held-out prompts; {ties:,} times with equal answers, which count as ties."
        )
    warnings = []
    if equal > len(teach) / 2:
        warnings.append(
            f"{sheet.newest.name.capitalize()} gave two equal answers to {equal:,} of {len(teach):,} prompts: it "
            "hardly varies any more, so there is little to compare and little to learn. Train it less far in a round."
        )
    rows = [headline("pairs to label", wanted)]
    return {"headline": rows, "account": account, "warnings": warnings, "equal": equal, "empty": empty}


# --- label -----------------------------------------------------------------------------------------------------------


def run_label(
    context: Context, online: str, sheet: Sheet, labeller: Labeller, old_reward: Path | None
) -> dict[str, Any]:
    """Have the pairs of this round labelled (or find them labelled); measure the old reward model on the new labels.

    Raises: LabelsWanted while people have not filled in the sheet; DataError for a sheet that cannot be used;
        RewardError where too many answers could not be scored.
    """
    config, recipe = context.recipe.loop, context.recipe
    assert config is not None and recipe.reward is not None
    budget = recipe.reward.micro_batch_tokens
    file = context.root / "sample" / "pairs.jsonl"
    truth = truth_of(context, online)
    sources = {"pairs": fingerprint(file), **labeller.sources}
    if truth is not None:
        sources |= {"truth": truth.fingerprint}
    if old_reward is not None:
        sources |= {"old reward weights": "".join(weights_hash(old_reward).values())}

    def body(run: RunFolder) -> dict[str, Any]:
        pairs = read_pairs(file)
        labels = labeller.choose([pair for pair in pairs if not pair.equal], run.path)
        groups = comparisons(pairs, labels.choices)
        if sheet.teach and not groups:
            raise DataError(
                f"all {len(labels.choices)} labels in {run.path} are ties: there is nothing for the reward model"
            )
        if sheet.best is not None and labels.failures and not outcomes(pairs, labels.choices, sheet.newest.number)[0]:
            raise RewardError(
                f"no held-out pair in {run.path} could be labelled: {next(iter(labels.failures.values()))}"
            )
        write_labels(run.path / "labels.jsonl", labels)
        with writing(run.path / "comparisons.jsonl") as write:
            for group in groups:
                write(group)
        old = None if old_reward is None or not groups else _old_scorer(context, old_reward, budget)
        return _label_summary(sheet, pairs, labels, groups, old, truth) | {
            "fingerprint": fingerprint(run.path / "labels.jsonl")
        }

    settings = config.model_dump(mode="json", include={"labeller", "label_function", "label_scale"})
    if config.judge is not None:
        settings["judge"] = remote_identity(config.judge.model_dump(mode="json"))
    return run_stage(context, "label", settings={"label": settings}, sources=sources, body=body)


def labels_of(root: Path, name: str) -> Part:
    """What a finished label stage in `root` has for the reward model."""
    pairs, file = read_pairs(root / "sample" / "pairs.jsonl"), root / "label" / "labels.jsonl"
    return Part(tuple(comparisons(pairs, read_labels(file))), {name: fingerprint(file)})


def _old_scorer(context: Context, folder: Path, budget: int) -> Scorer:
    model, tokenizer = load_reward_model(folder, device=context.device)
    return model_scorer(context, model, tokenizer, budget, folder)


def _label_summary(
    sheet: Sheet,
    pairs: Sequence[Pair],
    labels: Labels,
    groups: Sequence[Group],
    old: Scorer | None,
    truth: Scorer | None,
) -> dict[str, Any]:
    choices = labels.choices
    counts = Counter(choices.values())
    account = [
        f"{len(choices):,} pairs were labelled: {counts['a']:,} times a, {counts['b']:,} times b, {counts['tie']:,} "
        f"ties. {len(groups):,} are comparisons for the reward model."
    ]
    account += _failed(pairs, labels.failures)
    rows = [headline("labels", len(choices))]
    more: dict[str, Any] = {"failed": len(labels.failures)}
    if old is not None:
        agreed = _agreement(old, pairs, choices)
        rows.append(headline("old reward model agrees", agreed, unit="fraction", meaning=_DRIFT))
        account.append(
            f"The reward model of the round before agrees with {_said(agreed)} of the new labels, on answers of "
            f"{sheet.newest.name}, which it has never seen."
        )
        more["drift"] = agreed.as_dict()
    if truth is not None and sheet.best is not None:
        more["gold"] = _truths(truth, [pair for pair in pairs if pair.held_out])
    if sheet.best is not None:
        rate = win_rate(*outcomes(pairs, choices, sheet.newest.number))
        name = f"{sheet.newest.name} over {sheet.best.name}"
        more["comparisons"] = [{"name": name, "judge": "the labeller", **rate.as_dict()}]
        more["side_by_side"] = [_exchange(pair) for pair in pairs if pair.held_out and not pair.equal][:SIDE_BY_SIDE]
        account.append(
            f"On held-out prompts {sheet.newest.name} wins {_said(rate)} against {sheet.best.name}, ties counted half."
        )
    return {"headline": rows, "account": account, **more}


def _failed(pairs: Sequence[Pair], failures: Mapping[str, str]) -> list[str]:
    """What is said of pairs without a label."""
    if not failures:
        return []
    held = sum(pair.held_out for pair in pairs if pair.id in failures)
    name, reason = next(iter(failures.items()))
    return [
        f"{len(failures):,} more pairs have no label, because the scoring of an answer failed: {held:,} held-out ones, "
        f"which are left out of the win rate, and {len(failures) - held:,} that the reward model does not learn from. "
        f"The first is {name}: {reason}"
    ]


_DRIFT = "It was never trained on these answers: how well does it still judge the policy that was trained against it?"


def _agreement(scorer: Scorer, pairs: Sequence[Pair], choices: Mapping[str, Choice]) -> Interval:
    """How often the scorer puts first what the labeller chose, over the pairs for the reward model, ties left out."""
    decided = [pair for pair in pairs if not pair.held_out and choices.get(pair.id, "tie") != "tie"]
    gaps = [
        (a - b) if choices[pair.id] == "a" else (b - a)
        for pair, (a, b) in zip(decided, scores_of(scorer, decided), strict=True)
    ]
    agreed = [0.5 if gap == 0 else float(gap > 0) for gap in gaps]
    return win_rate(agreed, [pair.prompt_id for pair in decided])


def _truths(truth: Scorer, pairs: Sequence[Pair]) -> dict[str, Any]:
    """The mean truth of each policy's held-out answers."""
    found: dict[int, list[float]] = {}
    prompts = [pair.prompt_id for pair in pairs]
    for pair, scores in zip(pairs, scores_of(truth, pairs), strict=True):
        for writer, score in zip(pair.writers, scores, strict=True):
            found.setdefault(writer, []).append(score)
    return {str(writer): cluster_interval(values, prompts).as_dict() for writer, values in sorted(found.items())}


def _exchange(pair: Pair) -> dict[str, Any]:
    answers = sorted(zip(pair.writers, (pair.a, pair.b), strict=True), reverse=True)
    return {
        "prompt": "\n".join(m.content for m in pair.prompt),
        "answers": {f"policy {writer}": text for writer, text in answers},
    }


def _said(rate: Interval) -> str:
    return f"{rate.value:.1%} (95% interval {rate.low:.1%} to {rate.high:.1%})"
