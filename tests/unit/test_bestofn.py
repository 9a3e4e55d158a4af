"""Best-of-n: the files it writes are read back, the account says what the samples say, chunks survive."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from accord.config import BestOfNConfig, recipe_from
from accord.data.convert import as_kind
from accord.data.read import read_groups
from accord.data.templates import Template
from accord.errors import ConfigError
from accord.measures.selection import best_of_n_kl_bound, best_of_n_values
from accord.methods.bestofn import BestOfNSampling, write_best, write_ranked
from accord.methods.bestofn_account import Judged, bestofn_summary
from accord.methods.candidates import Drawing
from accord.methods.corpus import Corpus, Part
from accord.models.load import save_model
from accord.pipeline import run_stages
from accord.records import Group, Message, TokenGroup
from accord.report.stage import stage_report
from accord.rewards.scorers import FunctionScorer
from accord.rollout.native import NativeSampler
from models_support import PAD_ID, tiny_model, word_tokenizer

TEXTS = [["no", "yes", "maybe", "yes"], ["a", "b", "", "c"], ["same", "same", "same", "same"], ["x", "y", "z", " "]]
SCORES = [[1.0, 3.0, 2.0, 3.0], [5.0, 1.0, 9.0, 5.0], [1.0, 1.0, 1.0, 1.0], [4.0, 9.0, 2.0, 1.0]]
FINISHED = [[True] * 4, [True] * 4, [True] * 4, [True, False, True, True]]


def judged(*, penalty: float = 1.0, gold: Any = None, scores: Any = SCORES) -> Judged:
    """The answer y of the last prompt was cut: it competes with 9 less the penalty."""
    groups = tuple(Group((Message("user", f"p{i}"),), reference="ref" if i == 0 else None) for i in range(len(scores)))
    values, finished = np.array(scores), np.array(FINISHED)[: len(scores)]
    tokens = np.ones(values.shape, dtype=np.int64)
    rewards = values - penalty * ~finished
    return Judged(
        groups,
        TEXTS[: len(scores)],
        tokens,
        finished,
        values,
        rewards,
        np.ones_like(finished),
        None if gold is None else np.array(gold),
    )


# --- files -----------------------------------------------------------------------------------------------------------


def test_the_best_finished_answers_are_demonstrations(tmp_path: Path) -> None:
    """Not the empty answer of the second prompt, nor the cut one of the last, though both score best."""
    path = tmp_path / "best.jsonl"
    assert write_best(path, judged()) == 4
    result = read_groups(path)
    assert result.problem_count == 0
    assert {g.kind for g in result.groups} == {"sft"}
    found = [(g.prompt[0].content, g.completions[0].text) for g in as_kind(result.groups, "sft").groups]
    assert found == [("p0", "yes"), ("p1", "a"), ("p2", "same"), ("p3", "x")]
    assert result.groups[0].reference == "ref"


def test_rankings_hold_the_different_answers_best_first_and_teach_pairs(tmp_path: Path) -> None:
    path = tmp_path / "ranked.jsonl"
    assert write_ranked(path, judged(penalty=6.0)) == 3  # the third prompt has one answer only
    groups = read_groups(path).groups
    assert [[(c.text, c.rank, c.score) for c in g.completions] for g in groups] == [
        [("yes", 0, 3.0), ("maybe", 1, 2.0), ("no", 2, 1.0)],
        [("a", 0, 5.0), ("c", 0, 5.0), ("b", 1, 1.0)],
        [("x", 0, 4.0), ("y", 1, 3.0), ("z", 2, 2.0)],
    ]
    assert len(as_kind(groups, "ranked").groups) == 3
    assert len(as_kind(groups, "pairs").groups) == 3 + 2 + 3  # a and c tie


def test_of_equal_answers_the_best_placed_counts(tmp_path: Path) -> None:
    write_ranked(tmp_path / "ranked.jsonl", judged(scores=[[1.0, 3.0, 2.0, 5.0]]))
    (group,) = read_groups(tmp_path / "ranked.jsonl").groups
    assert [(c.text, c.score) for c in group.completions] == [("yes", 5.0), ("maybe", 2.0), ("no", 1.0)]


# --- the account -----------------------------------------------------------------------------------------------------


def test_the_summary_has_the_unbiased_curve_with_intervals_over_prompts() -> None:
    found = bestofn_summary(judged(), "the scorer", 4, 3)
    rows = {row["name"]: row for row in found["headline"]}
    assert rows["score of one answer"]["value"] == pytest.approx(np.mean(SCORES))
    assert rows["score of the best of 4"]["value"] == pytest.approx((3 + 9 + 1 + 9) / 4)
    assert rows["score of the best of 4"]["n"] == 4
    assert rows["KL bound"]["value"] == best_of_n_kl_bound(4)
    assert "more than 80.0% against a single answer" in found["account"][0]
    against_n, against_distance = found["curves"]
    expected = best_of_n_values(judged().rewards, SCORES).mean(axis=0)
    (series,) = against_n["series"]
    assert series["x"] == [1, 2, 3, 4] and series["y"] == pytest.approx(expected)
    assert all(low < y < high for low, y, high in zip(series["low"], series["y"], series["high"], strict=True))
    (gain,) = against_distance["series"]
    assert gain["x"] == pytest.approx([best_of_n_kl_bound(n) ** 0.5 for n in (1, 2, 3, 4)])
    assert gain["y"] == pytest.approx((expected - expected[0]) / np.std(SCORES))


def test_answers_are_chosen_by_the_penalised_score_and_told_by_the_plain_one() -> None:
    """With a penalty of 6 the last prompt's best is x, whose score is 4."""
    rows = {row["name"]: row for row in bestofn_summary(judged(penalty=6.0), "s", 4, 3)["headline"]}
    assert rows["score of the best of 4"]["value"] == pytest.approx((3 + 9 + 1 + 4) / 4)


