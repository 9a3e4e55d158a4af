"""The speed benchmark's works and its arithmetic; what it times is not timed here."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

from accord.models.layout import collate
from accord.models.load import ModelShape, build_model, reward_model_from
from accord.models.token_scores import score_completions, score_tokens
from accord.profiling.observer import Observer
from benchmarks.speed import __main__ as speed
from benchmarks.speed import accord_sampler
from benchmarks.speed.__main__ import Setup, _chosen, main
from benchmarks.speed.counted import counted, own_flops, peer_flops
from benchmarks.speed.figure import write_bars
from benchmarks.speed.results import row_of, table, write_page
from benchmarks.speed.work import MODELS, TARGETS, WORKS, Timing, groups_of, pairs_of, reward, words

DPO = WORKS["dpo-long"]
SAME = [1.0] * DPO.updates
MACHINE: dict[str, Any] = {
    "date": "2030-01-02", "cpu": "abacus", "threads": 2, "memory_bytes": 8e9, "torch": "9", "allocator": "kept",
}  # fmt: skip


@pytest.mark.parametrize("name", WORKS)
def test_a_work_is_the_same_for_both_sides_and_every_answer_is_one(name: str) -> None:
    work = WORKS[name]
    steps = groups_of(work)
    assert steps == groups_of(work)
    assert [len(step) for step in steps] == [work.batch] * (work.updates if work.by_losses else 1)
    assert 0 <= work.warm_up < work.updates
    for group in steps[0][:16]:
        assert len(group.completions) == work.answers
        assert all(c.ids[-1] == 1 and 1 not in c.ids[:-1] and max(c.ids) < work.vocabulary for c in group.completions)
        assert len(pairs_of(group)) == work.answers * (work.answers - 1) // 2
        assert len(set(group.completions)) == work.answers


def timing(seconds: float, learned: list[float], peak: float) -> Timing:
    every = [9.0] * DPO.warm_up + [seconds] * (DPO.updates - DPO.warm_up)
    return Timing(1.0, every, learned, 100.0, peak, "1.0")


def row(**changed: Any) -> dict[str, Any]:
    own = [timing(seconds, SAME, 300.0) for seconds in (1.0, 2.0, 1.0)]
    peer = [timing(seconds, SAME, 600.0) for seconds in (3.0, 4.0, 5.0)]
    return row_of("dpo-long", DPO, own, peer) | changed


def test_a_ratio_is_of_two_runs_side_by_side() -> None:
    found = row()
    assert (found["ratio_low"], found["ratio"], found["ratio_high"]) == (2.0, 3.0, 5.0)
    assert (found["accord"], found["peer"], found["unit"], found["memory_ratio"]) == (16.0, 4.0, "pairs/s", 0.5)
    assert found["same_learning"] and "| 2.3x | 3.00x (2.00 to 5.00) | 3.5x |" in table([found])
    assert "| 0.50x (300 / 600 MB) | 0.5x reached |" in table([found])


def test_what_happens_once_is_in_a_ratio_of_its_own() -> None:
    """Of one second once, nine in the update that warms up and four timed ones: 10 + 4 * (3, 4, 5) over 10 + 4 * (1, 2,
    1) are 1.57, 1.44 and 2.14."""
    assert row()["ratio_with_once"] == pytest.approx(22 / 14)


def test_a_work_is_chosen_by_its_name_or_by_how_names_begin(capsys: pytest.CaptureFixture[str]) -> None:
    assert _chosen("ppo") == ["ppo"] and _chosen("sampling-1") == ["sampling-1"]
    assert _chosen("rloo") == ["rloo-short", "rloo-long"] and _chosen("") == list(WORKS)
    assert set(WORKS) == set(TARGETS)
    with pytest.raises(SystemExit) as stopped:
        _chosen("nonsense")
    assert stopped.value.code == 2 and "no work begins with 'nonsense'; there are sft-fixed" in capsys.readouterr().err


def test_learning_is_compared_update_by_update_and_by_the_runs_apart_where_there_are_any() -> None:
    same, other = timing(1.0, SAME, 300.0), timing(1.0, [*SAME[:-1], 1.001], 300.0)
    assert not row_of("dpo-long", DPO, [same], [other])["same_learning"]
    assert row_of("dpo-long", DPO, [same], [other], apart=(same, same))["same_learning"]
    assert not row_of("dpo-long", DPO, [same], [same], apart=(same, other))["same_learning"]
    with pytest.raises(ValueError, match="shorter"):
        row_of("dpo-long", DPO, [same], [replace(same, learned=SAME[1:])])


def test_amounts_are_those_of_what_is_timed() -> None:
    # 4 prompts with 8 answers each: an iteration is 32 answers; sampling counts new tokens only.
    assert WORKS["grpo-short"].amount(groups_of(WORKS["grpo-short"])[0]) == 32
    assert WORKS["sampling-16"].amount(groups_of(WORKS["sampling-16"])[0]) == 16 * 64


def test_the_reward_is_the_share_of_even_words() -> None:
    assert reward(words((2, 3, 4, 6))) == 0.75
    assert reward("<end>") == 0.0


def test_results_replace_what_stands_between_the_marks_and_nothing_else(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- measured: begin -->\nold\n<!-- measured: end -->\nafter\n")
    machine, rows = MACHINE, [row(work=name) for name in WORKS]
    write_page(page, {"machine": machine, "rows": rows})
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    assert "2030-01-02: abacus, 2 threads, 8 GB" in text and table(rows) in text
    write_page(page, {"machine": machine, "rows": rows})
    assert page.read_text() == text
    page.write_text("no marks")
    with pytest.raises(ValueError, match="each once"):
        write_page(page, {"machine": machine, "rows": rows})
    page.write_text(text)
    with pytest.raises(ValueError, match=r"these results lack dpo-long, dpo-long-15m.*--later"):
        write_page(page, {"machine": machine, "rows": []})
    assert page.read_text() == text


def test_works_measured_later_replace_the_full_runs_and_are_dated(tmp_path: Path) -> None:
    """sampling-1 is measured three times, sampling-1-compiled first in the second file; the last file has its way."""
    full = {"machine": MACHINE, "rows": [row(work=name) for name in WORKS if name != "sampling-1-compiled"]}
    works = {"2031-01-01": ("sampling-1", "sampling-1-compiled"), "2032-01-01": ("sampling-1",)}
    later = [
        {"machine": MACHINE | {"date": date}, "rows": [row(work=work, accord=float(date[:4])) for work in names]}
        for date, names in works.items()
    ]
    paths = [tmp_path / f"{number}.json" for number in range(3)]
    for path, results in zip(paths, (full, *later), strict=True):
        path.write_text(json.dumps(results))
    page, figure = tmp_path / "page.md", tmp_path / "page.svg"
    page.write_text("<!-- measured: begin -->\n<!-- measured: end -->\n")
    files = ["--out", str(paths[0]), "--later", str(paths[1]), "--later", str(paths[2])]
    main([*files, "--page", str(page), "--figure", str(figure)])
    text = page.read_text()
    lines = {line.split(" | ")[0]: line for line in text.splitlines() if line.startswith("| ")}
    assert "| 2,032.0 |" in lines["| sampling-1"] and "| 2,031.0 |" in lines["| sampling-1-compiled"]
    assert "| 16.0 |" in lines["| sampling-16"] and list(lines)[-1] == "| sampling-1-compiled"
    assert "Measured on 2030-01-02: abacus" in text
    assert re.search(r"Measured later, on 2031-01-01: .* 3 turns: sampling-1-compiled\.\n", text)
    assert re.search(r"Measured later, on 2032-01-01: .* 3 turns: sampling-1\.\n", text)
    assert "sampling-1-compiled" in figure.read_text()


@pytest.mark.parametrize("compiled", [False, True])
def test_what_compiles_is_no_timed_call(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[object] = []

    class Sampler:
        def __init__(self, model: object, *, pad_id: int, compiled: bool) -> None:
            calls.append(compiled)

        def generate(self, prompts: list[object], n: int, sampling: object, key: object) -> list[object]:
            calls.append(key)
            return []

    monkeypatch.setattr(accord_sampler, "NativeSampler", Sampler)
    monkeypatch.setattr(accord_sampler, "load_policy", lambda folder: (None, None))
    work = WORKS["sampling-1-compiled" if compiled else "sampling-1"]
    timing = accord_sampler.run(work, Path(), False)
    timed = [("speed", number) for number in range(1, work.calls(False) + 1)]
    assert calls == [compiled, *([("speed", 0)] if compiled else []), *timed]
    assert len(timing.seconds) == len(timed)


def test_works_without_their_peer_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    setup = Setup(1, "kept", tmp_path / "no-python")
    monkeypatch.setattr(speed, "find_spec", lambda name: None)
    for name, said in (("sft-fixed", "`make bench` does that, or pip install -e '.[bench]'"), ("ppo", "--ppo-python")):
        with pytest.raises(SystemExit) as stopped:
            speed._measure([name], 1, setup, tmp_path / "out.json")
        assert stopped.value.code == 2 and said in capsys.readouterr().err
    speed._peers_are_there(["sampling-1"], setup)


def test_the_figure_draws_every_work_and_marks_what_does_not_learn_the_same(tmp_path: Path) -> None:
    path = tmp_path / "figure.svg"
    write_bars(path, [row(), row(work="other", same_learning=False)])
    texts = [element.text for element in ElementTree.parse(path).iter() if element.tag.endswith("text")]
    assert {"dpo-long", "other", "3.00x", "3.00x *", "0.50"} <= set(texts)
    bars = [e for e in ElementTree.parse(path).iter() if e.tag.endswith("rect") and "bar" in e.get("class", "")]
    # The axis of speed ends at 5 or above, that of memory at 1: 3 of 5 against half.
    assert [float(bar.get("width", 0)) for bar in bars[:2]] == [180.0, 150.0]


@pytest.mark.parametrize("name", ["dpo-long", "dpo-short", "reward-long"])
def test_accords_operations_are_those_that_a_pass_runs(name: str) -> None:
    """A prompt of the work as the trainers run it, watched. What a scalar head does is not counted."""
    work = WORKS[name]
    hidden, layers, heads, mlp = MODELS[work.model]
    shape = ModelShape(hidden, layers, heads, 1024, intermediate_size=mlp)
    model = build_model(shape, vocab_size=work.vocabulary, pad_id=0, eos_id=1, seed=0)
    batch = collate(groups_of(work)[0][:1], layout="shared", pad_id=0)
    observer = Observer()
    with torch.no_grad(), observer.watching():
        if work.kind == "reward":
            score_completions(reward_model_from(model, 0), batch)
        else:
            score_tokens(model, batch)
    seen = observer.outside["other"]
    assert seen.useful + seen.overhead == pytest.approx(own_flops(work), rel=1e-9)


def test_the_peers_operations_by_hand() -> None:
    """Two rows of 224 tokens: five blocks of 4 * 256^2 + 3 * 256 * 688 = 790,528 weights and 4 * 256 operations for
    each of 224 pairs a token, and 4,096 words of 256."""
    assert peer_flops(DPO) == 2 * 224 * (2 * 5 * 790_528 + 5 * 4 * 256 * 224 + 2 * 4096 * 256)
    assert peer_flops(WORKS["reward-ranked"]) == 15 * 2 * 224 * (2 * 5 * 790_528 + 5 * 4 * 256 * 224)
    assert counted(WORKS["sft-fixed"]) == pytest.approx(1, abs=1e-3)
    assert counted(WORKS["sft-mixed"]) is None is counted(WORKS["rloo-long"])
