"""The registry of metrics: complete entries, one clear error for unknown names, and documentation that keeps up."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from accord.errors import AccordError
from accord.metrics import FAMILIES, GROUPS, METRICS, REDUCTIONS, Metric, UnknownMetric, check

ROOT = Path(__file__).resolve().parents[2]


def test_check_returns_the_declaration() -> None:
    metric = check("rollout/kl_per_sequence_nats")
    assert (metric.group, metric.unit, metric.direction) == ("rollout", "nats per completion", "down")


def test_titles_are_names_in_words() -> None:
    names = ("rollout/kl_per_sequence_nats", "rollout/score/mean", "eval/win_rate", "train/approx_kl")
    assert [check(name).title for name in names] == ["KL per sequence", "Mean score", "Win rate", "Approx KL"]


def test_a_family_declares_one_metric_for_each_name() -> None:
    metric = check("rollout/scorer/short_answers/mean")
    assert (metric.name, metric.title) == ("rollout/scorer/short_answers/mean", "Mean scorer short answers")
    for name in ("rollout/scorer//mean", "rollout/scorer/a/b/mean", "rollout/scorer/a", "rollout/scorer/*/mean"):
        with pytest.raises(UnknownMetric):
            check(name)


def test_an_unknown_name_is_an_error_that_names_the_nearest_one() -> None:
    with pytest.raises(UnknownMetric, match=r"unknown metric `train/los`: did you mean `train/loss`\?") as caught:
        check("train/los")
    assert isinstance(caught.value, AccordError) and isinstance(caught.value, LookupError)


def test_a_name_near_nothing_points_at_the_documentation() -> None:
    with pytest.raises(UnknownMetric, match=r"docs/metrics\.md"):
        check("zzzzzzzz")


@pytest.mark.parametrize("metric", METRICS.values(), ids=lambda metric: metric.name)
def test_every_declaration_is_complete(metric: Metric) -> None:
    assert METRICS[metric.name] is metric
    assert metric.group in GROUPS
    assert metric.reduction in REDUCTIONS
    assert metric.direction in {"up", "down", "neutral"}
    assert metric.formula and metric.meaning.endswith(".")
    for suffix, units in {"_seconds": {"seconds"}, "_fraction": {"fraction"}, "_mb": {"MB"}}.items():
        assert not metric.name.endswith(suffix) or metric.unit in units


def test_no_name_is_declared_twice() -> None:
    source = (ROOT / "src/accord/metrics.py").read_text(encoding="utf-8")
    assert source.count('    Metric("') == len(METRICS) + len(FAMILIES)


def test_the_documentation_page_is_what_the_registry_says() -> None:
    spec = importlib.util.spec_from_file_location("generate_docs", ROOT / "scripts/generate_docs.py")
    assert spec and spec.loader
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    written = (ROOT / "docs/metrics.md").read_text(encoding="utf-8")
    assert written == script.metrics_page(), "run `python scripts/generate_docs.py`"
