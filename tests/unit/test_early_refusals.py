"""What is refused before anything trains, and damage to finished stages that is noticed before it is used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import accord
from accord.cli.main import main
from accord.config import recipe_from
from accord.errors import CheckpointError, ConfigError, DataError
from accord.methods.corpus import Corpus, Part
from accord.methods.named import check_names
from accord.methods.plan import check_sizes, plan_table
from accord.models.load import load_policy
from accord.pipeline import run_stages
from accord.records import Group
from stages_support import QUICK, answers_to, saved_model

TALK: dict[str, Any] = {"environment": "accord.tasks.missing_detail:MissingDetail", "max_turns": 2}


def pairs(**rest: Any) -> list[Group]:
    return [answers_to(f"ask {i}", ("yes", {"rank": 0}), ("no", {"rank": 1}), **rest) for i in range(20)]


def recipe(**sections: Any) -> Any:
    return recipe_from({"model": {"path": "quickstart"}, **sections})


def scored(**judge: Any) -> dict[str, Any]:
    return {"scorers": {"one": judge}}


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"evaluate": {"against": "zz"}},
            r"`evaluate.against` = 'zz' is not among the models evaluated: base",
        ),
        ({"evaluate": {"models": ["base", "xx"]}}, "xx: no such folder"),
        ({"evaluate": {"models": ["base", "bestofn"]}}, "'bestofn', which is no stage"),
        ({"ppo": {"reward_model": "nope"}}, "nope: no such folder"),
        ({"dpo": {"init": "nowhere"}}, "nowhere: no such folder"),
        ({"grpo": {}}, "the grpo stage needs something that scores"),
        ({"ppo": TALK}, "`ppo.value_init` = reward, but only the environment scores"),
        ({"rloo": {"reward_function": ".mine:score"}}, "expected module:function"),
        ({"rloo": {"reward_function": "no_such_rewards:score"}}, "`rloo.reward_function`.*cannot import 'no_such_rew"),
        ({"rloo": {"reward_function": "math:sqrt", "gold_function": "math:tau"}}, "`rloo.gold_function`.*no function"),
        ({"grpo": TALK | {"environment": "accord.tasks:Nobody"}}, "`grpo.environment`.*has no function 'Nobody'"),
        (
            {"grpo": scored(token_function="math:nobody")},
            r"`grpo.scorers.one.token_function`.*no function 'nobody'",
        ),
        ({"grpo": scored(endpoint={"url": "http://127.0.0.1:9/x"})}, r"`grpo.scorers.one.endpoint.url`.*private netw"),
        ({"grpo": {"reward_function": "math:sqrt", "holdout_reward_model": "nope"}}, "nope: no such folder"),
    ],
)
def test_a_name_that_leads_nowhere_is_refused_before_training(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_names(recipe(**sections), list(sections))


@pytest.mark.parametrize("section", [{"reward_model": "policy"}, scored(models=["policy", "policy"])])
def test_a_language_model_is_no_reward_model(
    section: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved_model(tmp_path / "policy", pairs(), seed=0)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"`grpo\S*`: policy holds a language model \(LlamaForCausalLM\)"):
        check_names(recipe(grpo=section), ["grpo"])


@pytest.mark.parametrize(
    ("content", "reason"),
    [("{bad", "Expecting property name"), ("[1]", "no attribute 'get'"), ('{"architectures": 1}', "int")],
)
def test_a_folder_with_a_broken_configuration_is_no_reward_model(content: str, reason: str, tmp_path: Path) -> None:
    folder = saved_model(tmp_path / "judge", pairs(), seed=0)
    (folder / "config.json").write_text(content)
    with pytest.raises(ConfigError, match=rf"`grpo.reward_model`: .*is no model's configuration .*{reason}"):
        check_names(recipe(grpo={"reward_model": str(folder)}), ["grpo"])


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("import sys; sys.exit(0)", "failed with SystemExit: 0"),
        ("def f(:", "failed with SyntaxError"),
        ("raise RuntimeError('no licence')", "failed with RuntimeError: no licence"),
    ],
)
def test_a_module_that_cannot_be_imported_is_named(
    source: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"rewards_{abs(hash(source))}"
    (tmp_path / f"{name}.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigError, match=rf"`grpo.reward_function` = '{name}:f'.*{reason}"):
        check_names(recipe(grpo={"reward_function": f"{name}:f"}), ["grpo"])


def test_a_section_taken_back_is_nothing_to_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ppo", "--set", "ppo=null"]) == 2
    assert "`ppo` is null" in capsys.readouterr().err


def test_adapter_targets_that_are_no_layers_are_refused_before_a_model_is_loaded() -> None:
    named = recipe(model={"path": "quickstart", "adapter": {"rank": 2, "targets": ["q_proj", "c_attn"]}}, dpo={})
    with pytest.raises(ConfigError, match=r"`model.adapter.targets`: 'c_attn' names no linear layer .*gate_proj"):
        plan_table(named, Corpus(preferences=Part.of(pairs(), "pairs")), ["dpo"])


def test_data_that_cannot_serve_is_named() -> None:
    with pytest.raises(DataError, match=r"questions\.jsonl: none of the data can become sft"):
        Corpus(ptx=Part.of([Group(pairs()[0].prompt)], "questions.jsonl")).imitated()


def test_what_a_function_or_a_finished_stage_scores_needs_no_reward_section(tmp_path: Path) -> None:
    check_names(recipe(grpo={}), ["grpo"], given={"grpo.reward_function"})
    check_names(recipe(grpo=TALK, ppo=TALK | {"value_init": "policy"}), ["grpo", "ppo"])
    (tmp_path / "reward").mkdir()
    (tmp_path / "reward" / "summary.json").write_text("{}")
    check_names(recipe(grpo={}, out=str(tmp_path)), ["grpo"])


def test_a_model_that_an_earlier_stage_of_the_run_will_make_is_not_refused(tmp_path: Path) -> None:
    check_names(recipe(dpo={}, ppo={"init": str(tmp_path / "dpo/model")}, reward={}, out=str(tmp_path)), ["dpo", "ppo"])


@pytest.mark.parametrize(("stage", "section"), [("orpo", {}), ("dpo", {"loss": "apo_zero"})])
def test_soft_labels_that_a_loss_cannot_take_are_refused_before_training(stage: str, section: dict[str, Any]) -> None:
    corpus = Corpus(preferences=Part.of(pairs(soft_label=0.8), "pairs"))
    with pytest.raises(ConfigError, match="20 comparisons have soft labels"):
        check_sizes(recipe(**{stage: section}), corpus, [stage])


def test_an_infinite_rate_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"sft\.learning_rate"):
        recipe(sft={"learning_rate": float("inf")})


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Corpus, dict[str, Any]]:
    """A run folder in which SFT is finished."""
    folder = tmp_path_factory.mktemp("trained")
    model = saved_model(folder / "start", pairs(), 0)
    corpus = Corpus(sft=Part.of([Group(g.prompt, g.completions[:1]) for g in pairs()], "demonstrations"),
                    preferences=Part.of(pairs(), "pairs"))  # fmt: skip
    tree = {"model": {"path": str(model)}, "threads": 1, "out": str(folder), "data": {"max_tokens": 64, "holdout": 0.2},
            "sft": QUICK, "dpo": QUICK}  # fmt: skip
    run_stages(recipe_from(tree), corpus, ["sft"], Console(quiet=True))
    return folder, corpus, tree


def test_weights_that_changed_after_their_stage_are_not_used(trained: tuple[Path, Corpus, dict[str, Any]]) -> None:
    folder, corpus, tree = trained
    file = folder / "sft" / "model" / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(CheckpointError, match="does not hold the weights that the sft stage left"):
        run_stages(recipe_from(tree), corpus, ["dpo"], Console(quiet=True))
    file.write_bytes(whole)
    assert not (folder / "dpo").exists()


def test_a_damaged_summary_is_named(trained: tuple[Path, Corpus, dict[str, Any]]) -> None:
    folder, corpus, tree = trained
    summary = folder / "sft" / "summary.json"
    whole = summary.read_bytes()
    summary.write_text("{")
    with pytest.raises(CheckpointError, match=r"sft/summary.json is damaged"):
        run_stages(recipe_from(tree), corpus, ["sft"], Console(quiet=True))
    summary.write_bytes(whole)


def test_cut_weights_of_any_model_are_one_sentence(tmp_path: Path) -> None:
    model = saved_model(tmp_path / "m", pairs(), 0)
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ConfigError, match="cannot load a model from"):
        load_policy(model)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"prompts": "hello", "reward_fn": len}, DataError, "prompts is 'hello': expected a list"),
        ({"prompts": [], "reward_fn": len}, DataError, "prompts is empty"),
        ({"samples": "abc"}, DataError, "samples is 'abc': expected a list"),
        ({"pairs": {"a": 1}}, DataError, "pairs is .*: expected a list"),
        ({"prompts": ["hello"], "reward_fn": 3}, ConfigError, "reward_fn is 3: expected a function"),
        ({"samples": [("a", "b")] * 4, "data": {"holdout": 0.99}}, DataError, "nothing to train on"),
        ({"samples": [("a", "")]}, DataError, r"samples\[0\].*empty"),
        ({"prompts": ["", "b"], "reward_fn": len}, DataError, r"prompts\[0\].*empty"),
    ],
)
def test_python_refuses_what_the_commands_refuse(
    arguments: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        accord.train("quickstart", out=tmp_path / "out", quiet=True, **arguments)
    assert not (tmp_path / "out").exists()