def test_a_truth_that_falls_while_the_score_rises_is_a_warning_and_one_that_rises_is_none() -> None:
    scores = [[1.0, 2.0, 3.0, 4.0 + i] for i in range(4)]
    bad = bestofn_summary(judged(scores=scores, gold=[[3.0, 5.0, 4.0, -i / 9] for i in range(4)]), "s", 4, 3)
    assert "choosing among more answers exploits the scorer" in bad["warnings"][0]
    assert "highest for the best of" in bad["warnings"][0]
    assert len(bad["curves"]) == 3 and len(bad["curves"][2]["series"]) == 2
    good = bestofn_summary(judged(scores=scores, gold=scores), "s", 4, 3)
    assert good["warnings"] == []


def test_scores_that_tie_are_a_warning() -> None:
    found = bestofn_summary(judged(penalty=0.0, scores=[[2.0] * 4] * 4), "s", 4, 3)
    assert "All 4 answers score the same for 4 of 4 prompts" in found["warnings"][0]


def test_many_answers_make_a_curve_that_can_be_drawn() -> None:
    draw = np.random.default_rng(0).normal(size=(3, 300))
    groups = tuple(Group((Message("user", f"p{i}"),)) for i in range(3))
    texts = [[str(x) for x in row] for row in draw]
    ones = np.ones((3, 300), bool)
    many = Judged(groups, texts, np.ones((3, 300), np.int64), ones, draw, draw, ones, None)
    (series,) = bestofn_summary(many, "s", 3, 3)["curves"][0]["series"]
    assert len(series["x"]) < 70 and series["x"][0] == 1 and series["x"][-1] == 300


# --- sampling --------------------------------------------------------------------------------------------------------


def prompts(count: int) -> list[tuple[Group, TokenGroup]]:
    tokenizer = word_tokenizer()
    groups = [Group((Message("user", f"w{i + 2} w{i + 3}"),)) for i in range(count)]
    return [(g, TokenGroup(tuple(tokenizer.encode(g.prompt[0].content)), (), g.prompt_id)) for g in groups]


