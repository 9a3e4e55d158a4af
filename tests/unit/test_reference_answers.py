"""People's own answers as a yardstick: ROUGE while SFT trains, and an opponent in the evaluation."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from accord.config import recipe_from
from accord.errors import ConfigError
from accord.evaluation.references import HUMAN
from accord.measures.overlap import rouge_intervals
from accord.measures.text import rouge, rouge_l
from accord.methods.context import LoadedPolicy
from accord.methods.corpus import Corpus, Part, split_holdout
from accord.pipeline import run_stages
from accord.records import Group, Message, SampledCompletion
from stages_support import answers_to, logged, run_stage_on, saved_model

DEMONSTRATIONS = [
    answers_to(f"say it {i} times", (" ".join(["yes", "no", "maybe"][: 1 + i % 3] * 2), {})) for i in range(30)
]


def demonstrations(groups: list[Group] = DEMONSTRATIONS) -> Part:
    return Part.of(groups, "demonstrations")


def evaluate(
    model: Path, out: Path, prompts: list[Group], section: dict[str, Any] | None = None
) -> tuple[dict[str, Any], str]:
    """An evaluation of two equal-sized models by the length of their answers."""
    other = saved_model(out / "other", DEMONSTRATIONS, seed=7)
    settings = {"models": [str(model), str(other)], "max_new_tokens": 8, "against_references": True, **(section or {})}
    tree = {"model": {"path": str(model)}, "threads": 1, "out": str(out), "data": {"max_tokens": 64}}
    recipe = recipe_from(tree | {"evaluate": settings})
    screen = io.StringIO()
    corpus = Corpus(evaluation=Part.of(prompts, "prompts"))
    functions = {"evaluate.gold_function": lambda prompt, completion: float(len(completion))}
    summary = run_stages(recipe, corpus, ["evaluate"], Console(file=screen, width=300), functions)["evaluate"]
    return summary, screen.getvalue()


def asked() -> list[Group]:
    return [Group(g.prompt, reference=g.completions[0].text) for g in DEMONSTRATIONS[:6]]


def test_rouge_intervals_average_over_the_answers_with_a_reference() -> None:
    """By hand: "a b" against "a c" shares one of two words each, F1 1/2; "d" against "d" is 1; the mean is 3/4."""
    found = rouge_intervals(["a b", "d", "e"], ["a c", "d", None], [1, 2, 3])
    assert (found["eval/rouge_1"].value, found["eval/rouge_1"].n) == (0.75, 2)
    assert found["eval/rouge_2"].value == 0.0
    assert rouge_intervals(["a"], [None], [1]) == {}


def test_sft_logs_the_rouge_of_its_own_greedy_answers(tmp_path: Path) -> None:
    """The same numbers come from transformers' own greedy generation with the weights the stage left."""
    model = saved_model(tmp_path / "model", DEMONSTRATIONS, seed=3)
    tree = {
        "model": {"path": str(model)}, "threads": 1, "out": str(tmp_path / "out"),
        "data": {"holdout": 0.3, "max_tokens": 64},
        "sft": {"batch_size": 8, "max_steps": 4, "learning_rate": 1e-2, "warmup_fraction": 0.0, "eval_every": 2,
                "rouge": {"prompts": 5, "max_new_tokens": 6}},
    }  # fmt: skip
    recipe = recipe_from(tree)
    summary = run_stages(recipe, Corpus(sft=demonstrations()), ["sft"], Console(file=io.StringIO()))["sft"]

    policy = LoadedPolicy.from_folder(tmp_path / "out/sft/model", "auto")
    held_out = split_holdout(DEMONSTRATIONS, 0.3)[1][:5]
    texts = []
    for group in held_out:
        ids = list(policy.template.prompt_ids(group.prompt))
        with torch.no_grad():
            whole = policy.model.generate(
                torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long), max_new_tokens=6,
                do_sample=False, eos_token_id=list(policy.template.stop_ids), pad_token_id=policy.pad_id,
            )  # fmt: skip
        texts.append(policy.template.decode(whole[0, len(ids) :].tolist()))
    scores = [rouge(t, g.completions[0].text) for t, g in zip(texts, held_out, strict=True)]
    rows = [row for row in logged(tmp_path / "out", "sft") if "eval/rouge_1" in row]
    assert [row["step"] for row in rows] == [2, 3]
    headline = {row["name"]: row for row in summary["headline"]}
    for name in ("rouge_1", "rouge_2", "rouge_l"):
        mean = sum(getattr(score, name) for score in scores) / len(scores)
        assert rows[-1][f"eval/{name}"] == pytest.approx(mean, abs=1e-12)
        assert headline[f"eval/{name}"]["value"] == pytest.approx(mean, abs=1e-12)
    assert headline["eval/rouge_l"]["n"] == 5
    assert any("expected to fall" in text for text in summary["account"])
    assert max(score.rouge_1 for score in scores) > 0


