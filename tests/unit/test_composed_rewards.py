"""Several judges as one: sums, ensembles, whole stages that use them, and what a recipe may say of them."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from test_remote_scorers import serving

from accord.config import recipe_from
from accord.errors import CheckpointError, ConfigError
from accord.methods.corpus import Corpus, Part
from accord.methods.named import check_names
from accord.methods.online_trainer import OnlineTrainer
from accord.methods.plan import check_sizes
from accord.models.load import load_policy, reward_model_from, save_model
from accord.pipeline import run_stages
from accord.records import Group, Message, Score, ScoreRequest
from accord.rewards.compose import ComposedScorer, EnsembleScorer, Weighted
from accord.training.loop import StepOutcome
from stages_support import answers_to, logged, saved_model, weights_of

REQUEST = ScoreRequest((Message("user", "a"),), "b")


class Says:
    """A scorer that says the same of everything."""

    wants_tokens = False

    def __init__(self, score: Score, name: str = "says") -> None:
        self.name, self._score = name, score

    def score(self, requests: Sequence[ScoreRequest]) -> list[Score]:
        return [self._score] * len(requests)


def composed(*judges: tuple[float, Score]) -> Score:
    names = ("first", "second", "third")
    weighted = [Weighted(name, Says(score), weight) for name, (weight, score) in zip(names, judges, strict=False)]
    [found] = ComposedScorer(weighted).score([REQUEST])
    return found


# --- sums and ensembles ----------------------------------------------------------------------------------------------


def test_weighted_scores_add_up_and_each_is_kept() -> None:
    found = composed((2.0, Score(3.0)), (-0.5, Score(4.0)))
    assert found == Score(4.0, parts=(("first", 3.0), ("second", 4.0)))


def test_one_failure_fails_the_sum_by_name() -> None:
    found = composed((1.0, Score(3.0)), (1.0, Score(None, "busy")), (1.0, Score(None, "gone")))
    assert (found.value, found.error) == (None, "second: busy")


def test_members_are_the_sum_with_each_member_in_its_ensembles_place() -> None:
    found = composed((1.0, Score(10.0)), (2.0, Score(3.0, members=(2.0, 4.0))))
    assert (found.value, found.members) == (16.0, (14.0, 18.0))


def test_rewards_of_single_tokens_are_weighted_and_added() -> None:
    found = composed((1.0, Score(10.0)), (2.0, Score(3.0, tokens=(1.0, 2.0))), (3.0, Score(0.0, tokens=(1.0, -1.0))))
    assert (found.value, found.tokens) == (16.0, (5.0, 1.0))


def test_an_ensemble_is_made_of_scorers_and_of_heads_and_fails_with_any_of_them() -> None:
    parts = [Says(Score(1.0)), Says(Score(9.0, members=(3.0, 5.0)))]
    [worst] = EnsembleScorer(parts, "worst", 0.1).score([REQUEST])
    assert worst == Score(1.0, members=(1.0, 3.0, 5.0))
    [failed] = EnsembleScorer([*parts, Says(Score(None, "too long"), "the third")], "mean", 0.1).score([REQUEST])
    assert (failed.value, failed.error) == (None, "the third: too long")
    [single] = EnsembleScorer(parts[:1], "uncertainty", 5.0).score([REQUEST])
    assert single == Score(1.0)


# --- what a recipe may say -------------------------------------------------------------------------------------------

FUNCTION = {"function": "math:dist"}
ENDPOINT = {"url": "https://example.org/score"}
JUDGE = ENDPOINT | {"model": "m"}


def url(text: str, **rest: Any) -> dict[str, Any]:
    return {"scorers": {"a": {"endpoint": {"url": text, **rest}}}}


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"scorers": {"a": {}}}, "`rloo.scorers.a` needs exactly one of model, models, function"),
        ({"scorers": {"a": FUNCTION | {"model": "x"}}}, "found `model` and `function`"),
        ({"scorers": {"A b": FUNCTION}}, "string should match pattern"),
        ({"scorers": {"a": FUNCTION | {"wieght": 2}}}, "did you mean `rloo.scorers.a.weight`"),
        ({"scorers": {"a": FUNCTION | {"weight": 0}}}, "`rloo.scorers.a.weight` = 0"),
        ({"scorers": {"a": FUNCTION | {"combine": "worst"}}}, "`rloo.scorers.a.combine` is read only for an ensemble"),
        ({"scorers": {"a": {"model": "x", "uncertainty_coef": 2}}}, "only by `rloo.scorers.a.combine` = uncertainty"),
        ({"scorers": {"a": {"models": ["x"]}}}, "`rloo.scorers.a.models` has a single model"),
        ({"scorers": {"a": FUNCTION}, "reward_model": "x"}, "`rloo.reward_model` and `rloo.scorers` are both set"),
        (url("ftp://example.org"), "expected http://host/path"),
        (url("example.org/score"), "expected http://host/path"),
        (url("https://user:word@example.org/"), "holds a password, which would be logged"),
        (url("https://example.org:99999/"), "is no address"),
        (url("https://example.org/a b"), "must be written as %XX"),
        (url("https://example.org/", hosts=["example.com"]), "'example.org', which is not among"),
        (url("http://example.org/", token_env="T"), "would be sent unencrypted"),
        ({"scorers": {"a": {"judge": JUDGE | {"rubric": "{prompt}"}}}}, "does not say where {completion} belongs"),
        ({"scorers": {"a": {"judge": JUDGE | {"lowest": 10}}}}, "is not below"),
        (
            {"scorers": {"a": {"token_function": "m:f"}}, "shaping": {"reference": "par"}},
            "`rloo.shaping.reference` rescales the scores of whole answers",
        ),
        ({"shaping": {"length_free": 3}}, "`rloo.shaping.length_free` is read only with `rloo.shaping.length_penalty`"),
        ({"shaping": {"missing_reference": "leave_out"}}, "read only with `rloo.shaping.reference`"),
        ({"shaping": {"overlong_penalty": 3}}, "read only with `rloo.shaping.overlong_buffer`"),
        ({"shaping": {"overlong_buffer": 300}}, "is more than `rloo.max_new_tokens` = 128"),
        ({"shaping": {"truncation": "leave_out"}, "missing_eos_penalty": 2}, "`rloo.missing_eos_penalty` is not read"),
    ],
)  # fmt: skip
def test_contradictions_are_refused_with_their_key(section: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        recipe_from({"model": {"path": "quickstart"}, "rloo": section})
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"ppo": {"scorers": {"a": FUNCTION}}}, "`ppo.scorers` is no model to start from"),
        (
            {"ppo": {"scorers": {"a": {"token_function": "m:f"}}, "value_init": "policy", "score_clip": 3}},
            "`ppo.score_clip` rescales the scores of whole answers",
        ),
        ({"rft": {"shaping": {"running": "scale"}}}, "`rft.shaping.running` compares prompts or rollouts"),
        ({"bestofn": {"shaping": {"reference": "par"}}}, "`bestofn.shaping.reference` compares prompts or rollouts"),
        ({"reinforce": {"shaping": {"diversity_bonus": 1}}}, "raise `reinforce.samples_per_prompt` to at least 2"),
    ],
)
def test_contradictions_of_single_methods(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        recipe_from({"model": {"path": "quickstart"}, **sections})
    assert message in str(caught.value)


def test_models_and_variables_that_are_not_there_are_refused_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    def names(scorer: dict[str, Any], **rest: Any) -> None:
        section = {"rloo": {"scorers": {"a": scorer}}}
        check_names(recipe_from({"model": {"path": "quickstart"}, **section, **rest}), ["rloo"])

    names(FUNCTION)
    names({"model": "reward"}, reward={})
    for scorer in ({"model": "reward"}, {"models": ["nowhere", "reward"]}):
        with pytest.raises(ConfigError, match="no such folder"):
            names(scorer)
    monkeypatch.delenv("A_TOKEN", raising=False)
    with pytest.raises(ConfigError, match=r"`rloo.scorers.a.endpoint.token_env` names A_TOKEN, which is not set"):
        names({"endpoint": ENDPOINT | {"token_env": "A_TOKEN"}})


def test_prompts_without_a_reference_answer_are_refused_with_their_number_or_left_out() -> None:
    corpus = Corpus(
        preferences=Part.of([answers_to(f"ask {i}", ("yes", {"rank": 0}), ("no", {"rank": 1})) for i in range(6)], "a"),
        prompts=Part.of([Group((Message("user", f"ask {i}"),)) for i in range(8)], "b"),
    )
    assert set(corpus.reference_answers().values()) == {("yes",)}

    def sizes(**shaping: Any) -> None:
        section = {"prompts_per_step": 6, "shaping": {"reference": "par", **shaping}}
        check_sizes(
            recipe_from({"model": {"path": "quickstart"}, "data": {"holdout": 0}, "rloo": section}), corpus, ["rloo"]
        )

    with pytest.raises(ConfigError, match=r"2 of 8 training prompts have none, the first 'ask 6'.*missing_reference"):
        sizes()
    sizes(missing_reference="leave_out")


# --- whole stages ----------------------------------------------------------------------------------------------------

PAIRS = [answers_to(f"ask {i}", (f"yes {i % 5}", {"rank": 0}), (f"no {i % 3}", {"rank": 1})) for i in range(12)]
ONLINE: dict[str, Any] = {
    "prompts_per_step": 3, "samples_per_prompt": 2, "episodes": 24, "max_new_tokens": 6, "learning_rate": 0.01,
    "checkpoint_every": 2, "samples_every": 1,
}  # fmt: skip
MODULE = """\
def short(prompt, completion):
    return -len(completion) / 10

