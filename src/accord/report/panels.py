"""The charts of both kinds of page, made from records, with their explanations from the registry of metrics."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from accord.metrics import REDUCTIONS, Metric, check
from accord.report.html import Html, element, join, number, quantity, with_interval
from accord.report.reading import Curve, Estimate, Points, Run
from accord.report.svg import ForestRow, Series, calibration_plot, forest_plot, histogram, legend, xy_chart

__all__ = [
    "OVERVIEW_PANELS",
    "PANELS",
    "calibration_figure",
    "comparison_figure",
    "curve_figure",
    "grid",
    "metric_figures",
    "other_metric_figures",
    "over_optimisation_figure",
    "score_figure",
]

# Chart title -> the metrics drawn together. In reading order, most telling first; a stage shows what it logged.
PANELS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("Score from the reward model", ("rollout/score/mean", "eval/score/mean")),
    ("Score of what is kept", ("rollout/kept_score/mean",)),
    ("What is kept", ("rollout/kept_fraction", "rollout/kept_distinct_fraction")),
    ("Score of the hold-out judge", ("rollout/holdout_score/mean",)),
    ("Gold utility", ("rollout/gold_utility/mean", "eval/gold_utility/mean")),
    ("Distance from the reference", ("rollout/kl_per_sequence_nats", "eval/kl_per_sequence_nats")),
    ("Length", ("rollout/completion_tokens/mean", "eval/completion_tokens/mean")),
    ("Loss", ("train/loss", "eval/loss")),
    ("Accuracy on comparisons", ("train/accuracy", "eval/accuracy")),
    ("Margin between the answers", ("train/margin/mean", "eval/margin/mean")),
    ("Implicit rewards of the answers", ("train/chosen_reward/mean", "train/rejected_reward/mean")),
    ("Log-probability of the answers", ("train/chosen_logprob/mean", "train/rejected_logprob/mean")),
    ("Implicit rewards of the answers", ("train/desirable_reward/mean", "train/undesirable_reward/mean")),
    ("Log-probability of the answers", ("train/desirable_logprob/mean", "train/undesirable_logprob/mean")),
    ("How samples end", ("rollout/finished_fraction", "rollout/truncated_fraction")),
    ("Variety", ("rollout/distinct_2", "rollout/repetition")),
    ("Alike, stock and fashionable", ("rollout/self_similarity", "rollout/duplicate_fraction", "rollout/word_rise")),
    ("Answers unknown to the reward model", ("rollout/outlier_fraction",)),
    ("Score and length", ("rollout/length_correlation",)),
    ("Entropy", ("train/entropy_nats", "rollout/entropy_nats")),
    ("Value model", ("train/explained_variance",)),
    ("Size of the updates", ("train/approx_kl",)),
    ("Clipped tokens", ("train/clip_fraction", "train/value_clip_fraction")),
    ("Gradient norm", ("train/grad_norm", "train/value_grad_norm")),
    ("Learning rate", ("train/learning_rate", "train/value_learning_rate")),
    ("Where the time goes", ("time/generate_seconds", "time/score_seconds", "time/update_seconds")),
)

OVERVIEW_PANELS = PANELS[1:7]

_BETTER = {"up": " Higher is better.", "down": " Lower is better.", "neutral": ""}
_MOST_POINTS = 160  # per line; more cannot be told apart at this width and make the file large


def figure(title: str, chart: Html, *, key: Html | None = None, trend: str = "", caption: Html | str = "") -> Html:
    right = element("span", trend, class_="trend") if trend else None
    head = element("div", element("h3", title), right, class_="figure-head")
    return element("figure", head, key, chart, element("figcaption", caption) if caption else None)


def grid(figures: Iterable[Html | None]) -> Html | None:
    """Figures as cards, two to a row, one on narrow screens."""
    shown = [element("div", item, class_="card") for item in figures if item is not None]
    return element("div", *shown, class_="grid") if shown else None


def metric_figures(run: Run, panels: Sequence[tuple[str, tuple[str, ...]]] = PANELS) -> list[Html | None]:
    """The charts of the metrics that matter."""
    return [_metric_figure(title, names, run) for title, names in panels]


def other_metric_figures(run: Run) -> Html | None:
    """Every logged metric that `metric_figures` leaves out, folded away. Raises UnknownMetric for undeclared names."""
    panelled = {name for _, names in PANELS for name in names}
    figures = [_metric_figure(name, (name,), run) for name in sorted(run.metrics) if name not in panelled]
    if not figures:
        return None
    return element("details", element("summary", f"All other metrics ({len(figures)})"), grid(figures), class_="more")


def _metric_figure(title: str, names: Iterable[str], run: Run) -> Html | None:
    logged = [check(name) for name in names if name in run.metrics]
    if not logged:
        return None
    series = [_thinned(metric.name, run.metrics[metric.name], colour) for colour, metric in enumerate(logged)]
    unit = logged[0].unit
    chart = xy_chart(series, title=title, x_label="step", y_label=unit)
    caption = join(
        [
            *map(_explained, logged),
            "The band holds all steps behind each point." if any(item.lows for item in series) else None,
            element("details", element("summary", "What is drawn, exactly"), element("dl", *map(_defined, logged))),
        ]
    )
    return figure(title, chart, key=legend(series), trend=_trend(series[0], unit), caption=caption)


def _explained(metric: Metric) -> Html:
    hover = f"{metric.formula} ({_facts(metric)})"
    return element("p", element("code", metric.name, title=hover), f" {metric.meaning}{_BETTER[metric.direction]}")


def _defined(metric: Metric) -> Html:
    """The same as the hover text, for screens without a pointer."""
    definition = element("dd", element("code", metric.formula), f" {_facts(metric)}")
    return join([element("dt", element("code", metric.name)), definition])


def _facts(metric: Metric) -> str:
    return ", ".join(filter(None, (metric.unit, REDUCTIONS[metric.reduction])))


def _trend(series: Series, unit: str) -> str:
    finite = [y for y in series.ys if math.isfinite(y)]
    bare = unit if unit in {"fraction", "seconds"} else None
    ends = [quantity(y, bare) for y in (finite[:1] + finite[-1:])]
    return " \u2192 ".join(dict.fromkeys(ends))


def _thinned(label: str, points: Points, colour: int) -> Series:
    """The points as a line; a long run becomes means of neighbouring steps, with a band from smallest to largest."""
    width = math.ceil(len(points) / _MOST_POINTS)
    if width <= 1:
        return Series(label, tuple(x for x, _ in points), tuple(y for _, y in points), colour)
    buckets = [points[start : start + width] for start in range(0, len(points), width)]
    finite = [[y for _, y in bucket if math.isfinite(y)] or [math.nan] for bucket in buckets]
    lows, highs = tuple(map(min, finite)), tuple(map(max, finite))
    varies = any(low < high for low, high in zip(lows, highs, strict=True))
    return Series(
        label,
        tuple(sum(x for x, _ in bucket) / len(bucket) for bucket in buckets),
        tuple(sum(ys) / len(ys) for ys in finite),
        colour,
        lows=lows if varies else (),
        highs=highs if varies else (),
    )


def over_optimisation_figure(run: Run) -> Html | None:
    """Proxy reward and gold utility against sqrt(KL): a dot per rollout step and a smoothed line each.

    The two have different scales, so both are gains over the first rollout in units of the standard deviation among
    its samples (plain gains where that was not logged for both). Axis: Gao et al. 2022, arXiv:2210.10760.
    """
    kl = dict(run.metrics.get("rollout/kl_per_sequence_nats", ()))
    # Gold first, as among the judges of win rates: each has one colour on the page.
    names = {"rollout/gold_utility": "gold: true utility", "rollout/score": "proxy: the reward model"}
    logged = [name for name in names if f"{name}/mean" in run.metrics]
    spreads = {name: _first_spread(run.metrics.get(f"{name}/std", ())) for name in logged}
    scaled = all(spreads.values())
    series: list[Series] = []
    for colour, name in enumerate(logged):
        values = [
            (math.sqrt(max(0.0, kl[step])), value)
            for step, value in run.metrics[f"{name}/mean"]
            if math.isfinite(value) and math.isfinite(kl.get(step, math.nan))
        ]
        if len(values) < 3:
            continue
        label, unit, first = names[name], spreads[name] if scaled else 1.0, values[0][1]
        dots = sorted((x, (value - first) / unit) for x, value in values)
        xs, ys = tuple(x for x, _ in dots), tuple(y for _, y in dots)
        line_xs, line_ys = smoothed(xs, ys)
        series.append(Series("", xs, ys, colour, draw="points", labels=tuple(f"{label} at {number(x)}" for x in xs)))
        series.append(Series(label, line_xs, line_ys, colour))
    if not series:
        return None
    y_label = "gain (SDs of the first rollout)" if scaled else "gain since the first rollout"
    title = "Reward against distance"
    chart = xy_chart(series, title=title, x_label="\u221aKL to the reference (\u221anats)", y_label=y_label)
    return figure(title, chart, key=legend(series), caption=_over_optimisation_caption(series))


def _first_spread(points: Points) -> float:
    return next((spread for _, spread in points if spread > 0), 0.0)


def _over_optimisation_caption(series: Sequence[Series]) -> str:
    text = "Each dot is one rollout; the lines are smoothed. "
    for line in (item for item in series if item.draw == "line"):
        best = max(range(len(line.ys)), key=line.ys.__getitem__)
        name, end = line.label.partition(":")[0].capitalize(), number(line.ys[-1])
        if best == len(line.ys) - 1:
            text += f"{name} is highest at the largest distance ({end}). "
        else:
            text += f"{name} peaks at \u221aKL {number(line.xs[best])} ({number(line.ys[best])}) and ends at {end}. "
    if sum(item.draw == "line" for item in series) == 2:
        text += "Where the proxy still climbs and gold falls, the policy exploits the reward model."
    return text


def smoothed(xs: Sequence[float], ys: Sequence[float]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Local linear regression of y on x with a Gaussian kernel an eighth of the range wide, on 60 even positions.

    Linear inside the window, so the ends are not pulled towards the middle. Source: Cleveland 1979 (without the
    robustness steps).
    """
    low, high = min(xs), max(xs)
    width = (high - low) / 8
    if width == 0:
        return (low,), (sum(ys) / len(ys),)
    grid = [low + (high - low) * i / 59 for i in range(60)]
    return tuple(grid), tuple(_local_line(xs, ys, x, width) for x in grid)