def test_each_answer_is_measured_against_its_own_demonstration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that writes every demonstration word for word has a ROUGE of 1; shuffled it would not."""
    model = saved_model(tmp_path / "model", DEMONSTRATIONS, seed=3)
    template = LoadedPolicy.from_folder(model, "auto").template
    written = {g.prompt_id: template.completion(g.prompt, g.completions[0].messages).ids for g in DEMONSTRATIONS}

    class Recites:
        def __init__(self, *_: Any, **__: Any) -> None: ...

        def generate(self, prompts: Any, *_: Any) -> list[tuple[SampledCompletion]]:
            return [
                (SampledCompletion(ids, (0.0,) * len(ids), "stop"),) for ids in (written[p.prompt_id] for p in prompts)
            ]

    monkeypatch.setattr("accord.methods.sft_rouge.NativeSampler", Recites)
    summary = run_stage_on(tmp_path / "out", model, demonstrations(), "sft", {"rouge": {"max_new_tokens": 8}})
    found = {row["name"]: row["value"] for row in summary["headline"]}
    assert found["eval/rouge_1"] == found["eval/rouge_l"] == 1.0


def test_rouge_without_held_out_demonstrations_is_refused(tmp_path: Path) -> None:
    model = saved_model(tmp_path / "model", DEMONSTRATIONS, seed=3)
    with pytest.raises(ConfigError, match=r"`sft.rouge` compares answers with held-out demonstrations.*`data.holdout`"):
        run_stage_on(
            tmp_path / "out", model, Part.of([answers_to("a", ("b", {"rank": 0}), ("c", {"rank": 1}))], "pairs"),
            "sft", {"rouge": {"max_new_tokens": 4}}, holdout=0.0,
        )  # fmt: skip


def test_each_model_meets_the_reference_answers(tmp_path: Path) -> None:
    """The win rate over people is counted again from the answers written to samples.jsonl."""
    model = saved_model(tmp_path / "model", DEMONSTRATIONS, seed=3)
    prompts = [*asked(), Group((Message("user", "nobody answered this"),))]
    summary, screen = evaluate(model, tmp_path / "out", prompts)
    assert "1 of 7 prompts have no reference answer: left out" in screen
    samples = [json.loads(line) for line in (tmp_path / "out/evaluate/samples.jsonl").read_text().splitlines()]
    own = {row["prompt"]: row["completion"] for row in samples if row["model"] == str(model)}
    human = {g.prompt[0].content: g.reference or "" for g in asked()}
    assert own.keys() == human.keys()
    wins = [0.5 if len(own[p]) == len(human[p]) else float(len(own[p]) > len(human[p])) for p in human]
    rows = {row["name"]: row for row in summary["comparisons"]}
    assert rows[f"{model} over {HUMAN}"]["value"] == pytest.approx(sum(wins) / len(wins))
    assert {row["completion"] for row in samples if row["model"] == HUMAN} == set(human.values())

    other = {row["prompt"]: row["completion"] for row in samples if row["model"] == str(tmp_path / "out/other")}
    change = sum(rouge_l(other[p], human[p]) - rouge_l(own[p], human[p]) for p in human) / len(human)
    told = " ".join(summary["account"])
    assert f"a difference of {change:+.3f}" in told
    assert "ROUGE is expected to fall" in told
    assert "ROUGE-L" in screen


def test_reference_answers_are_needed_to_be_met(tmp_path: Path) -> None:
    model = saved_model(tmp_path / "model", DEMONSTRATIONS, seed=3)
    with pytest.raises(ConfigError, match="none of the 6 held-out prompts has a reference answer"):
        evaluate(model, tmp_path / "out", [Group(g.prompt) for g in asked()])


def test_one_model_can_meet_the_reference_answers_alone(tmp_path: Path) -> None:
    model = saved_model(tmp_path / "model", DEMONSTRATIONS, seed=3)
    summary, _ = evaluate(model, tmp_path / "out", asked(), {"models": [str(model)]})
    assert [row["name"] for row in summary["comparisons"]] == [f"{model} over {HUMAN}"]
    assert not any("a difference of" in text for text in summary["account"])


def test_a_prompts_references_are_of_one_kind_and_the_most_human_one_there_is() -> None:
    """Given as such before demonstrations before chosen answers; a demonstration counts wherever it stands."""
    pair = [("better", {"rank": 0}), ("worse", {"rank": 1})]
    prompts = [answers_to("only in prompts", ("shown", {})), Group((Message("user", "given"),), reference="the one")]
    demonstrations = [
        answers_to("both", ("first", {})),
        answers_to("both", ("second", {})),
        answers_to("given", ("x", {})),
    ]
    pairs = [answers_to(text, *pair) for text in ("both", "given", "only in pairs")]
    corpus = Corpus(sft=Part(tuple(demonstrations)), preferences=Part(tuple(pairs)), prompts=Part(tuple(prompts)))
    found = corpus.reference_answers()
    ids = {g.prompt[0].content: g.prompt_id for g in (*prompts, *demonstrations, *pairs)}
    assert found == {
        ids["only in prompts"]: ("shown",), ids["given"]: ("the one",), ids["both"]: ("first", "second"),
        ids["only in pairs"]: ("better",),
    }  # fmt: skip