def early(prompt, tokens):
    return [1.0 / (1 + t) for t in range(len(tokens))]
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    policy = saved_model(folder / "policy", PAIRS, 1)
    loaded, tokenizer = load_policy(policy)
    heads = {"one": 1, "two": 1, "three_heads": 3}
    return {"policy": policy} | {
        name: save_model(reward_model_from(loaded, seed, heads=count), tokenizer, folder / name)
        for seed, (name, count) in enumerate(heads.items())
    }


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    (tmp_path / "their_rewards.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    yield "their_rewards"
    sys.modules.pop("their_rewards", None)


def run(out: Path, models: dict[str, Path], stage: str, section: dict[str, Any]) -> dict[str, Any]:
    tree = {
        "model": {"path": str(models["policy"])}, "threads": 1, "out": str(out),
        "data": {"holdout": 0, "max_tokens": 64}, stage: section,
    }  # fmt: skip
    console = Console(file=(screen := io.StringIO()), width=1000)
    summary = run_stages(recipe_from(tree), Corpus(preferences=Part.of(PAIRS, "pairs")), [stage], console)[stage]
    return summary | {"printed": screen.getvalue()}


def comparable(out: Path, stage: str) -> list[dict[str, float]]:
    rows = logged(out, stage)
    return [{k: v for k, v in row.items() if not k.startswith(("time/", "system/"))} for row in rows]


def lengths(body: Any) -> tuple[int, bytes]:
    return 200, json.dumps({"scores": [len(text) for text in body["completions"]]}).encode()


def test_a_stage_of_all_kinds_of_judges_logs_each_and_their_sum(
    models: dict[str, Path], module: str, tmp_path: Path
) -> None:
    with serving(lengths) as (address, asked):
        scorers = {
            "pair": {"models": [str(models["one"]), str(models["two"])], "combine": "worst", "weight": 2},
            "heads": {"model": str(models["three_heads"]), "combine": "uncertainty", "uncertainty_coef": 0.5},
            "short": {"function": f"{module}:short"},
            "early": {"token_function": f"{module}:early", "weight": 0.1},
            "service": {"endpoint": {"url": address, "allow_private": True}, "weight": 0.01},
        }
        section = ONLINE | {"scorers": scorers, "minibatches": 1, "update_epochs": 1}
        summary = run(tmp_path / "run", models, "ppo", section)
    for row in logged(tmp_path / "run", "ppo"):
        means = {name: row[f"rollout/scorer/{name}/mean"] for name in scorers}
        total = sum(scorer.get("weight", 1) * means[name] for name, scorer in scorers.items())
        assert row["rollout/score/mean"] == pytest.approx(total, abs=1e-5)
        assert row["rollout/ensemble_std"] > 0 and row["rollout/failed_scores"] == 0
    assert asked and f"prompts and answers are sent to {address}" in summary["printed"]
    sources = json.loads((tmp_path / "run" / "ppo" / "run.json").read_text())["data"]
    assert {"weights 1 of pair", "weights 2 of pair", "weights of heads", "function of short"} <= sources.keys()
    known = [json.loads(line) for line in (tmp_path / "run" / "ppo" / "scores-service.jsonl").read_text().splitlines()]
    assert len({row["key"] for row in known}) == len(known) > 0
    # The guards look at answers before training through the reward model alone: a service may be paid by the answer.
    assert sum(len(one["body"]["completions"]) for one in asked) <= ONLINE["episodes"]
    report = (tmp_path / "run" / "ppo" / "report.html").read_text()
    assert "rollout/scorer/service/mean" in report and "rollout/truncation_term/mean" in report


@pytest.mark.parametrize(
    ("stage", "shaping"), [("rloo", {"running": "standardise", "reference": "difference"}), ("rft", {})]
)
def test_a_run_with_a_random_endpoint_that_is_killed_and_continued_ends_as_if_nothing_had_been(
    stage: str, shaping: dict[str, str], models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The endpoint never says the same twice. Killed in step 4, after the checkpoint of step 2, the run asks for
    nothing that it was told before, and ends as a run that knew all answers from the start."""
    numbers = iter(range(10_000))

    def random(body: Any) -> tuple[int, bytes]:
        return 200, json.dumps({"scores": [(next(numbers) * 7919 % 101) / 10 for _ in body["prompts"]]}).encode()

    from accord.methods.rft import RFTTrainer

    trainer = RFTTrainer if stage == "rft" else OnlineTrainer
    original = trainer.step

    def killed(self: Any, number: int) -> StepOutcome:
        outcome = original(self, number)
        if number == 4:
            raise KeyboardInterrupt  # everything of the step is done, and nothing of it is saved
        return outcome

    own = {"cycles": 4, "improve_steps": 1, "samples_per_prompt": 4, "max_new_tokens": 6, "learning_rate": 0.01,
           "checkpoint_every": 2, "batch_size": 8} if stage == "rft" else ONLINE  # fmt: skip
    with serving(random) as (address, asked):
        scorers = {"service": {"endpoint": {"url": address, "allow_private": True, "batch_size": 4}}}
        section = own | {"scorers": scorers, "shaping": shaping}
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(trainer, "step", killed)
            run(tmp_path / "killed", models, stage, section)
        before = len(asked)
        run(tmp_path / "killed", models, stage, section)
        texts = [
            (json.dumps(prompt), text)
            for one in asked
            for prompt, text in zip(one["body"]["prompts"], one["body"]["completions"], strict=True)
        ]
        assert before > 0 and len(set(texts)) == len(texts)  # nothing was asked twice, in neither life
        journal = tmp_path / "killed" / stage / "scores-service.jsonl"
        whole = tmp_path / "whole" / stage
        whole.mkdir(parents=True)
        (whole / journal.name).write_bytes(journal.read_bytes())
        asked.clear()
        run(tmp_path / "whole", models, stage, section)
        assert asked == []
    assert comparable(tmp_path / "killed", stage) == comparable(tmp_path / "whole", stage)
    assert weights_of(tmp_path / "killed", stage) == weights_of(tmp_path / "whole", stage)


def test_how_a_service_is_asked_may_change_when_a_run_continues_and_what_is_asked_may_not(
    models: dict[str, Path], tmp_path: Path
) -> None:
    with serving(lengths) as (address, _):

        def again(**endpoint: Any) -> None:
            scorers = {"service": {"endpoint": {"url": address, "allow_private": True, **endpoint}}}
            run(tmp_path / "run", models, "rloo", ONLINE | {"episodes": 6, "scorers": scorers})

        again()
        again(timeout_seconds=3, retries=0, concurrency=2)
        with pytest.raises(CheckpointError, match="batch_size"):
            again(batch_size=5)


def test_failed_candidates_are_never_chosen_and_are_counted(
    models: dict[str, Path], module: str, tmp_path: Path
) -> None:
    """Every third answer has no score. Best-of-n and rejection sampling choose among the others."""
    calls = iter(range(10_000))

    def some(body: Any) -> tuple[int, bytes]:
        return 200, json.dumps(
            {"scores": [None if next(calls) % 3 == 0 else 5.0 + len(t) for t in body["completions"]]}
        ).encode()

    with serving(some) as (address, _):
        endpoint = {"url": address, "allow_private": True, "concurrency": 1, "retries": 0}
        section = {"scorers": {"service": {"endpoint": endpoint}}, "max_new_tokens": 6, "max_failed_fraction": 0.9}
        best = run(tmp_path / "run", models, "bestofn", section | {"n": 4})
        rft = section | {"samples_per_prompt": 4, "cycles": 1, "improve_steps": 2, "learning_rate": 0.01}
        run(tmp_path / "run", models, "rft", rft)
    chunk = json.loads((tmp_path / "run" / "bestofn" / "chunks" / "000001.json").read_text())
    failed = sum(not may for row in chunk["usable"] for may in row)
    assert 0 < failed < 48 and f"{failed} answers could not be scored" in best["warnings"][0]
    assert logged(tmp_path / "run", "bestofn")[0]["rollout/failed_scores"] == failed
    may, may_not = (
        {text for texts, usable in zip(chunk["texts"], chunk["usable"], strict=True)
         for text, one in zip(texts, usable, strict=True) if one == kept}
        for kept in (True, False)
    )  # fmt: skip
    written = "".join((tmp_path / "run" / "bestofn" / name).read_text() for name in ("best.jsonl", "ranked.jsonl"))
    assert may_not - may and all(json.dumps(text) not in written for text in may_not - may)
    assert any(json.dumps(text) in written for text in may)
    rows = logged(tmp_path / "run", "rft")
    assert rows[0]["rollout/failed_scores"] > 0
    assert all(row["rollout/kept_score/mean"] >= 5 for row in rows if "rollout/kept_score/mean" in row)


@pytest.mark.parametrize(("stage", "rest"), [("bestofn", {"n": 2}), ("rft", {"samples_per_prompt": 2, "cycles": 1})])
def test_methods_that_choose_shape_scores_by_length_too(
    stage: str, rest: dict[str, Any], models: dict[str, Path], module: str, tmp_path: Path
) -> None:
    """An untrained policy seldom ends within 6 tokens, so the price of coming near them is paid."""
    shaping = {"overlong_buffer": 4, "overlong_penalty": 2.0}
    section = {"reward_function": f"{module}:short", "max_new_tokens": 6, "shaping": shaping, **rest}
    run(tmp_path / "run", models, stage, section)
    terms = [
        row["rollout/overlong_term/mean"]
        for row in logged(tmp_path / "run", stage)
        if "rollout/overlong_term/mean" in row
    ]
    assert terms and all(-2 <= term < 0 for term in terms)