def _local_line(xs: Sequence[float], ys: Sequence[float], at: float, width: float) -> float:
    weights = [math.exp(-0.5 * ((x - at) / width) ** 2) for x in xs]
    total = sum(weights)
    mean_x = sum(w * x for w, x in zip(weights, xs, strict=True)) / total
    mean_y = sum(w * y for w, y in zip(weights, ys, strict=True)) / total
    spread = sum(w * (x - mean_x) ** 2 for w, x in zip(weights, xs, strict=True))
    covariance = sum(w * (x - mean_x) * (y - mean_y) for w, x, y in zip(weights, xs, ys, strict=True))
    # A window that holds one point only has no slope to speak of.
    slope = covariance / spread if spread > 1e-6 * total * width**2 else 0.0
    return mean_y + slope * (at - mean_x)


def curve_figure(curve: Curve) -> Html:
    chart = xy_chart(curve.series, title=curve.title, x_label=curve.x_label, y_label=curve.y_label)
    return figure(curve.title, chart, key=legend(curve.series), caption=curve.note)


def calibration_figure(run: Run) -> Html | None:
    if not run.calibration:
        return None
    chart = calibration_plot(run.calibration, title="Calibration of the reward model")
    total = sum(n for _, _, n in run.calibration)
    caption = (
        "When the reward model is 80% sure which answer is preferred, it should be right 8 times in 10: the points "
        f"should lie on the diagonal. Bars are 95% intervals, n = {number(total)} held-out comparisons."
    )
    return figure("Calibration of the reward model", chart, caption=caption)