def sampling(folder: Path, monkeypatch: pytest.MonkeyPatch, gold: bool = False) -> BestOfNSampling:
    """Five prompts of four answers, two prompts a chunk."""
    monkeypatch.setattr("accord.methods.bestofn.CHUNK_COMPLETIONS", 8)
    scorer = FunctionScorer(lambda p, c: float(len(c)), "length")
    sampler = NativeSampler(tiny_model("gpt2", seed=1), pad_id=PAD_ID)
    drawing = Drawing(sampler, Template.of(word_tokenizer(), "auto"), scorer, scorer if gold else None)
    return BestOfNSampling(drawing, prompts(5), BestOfNConfig(n=4, max_new_tokens=5), folder, seed=3)  # type: ignore[call-arg]


def test_chunks_are_on_disk_when_their_step_ends_and_a_lost_one_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = sampling(tmp_path, monkeypatch, gold=True)
    assert made.total_steps == 3
    outcomes = [made.step(step) for step in (1, 2, 3)]
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert sorted(files) == ["000001.json", "000002.json", "000003.json"]
    assert [o.metrics["rollout/samples"] for o in outcomes] == [8, 16, 20]
    rows = [row for step in (1, 2, 3) for row in made.chunk(step).scores]
    assert np.array(rows).shape == (5, 4)
    assert made.chunk(1).gold == made.chunk(1).scores
    (tmp_path / "000002.json").unlink()
    again = sampling(tmp_path, monkeypatch, gold=True)
    assert [row for step in (1, 2, 3) for row in again.chunk(step).scores] == rows
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == files


# --- the stage -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tiny_model("llama", seed=1), word_tokenizer(), tmp_path_factory.mktemp("model") / "start")


def run(model: Path, out: Path, functions: dict[str, Any] | None = None, **bestofn: Any) -> dict[str, Any]:
    fields = {"n": 6, "max_new_tokens": 6} | bestofn
    data = {"max_tokens": 40, "holdout": 0.0}
    recipe = recipe_from({"model": {"path": str(model)}, "out": str(out), "data": data, "bestofn": fields})
    corpus = Corpus(prompts=Part.of([group for group, _ in prompts(7)], "prompts"))
    return run_stages(recipe, corpus, ["bestofn"], Console(quiet=True), functions)["bestofn"]


def length(prompt: str, completion: str) -> float:
    return float(len(completion))


def test_the_stage_leaves_files_that_sft_and_dpo_read_a_curve_and_a_report(model: Path, tmp_path: Path) -> None:
    gold = {"bestofn.gold_function": lambda p, c: -float(len(c))}
    summary = run(model, tmp_path, {"bestofn.reward_function": length, **gold}, missing_eos_penalty=0.0)
    folder = tmp_path / "bestofn"
    demonstrations, rankings = (read_groups(folder / f"{name}.jsonl") for name in ("best", "ranked"))
    assert f"{len(demonstrations.groups)} demonstrations" in " ".join(summary["account"])
    for group in rankings.groups:
        assert [c.score for c in group.completions] == [float(len(c.text)) for c in group.completions]
        assert len({c.text for c in group.completions}) == len(group.completions)
    best = {g.prompt[0].content: g.completions[0].text for g in demonstrations.groups}
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["rollout/samples"] == 42
    assert best and set(best) <= {group.prompt[0].content for group, _ in prompts(7)}
    assert summary["curves"][1]["title"] == "True utility of the best of n"
    assert any("exploits the scorer" in text for text in summary["warnings"])
    assert not (folder / "model").exists()
    page = stage_report(folder).read_text(encoding="utf-8")
    assert "Gain of the best of n against distance" in page and "Best-of-n" in page


def test_only_so_many_prompts_are_asked(model: Path, tmp_path: Path) -> None:
    run(model, tmp_path, {"bestofn.reward_function": length}, prompts=2)
    rows = [json.loads(line) for line in (tmp_path / "bestofn" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["rollout/prompts"] == 2


def test_something_must_score(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the bestofn stage needs something that scores"):
        run(model, tmp_path)
