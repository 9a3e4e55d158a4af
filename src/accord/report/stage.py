"""The report of one stage: `stage_report(folder)` reads a run folder and writes `report.html` into it.

What it reads. Every file and every key marked * may be missing; what is missing is not shown.

    config.yaml     shown as it is
    run.json        free form: versions, command, seed, hardware, ...; shown as a table with dotted keys
    metrics.jsonl   {"step": int, "<declared metric>": number | null, ...}; null and NaN are gaps in the curve
    samples.jsonl   {"step": int, "prompt": str, "completion": str, "score"*: number | null, <anything else>};
                    of a conversation, "completion" is the last answer and messages* [{role, content}] all that was said
    summary.json    written last, so a folder without it is a run in progress:
        stage*          str, which stage this is: sft, reward, ppo, evaluate, ...
        seconds*        number
        headline*       [{name, value, low*, high*, n*, unit*, meaning*, model*}]; low and high bound the 95% interval.
                        Where name is a declared metric, unit and meaning are filled in. Unit "fraction" is shown as
                        percent, "seconds" as a duration. Numbers with a model make a table, a column for each model
        account*        [str], paragraphs in plain words: what happened
        warnings*       [str]
        comparisons*    [{name, value, low*, high*, n*, judge*}], win rates in [0, 1], named like "ppo over sft"; judge
                        "gold" is the true utility
        win_rates*      {name: {value, low*, high*, n*, judge*}}, the same in the form of a whole run's summary
        calibration*    [{predicted, observed, n}], of held-out comparisons, one per bin: how sure the reward
                        model is that the answer with the higher score is preferred, in [0.5, 1], and how often it is
        curves*         [{title, x_label, y_label, note*, series: [{label, x, y, low*, high*, labels*, draw*}]}]; draw
                        is "line", "points" or "labelled" (points with their labels printed)
        guards*         [{title, worst, step, at_end, seen*, advice*}], what each alarm said: OK, WARN or ALERT, and
                        the step at which the worst was first reached
        side_by_side*   [{prompt, answers: {who: text}, scores*: {who: number}, gold*: {who: number}}]; gold is the
                        true utility, where a simulator knows it
"""

from __future__ import annotations

from pathlib import Path

from accord.atomic import write_text
from accord.report.blocks import account, exchanges, guard_table, key_figures, key_value_table, warnings
from accord.report.html import Html, duration, element, number, page, section
from accord.report.panels import (
    calibration_figure,
    comparison_figure,
    curve_figure,
    grid,
    metric_figures,
    other_metric_figures,
    over_optimisation_figure,
    score_figure,
)
from accord.report.reading import Answer, Exchange, Run, Sample, read_run

__all__ = ["STAGES", "stage_report", "stage_title"]

# stage -> its title and what it does, in one sentence for a newcomer
STAGES: dict[str, tuple[str, str]] = {
    "base": ("Base model", "A new model with random weights, and a tokenizer trained on the recipe's text."),
    "sft": ("Supervised fine-tuning", "The model learns to answer by imitating demonstrations."),
    "annotate": (
        "Annotators",
        "The fine-tuned model answers each question twice; people, here simulated, say which answer is better.",
    ),
    "sample": ("Pairs of answers", "The newest policy answers prompts, for people to say which answer is better."),
    "label": ("Labels", "People, or a function that simulates them, choose between the answers of each pair."),
    "reward": ("Reward model", "A second model learns to score answers from comparisons that annotators made."),
    "dpo": (
        "DPO",
        "The model learns from pairs which answer people prefer, directly, paying for every step away from where it "
        "started.",
    ),
    "orpo": ("ORPO", "The model imitates the preferred answers and learns to tell them from the others, in one stage."),
    "kto": (
        "KTO",
        "The model learns from single answers, each marked good or bad, paying for every step away from where it "
        "started.",
    ),
    "ilql": (
        "ILQL",
        "The model learns from answers with returns what each next token is worth, and leans towards the better ones "
        "when it writes.",
    ),
    "ppo": (
        "PPO",
        "The model writes answers, the reward model scores them, and the model moves towards what scores well, "
        "paying for every step away from where it started.",
    ),
    "rft": (
        "Rejection sampling",
        "The model writes many answers to each prompt, and learns to imitate those of its own that score best.",
    ),
    "rloo": (
        "RLOO",
        "The model writes several answers to each prompt; those that score better than the others become likelier, "
        "the others less likely.",
    ),
    "grpo": (
        "GRPO",
        "The model writes a group of answers to each prompt; those above the group's mean become likelier, those below "
        "it less likely.",
    ),
    "reinforce": (
        "REINFORCE",
        "The model writes answers; those that score above the average of all become likelier, the others less likely.",
    ),
    "online_dpo": (
        "Online DPO",
        "The model writes several answers to each prompt, and learns to prefer the best of them to the worst.",
    ),
    "bestofn": (
        "Best-of-n",
        "The model writes many answers to each prompt, and the one that scores best is kept. Nothing is trained.",
    ),
    "evaluate": ("Evaluation", "The models answer held-out prompts, and a blind judge compares their answers."),
}
_FIRST_SAMPLES, _LAST_SAMPLES = 4, 8