def score_figure(run: Run) -> Html | None:
    """Scores of the first and the last logged samples, overlaid."""
    by_step: dict[int, list[float]] = {}
    for sample in run.samples:
        if sample.score is not None and math.isfinite(sample.score):
            by_step.setdefault(sample.step, []).append(sample.score)
    full = sorted(step for step, scores in by_step.items() if len(scores) >= 8)
    if len(full) < 2:
        return None
    groups = [(f"step {step}", by_step[step]) for step in (full[0], full[-1])]
    title = "Scores of the samples"
    key = legend([Series(label, (), (), colour, draw="points") for colour, (label, _) in enumerate(groups)])
    counts = " and ".join(f"n = {len(scores)} at {label}" for label, scores in groups)
    return figure(title, histogram(groups, title=title, x_label="score"), key=key, caption=f"Logged samples: {counts}.")


def comparison_figure(comparisons: Sequence[Estimate], title: str = "Win rates") -> Html | None:
    """Forest plot and, beside it, what each row says in words."""
    rows = [item for item in comparisons if math.isfinite(item.value)]
    if not rows:
        return None
    judges = list(dict.fromkeys(item.source for item in rows))
    plot = forest_plot(
        [ForestRow(item.name, item.value, item.low, item.high, item.n, judges.index(item.source) % 6) for item in rows],
        title=title,
    )
    key = legend([Series(judge, (), (), colour % 6, draw="points") for colour, judge in enumerate(judges)])
    verdicts = element("ul", *(_verdict(item) for item in rows), class_="verdicts")
    caption = "Bars are 95% intervals. At 50% the two are equally good; ties count half."
    return element("div", figure(title, plot, key=key, caption=caption), verdicts, class_="card split")


def _verdict(item: Estimate) -> Html:
    if item.low is None or item.high is None:
        words = "no interval given, so nothing can be concluded"
    elif item.low > 0.5:
        words = "better, by more than chance explains"
    elif item.high < 0.5:
        words = "worse, by more than chance explains"
    else:
        words = "no difference shown: the interval includes 50%"
    judge = f", judged by {item.source}" if item.source else ""
    detail = f"{with_interval(item.value, item.low, item.high, item.n, item.unit)}{judge}"
    return element("li", element("b", item.name), f": {words}.", element("div", detail, class_="detail"))
