"""The commands as scripts meet them: exit codes, messages that say what to mend, and what is left on the disk."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml
from rich.console import Console

import accord
from accord.cli.main import main
from accord.methods.catalogue import STAGES

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
    others = {
        "marked": [{"prompt": f"ask {i}", "completion": f"yes {i}", "label": i % 2 == 0} for i in range(30)],
        "scored": [{"prompt": f"ask {i}", "completion": f"yes {i}", "score": i} for i in range(30)],
        "ranked": [{"prompt": f"ask {i}", "responses": ["a", "b", "c"], "ranks": [2, 1, 3]} for i in range(30)],
        "prompts": [{"prompt": f"ask {i}"} for i in range(30)],
    }
    for name, lines in others.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
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


@pytest.mark.parametrize(
    "arguments",
    [[], *([verb] for verb in VERBS), ["dpo"], ["loop"], ["methods"], ["data"], ["quickstart"], ["benchmark"]],
)
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


def test_a_mistyped_command_is_told_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["evalute"])
    assert stop.value.code == 2
    assert "did you mean evaluate?" in capsys.readouterr().err


# --- the methods ------------------------------------------------------------------------------------------------------


def test_the_methods_are_told_apart_within_80_columns(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("accord.cli.methods.screen", lambda: Console(width=80))
    assert main(["methods"]) == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    assert {"needs", "costs", "choose it"} <= set(re.findall(r"[a-z]+(?: it)?", text))
    for stage in STAGES.values():
        assert stage.name == "evaluate" or re.search(rf"│ {stage.verb} +│", text), stage.verb


def test_the_methods_as_json_have_all_their_facts(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods", "--json"]) == 0
    methods = {row["method"]: row for row in json.loads(capsys.readouterr().out)}
    assert methods.keys() == {stage.verb for stage in STAGES.values()} - {"evaluate"}
    assert all(row["needs"] and row["costs"] and row["choose"] and row["example"] for row in methods.values())
    assert methods["online-dpo"]["section"] == "online_dpo"
    assert (methods["ppo"]["models_trained"], methods["ppo"]["models_frozen"]) == (2, 2)


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
        (
            ["reward", "recipe.yaml", "--set", "data.preferences=not-read.jsonl"],
            "the sft stage of this recipe is not finished",
        ),
        (
            ["evaluate", "recipe.yaml", "--set", "data.preferences=not-read.jsonl"],
            "the sft stage of this recipe is not",
        ),
        (
            ["sft", "recipe.yaml", "--set", "threads=100000"],
            "--set: `threads`: input should be less than or equal to 10",
        ),
        (["ppo", "recipe.yaml", "--set", "sft=null"], "the reward stage of this recipe is not finished"),
        (["dpo", "--set", "model.path=x"], "no comparisons: set `data.preferences`"),
        (["kto", "--set", "model.path=x"], "no ratings: set `data.preferences`"),
        (["dpo", "recipe.yaml"], "the sft stage of this recipe is not finished in runs/demo/sft: run `accord sft`"),
        (
            ["dpo", "recipe.yaml", "--set", "sft=null", "--set", "data.preferences=marked.jsonl"],
            "Single answers with labels are for kto",
        ),
        (
            ["orpo", "recipe.yaml", "--set", "sft=null", "--set", "data.preferences=marked.jsonl"],
            "with scores for ilql, and several in one",
        ),
        (
            ["kto", "recipe.yaml", "--set", "sft=null", "--set", "data.preferences=scored.jsonl"],
            "kto learns from marks: give each answer a",
        ),
        (
            ["kto", "recipe.yaml", "--set", "sft=null", "--set", "data.preferences=ranked.jsonl"],
            "Rankings are for reward, dpo and orpo",
        ),
        (
            ["dpo", "recipe.yaml", "--set", "sft=null", "--set", "data.preferences=prompts.jsonl"],
            "are for the methods that sample, such as",
        ),
        (["dpo", "recipe.yaml", "--set", "dpo.loss=sppo"], "`dpo.loss`"),
        (
            ["dpo", "recipe.yaml", "--set", "dpo.target_margin=2"],
            "`dpo.target_margin` is read only by `dpo.loss` = simpo",
        ),
        (["kto", "recipe.yaml", "--set", "kto.loss=bco", "--set", "kto.desirable_weight=2"], "`kto.desirable_weight`"),
        (["loop", "recipe.yaml", "--set", "reward=null"], "add a `reward:` section"),
        (["loop", "recipe.yaml"], "`loop.comparisons` = 500, but there are only 30 distinct prompts"),
        (["loop", "recipe.yaml", "--set", "loop.labeler=human"], "did you mean `loop.labeller`?"),
        (
            ["evaluate", "recipe.yaml", *("--set", "sft=null", "--set", "reward=null", "--set", "ppo=null")],
            "there is only one model to evaluate",
        ),
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
    message = refused(capsys, "sft", "recipe.yaml")
    assert "pairs.jsonl:31" in message and "only the good rows with --set data.lenient=true" in message
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


@pytest.mark.parametrize(
    ("verb", "data", "counted"),
    [
        ("dpo", "pairs", "comparisons"),
        ("orpo", "ranked", "comparisons"),
        ("kto", "pairs", "labels"),
        ("kto", "marked", "labels"),
    ],
)
def test_a_dry_run_of_a_preference_stage_counts_what_a_step_takes(
    verb: str, data: str, counted: str, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = files(workplace)
    settings = ("--set", f"data.preferences={data}.jsonl", "--set", f"{verb}.batch_size=4")
    assert main([verb, "recipe.yaml", "--dry-run", *settings]) == 0
    assert files(workplace) == before
    text = " ".join(capsys.readouterr().out.split())
    found = re.search(rf"(\d+) {counted}, (\d+) held out │ (\d+) of 4", text)
    assert found, text
    train, held_out, steps = map(int, found.groups())
    assert train + held_out == (60 if (verb, data) == ("kto", "pairs") else 30)
    assert steps == -(-train // 4)


@pytest.mark.parametrize("verb", ["dpo", "orpo", "kto"])
def test_a_preference_stage_leaves_a_model_a_card_and_its_story(verb: str, workplace: Path) -> None:
    settings = ("--set", "sft=null", "--set", f"{verb}.max_steps=2", "--set", f"{verb}.batch_size=8")
    assert main([verb, "recipe.yaml", *settings]) == 0
    stage = workplace / "runs" / "demo" / verb
    card = (stage / "model" / "README.md").read_text()
    assert f"stage `{verb}`" in card and "| eval/accuracy |" in card
    assert "Log-probability of the answers" in (stage / "report.html").read_text()
    assert json.loads((stage.parent / "summary.json").read_text())["stages"] == ["base", verb]


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