def stage_report(run_folder: Path) -> Path:
    """Write `report.html` into the run folder and return its path. Raises DataError, UnknownMetric."""
    run = read_run(run_folder)
    title = stage_title(run)
    state = f"took {duration(run.seconds)}" if run.seconds is not None else ""
    if not run.finished:
        state = "not finished: there is no summary yet"
    header = element(
        "header",
        element("p", "Accord stage report", class_="eyebrow"),
        element("h1", title),
        element("p", " \u00b7 ".join(filter(None, (run_folder.resolve().name, state))), class_="sub"),
        element("p", STAGES[run.stage][1]) if run.stage in STAGES else None,
        *warnings(run.warnings),
    )
    parts = [
        ("Headline numbers", list(key_figures(run.headline))),
        ("What happened", [account(run.account)] if run.account else []),
        ("Guards", [guard_table(run.guards)]),
        ("Comparisons", [comparison_figure(run.comparisons)]),
        ("Curves", _curves(run)),
        ("Samples", list(exchanges((*run.side_by_side, *_over_time(run.samples))))),
        ("Configuration and versions", _provenance(run)),
    ]
    shown = [(name, [child for child in children if child is not None]) for name, children in parts]
    sections = [(name, section(name, *children)) for name, children in shown if children]
    path = run_folder / "report.html"
    write_text(path, page(f"{title} \u00b7 Accord", header, sections))
    return path


def stage_title(run: Run) -> str:
    return STAGES[run.stage][0] if run.stage in STAGES else run.stage


def _curves(run: Run) -> list[Html | None]:
    special = [
        over_optimisation_figure(run),
        calibration_figure(run),
        score_figure(run),
        *map(curve_figure, run.curves),
    ]
    return [grid([*special, *metric_figures(run)]), other_metric_figures(run)]


def _over_time(samples: tuple[Sample, ...]) -> list[Exchange]:
    """The first and the last logged prompts, each with its first completion and, if it came back, its last one."""
    by_prompt: dict[str, list[Sample]] = {}
    for sample in sorted(samples, key=lambda sample: sample.step):
        by_prompt.setdefault(sample.prompt, []).append(sample)
    told = [
        Exchange(prompt, tuple(map(_answer, group if len(group) < 3 else (group[0], group[-1]))))
        for prompt, group in by_prompt.items()
    ]
    return told if len(told) <= _FIRST_SAMPLES + _LAST_SAMPLES else told[:_FIRST_SAMPLES] + told[-_LAST_SAMPLES:]


def _answer(sample: Sample) -> Answer:
    score = () if sample.score is None else (f"score {number(sample.score)}",)
    return Answer(f"step {sample.step}", sample.completion, (*score, *sample.notes))


def _provenance(run: Run) -> list[Html | None]:
    notes = warnings(run.notes)
    config = element("details", element("summary", "Configuration"), element("pre", run.config), class_="more")
    facts = element("details", element("summary", "Run and versions"), key_value_table(run.facts), class_="more")
    return [config if run.config else None, facts if run.facts else None, *notes]
