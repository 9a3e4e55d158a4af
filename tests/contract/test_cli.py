"""The commands as scripts meet them: exit codes, messages that say what to mend, and what is left on the disk."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

import accord
from accord.cli.main import main

RECIPE = {
    "model": {"scratch": {"hidden_size": 16, "layers": 1, "heads": 2, "vocab_size": 300, "max_positions": 64}},
    "data": {"holdout": 0.2, "max_tokens": 64},
    "sft": {"batch_size": 8, "max_steps": 2},
    "reward": {"batch_size": 8, "max_steps": 2},
    "ppo": {"prompts_per_step": 4, "samples_per_prompt": 2, "episodes": 8, "max_new_tokens": 4, "minibatches": 2},
    "evaluate": {"max_new_tokens": 4},
}
VERBS = ("sft", "reward", "ppo", "evaluate", "run")


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with `recipe.yaml` and its data, which is the current one."""
    rows = [{"prompt": f"ask {i}", "chosen": f"yes {i}", "rejected": f"no {i}"} for i in range(30)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = RECIPE | {"name": "demo", "data": {**RECIPE["data"], "preferences": "pairs.jsonl"}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What the command says on standard error when it ends with exit code 2."""
    assert main(arguments) == 2
    message = capsys.readouterr().err
    assert message.startswith("accord: ")
    assert "Traceback" not in message
    return message


def append(path: Path, text: str) -> None:
    path.write_text(path.read_text() + text)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- help ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [[], *([verb] for verb in VERBS), ["data"], ["quickstart"], ["benchmark"]])
def test_help_exits_0_and_shows_an_example(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([*arguments, "--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith("usage: accord")
    if arguments != ["benchmark"]:
        assert "accord " + " ".join(arguments) in text.split("usage:", 1)[1][20:]


def test_the_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"accord {accord.__version__}\n"


@pytest.mark.parametrize("arguments", [[], ["train"], ["run"], ["sft", "--fast"]])
def test_a_command_line_that_cannot_be_read_exits_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert "usage: accord" in capsys.readouterr().err


# --- what is refused before anything runs ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ppo", "recipe.yaml", "--set", "ppo.clip_rang=0.1"], "did you mean `ppo.clip_range`?"),
        (["ppo", "recipe.yaml", "--set", "ppo.cliprange=0.1"], "here it is called `ppo.clip_range`"),
        (["sft", "recipe.yaml", "--set", "learning_rate=1"], "did you mean `sft.learning_rate`?"),
        (["sft", "recipe.yaml", "--set", "sft.epochs"], "expected section.key=value"),
        (["sft", "recipe.yaml", "--set", "sft.epochs=0"], "`sft.epochs`: input should be greater than or equal to 1"),
        (["ppo", "recipe.yaml", "--set", "ppo.target_kl=3"], "`ppo.target_kl` is read only by `ppo.kl_controller`"),
        (["sft", "recipe.yaml", "--set", "model.path=x"], "`model.path` and `model.scratch` are both set"),
        (["sft", "nowhere.yaml"], "nowhere.yaml: no such recipe file"),
        (["run", "pairs.jsonl"], "pairs.jsonl"),
        (["sft", "recipe.yaml", "--set", "data.preferences=pair.jsonl"], "Did you mean pairs.jsonl?"),
        (["sft", "--set", "model.path=x"], "no demonstrations: set `data.sft`"),
        (["reward", "--set", "model.path=x"], "no comparisons: set `data.preferences`"),
        (["sft", "recipe.yaml", "--set", "model.scratch=null"], "no model to start from: set `model.path`"),
        (["reward", "recipe.yaml"], "the sft stage of this recipe is not finished in runs/demo/sft: run `accord sft`"),
        (["ppo", "recipe.yaml"], "the sft stage of this recipe is not finished"),
        (["ppo", "recipe.yaml", "--set", "sft=null"], "the reward stage of this recipe is not finished"),
        (["evaluate", "recipe.yaml", "--set", "sft=null", "--set", "ppo=null"], "there is only one model to evaluate"),
    ],
)
def test_input_that_is_wrong_exits_2_and_says_what_to_mend(
    arguments: list[str], message: str, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in refused(capsys, *arguments)


def test_a_recipe_without_stages_names_them(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (workplace / "empty.yaml").write_text("data: {preferences: pairs.jsonl}\n")
    assert "add a section, one of sft, reward, dpo, " in refused(capsys, "run", "empty.yaml")


def test_a_row_that_cannot_be_used_is_named_by_file_and_line(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    append(workplace / "pairs.jsonl", '{"prompt": "ask", "chosen": "yes"}\n')
    assert "pairs.jsonl:31" in refused(capsys, "sft", "recipe.yaml")
    assert main(["sft", "recipe.yaml", "--dry-run", "--set", "data.lenient=true"]) == 0


def test_a_missing_model_folder_is_named_and_the_mended_command_runs(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = ("sft", "recipe.yaml", "--set", "model.scratch=null", "--set", f"model.path={workplace / 'nothing'}")
    assert f"{workplace / 'nothing'}: no such folder" in refused(capsys, *wrong)
    assert main(["sft", "recipe.yaml"]) == 0


# --- dry runs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", VERBS)
def test_a_dry_run_shows_the_plan_and_writes_nothing(
    verb: str, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = files(workplace)
    assert main([verb, "recipe.yaml", "--dry-run", "--set", "sft.epochs=7"]) == 0
    assert files(workplace) == before
    assert not (workplace / "runs").exists()
    text = capsys.readouterr().out
    assert "epochs: 7" in text and "temperature: 1.0" in text  # what was set, and what was not
    expected = {"sft": "2 of 8", "reward": "2 of 8", "ppo": "1 rollouts of 8, 16", "evaluate": "held-out prompts"}
    for stage in expected if verb == "run" else (verb,):
        assert all(word in text for word in expected[stage].split())


def test_a_dry_run_refuses_what_the_run_would_refuse(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (workplace / "pairs.jsonl").write_text("")
    assert "pairs.jsonl" in refused(capsys, "sft", "recipe.yaml", "--dry-run")


def test_the_resolved_configuration_of_a_dry_run_is_a_recipe(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", "recipe.yaml", "--dry-run", "--set", "seed=4"]) == 0
    text = capsys.readouterr().out
    resolved = yaml.safe_load(text[: text.index("┏")])
    assert resolved["seed"] == 4
    (workplace / "again.yaml").write_text(yaml.safe_dump(resolved))
    assert main(["run", "again.yaml", "--dry-run"]) == 0
    assert capsys.readouterr().out == text


# --- run folders -----------------------------------------------------------------------------------------------------


def test_a_run_folder_tells_its_story_and_refuses_another_run(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sft", "recipe.yaml"]) == 0
    stage = workplace / "runs" / "demo" / "sft"
    names = {path.name for path in stage.iterdir()}
    assert {"config.yaml", "run.json", "metrics.jsonl", "summary.json", "report.html", "model", "checkpoints"} <= names
    assert (stage.parent / "summary.json").exists() and (stage.parent / "report.html").exists()
    assert yaml.safe_load((stage / "config.yaml").read_text())["sft"]["batch_size"] == 8
    before = files(stage / "model")

    message = refused(capsys, "sft", "recipe.yaml", "--set", "sft.batch_size=4", "--set", "sft.learning_rate=1e-3")
    for part in ("sft.batch_size: 8 there, 4 now", "sft.learning_rate: 2e-05 there, 0.001 now", "--set out="):
        assert part in message
    append(workplace / "pairs.jsonl", '{"prompt": "p", "chosen": "a", "rejected": "b"}\n')
    assert "content of pairs.jsonl" in refused(capsys, "sft", "recipe.yaml")
    assert files(stage / "model") == before
    assert main(["sft", "recipe.yaml", "--set", "sft.batch_size=4", "--set", "out=elsewhere"]) == 0


def test_all_stages_run_in_order_and_are_not_repeated(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "recipe.yaml"]) == 0
    root = workplace / "runs" / "demo"
    summary = json.loads((root / "summary.json").read_text())
    assert summary["stages"] == ["base", "sft", "reward", "ppo", "evaluate"]
    assert {c["name"] for c in summary["comparisons"]} == {"sft over base", "ppo over sft"}
    before = {stage: files(root / stage / "model") for stage in ("base", "sft", "reward", "ppo")}
    capsys.readouterr()
    assert main(["run", "recipe.yaml"]) == 0
    assert capsys.readouterr().out.count("already finished") >= 5
    assert {stage: files(root / stage / "model") for stage in before} == before
