"""`accord loop` as a command: what two rounds leave, killed at any moment, by people through a file, and with labels
that mean nothing."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from support import RECIPE, Zygote, survives_kills, write_pairs

OFFLINE: dict[str, Any] = {
    "batch_size": 8, "max_steps": 6, "checkpoint_every": 2, "eval_every": 4, "learning_rate": 3e-3,
}  # fmt: skip
LOOP: dict[str, Any] = {
    "seed": 3,
    "threads": 1,
    "model": RECIPE["model"],
    "data": {"holdout": 0.3, "max_tokens": 64},
    "sft": OFFLINE,
    "reward": OFFLINE,
    "ppo": {
        "prompts_per_step": 8, "samples_per_prompt": 2, "episodes": 64, "max_new_tokens": 8, "learning_rate": 1e-2,
        "kl_coef": 0.0, "checkpoint_every": 2, "samples_every": 2, "update_epochs": 2, "minibatches": 2,
    },
    "loop": {
        "rounds": 2, "comparisons": 20, "holdout_pairs": 10, "patience": 2,
        "labeller": "function", "label_function": "tastes:letters",
    },
}  # fmt: skip
# People who like letters; and people whose choices say nothing of the answers.
TASTES = """
import hashlib
def letters(prompt, completion):
    return sum(c.isalpha() for c in completion)
def whims(prompt, completion):
    return hashlib.sha256((prompt + completion).encode()).digest()[0]
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("loop")
    (folder / "tastes.py").write_text(TASTES)
    data = LOOP["data"] | {"sft": str(write_demonstrations(folder))}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(LOOP | {"data": data}))
    return folder / "recipe.yaml"


@pytest.fixture(scope="module")
def zygote(recipe: Path) -> Iterator[Zygote]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("PYTHONPATH", str(recipe.parent), prepend=os.pathsep)
        with Zygote() as started:
            yield started


def write_demonstrations(folder: Path) -> Path:
    rows = [json.loads(line) for line in write_pairs(folder / "pairs.jsonl").read_text().splitlines()]
    file = folder / "demonstrations.jsonl"
    file.write_text("".join(json.dumps({"prompt": r["prompt"], "completion": r["chosen"]}) + "\n" for r in rows))
    return file


def loop(zygote: Zygote, recipe: Path, out: Path, *words: str, after: float | None = None) -> tuple[int, str, float]:
    return zygote.run("loop", str(recipe), "--set", f"out={out}", *words, after=after)


def left(root: Path) -> dict[str, Any]:
    """All that must not depend on interruptions."""
    found: dict[str, Any] = {"lineage": json.loads((root / "lineage.json").read_text())}
    for file in sorted([*root.rglob("*.safetensors"), *root.rglob("*.jsonl")]):
        if "checkpoints" not in file.parts and file.name != "metrics.jsonl":
            found[str(file.relative_to(root))] = hashlib.sha256(file.read_bytes()).hexdigest()
    return found


@pytest.fixture(scope="module")
def whole(zygote: Zygote, recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """A loop that was never interrupted, and the seconds it took."""
    root = tmp_path_factory.mktemp("whole") / "run"
    code, output, seconds = loop(zygote, recipe, root)
    assert code == 0, output
    return root, seconds


def test_every_policy_has_its_parents_and_what_was_measured_of_it(whole: tuple[Path, float]) -> None:
    root, _ = whole
    lineage = json.loads((root / "lineage.json").read_text())
    policies, rounds = lineage["policies"], lineage["rounds"]
    assert [one["parent"] for one in policies] == [None, 0, rounds[1]["best_so_far"]]
    assert [one["folder"] for one in policies] == ["sft/model", "round-1/ppo/model", "round-2/ppo/model"]
    assert len({one["weights"] for one in policies}) == 3
    for policy in policies[1:]:
        assert policy["judged_against"] == rounds[policy["policy"] - 1]["best_so_far"]
        assert policy["win_rate"]["n"] == 10 and policy["kl_to_parent_nats"] is not None
        assert policy["reward_model"]["labels_of_rounds"] == list(range(1, policy["policy"] + 1))
    assert all(one["gold_utility"]["n"] == 10 for one in policies)
    assert [one["labels"] for one in rounds] == [len(sheet(root / one["folder"])) for one in rounds]
    assert [one["old_reward_model_agrees"] is None for one in rounds] == [True, False, True]

    summary = json.loads((root / "summary.json").read_text())
    assert (root / summary["model"] / "model.safetensors").exists()
    assert {"round-1/sample", "round-1/label", "round-2/reward", "after-round-2/label"} <= set(summary["stages"])
    report = (root / "report.html").read_text()
    assert "win rate of the policy sampled here" in report and "How well the reward models judge" in report


def test_the_win_rate_and_the_drift_are_those_of_the_files(whole: tuple[Path, float]) -> None:
    """Recounted from the pairs and the labellers' rule alone."""
    root, _ = whole
    letters = {key: sum(c.isalpha() for c in text) for pair in pairs(root / "round-2") for key, text in sides(pair)}
    wins, agreed = [], []
    for pair in pairs(root / "round-2"):
        a, b = (letters[key] for key, _ in sides(pair))
        if pair["writers"][0] != pair["writers"][1]:
            wins.append(0.5 if a == b else float(pair["writers"][a < b] == 1))
        elif a != b:
            agreed.append(pair["id"])
    lineage = json.loads((root / "lineage.json").read_text())
    assert len(wins) == 10 and lineage["policies"][1]["win_rate"]["value"] == sum(wins) / 10
    assert lineage["rounds"][1]["old_reward_model_agrees"]["n"] == len(agreed)
    assert len((root / "round-2/label/comparisons.jsonl").read_text().splitlines()) == len(agreed)


def test_the_rounds_ask_for_different_prompts_and_the_sheet_does_not_say_who_wrote(whole: tuple[Path, float]) -> None:
    root, _ = whole
    asked = [
        {row["prompt"] for row in pairs(root / f"round-{number}") if row["writers"] == [number - 1] * 2}
        for number in (1, 2)
    ]
    rounds = json.loads((root / "lineage.json").read_text())["rounds"]
    unusable = [one["equal_pairs_left_out"] + one["empty_pairs_left_out"] for one in rounds[:2]]
    assert [len(one) for one in asked] == [20 - count for count in unusable] and not asked[0] & asked[1]
    assert all(row.keys() == {"id", "prompt", "a", "b", "choice"} for row in sheet(root / "round-2"))
    held = [row["writers"] for row in pairs(root / "round-2") if row["writers"][0] != row["writers"][1]]
    assert {tuple(writers) for writers in held} == {(0, 1), (1, 0)}


def test_a_loop_killed_at_any_moment_ends_with_the_same_bits(
    zygote: Zygote, recipe: Path, whole: tuple[Path, float], tmp_path: Path
) -> None:
    root, seconds = whole
    survives_kills(
        "loop",
        4,
        seconds=seconds,
        start=lambda folder: tmp_path / f"run{folder}",
        run=lambda out, moment: loop(zygote, recipe, out, after=moment),
        left=left,
        expected=left(root),
    )


def test_a_finished_loop_is_not_repeated_and_another_one_is_refused(
    zygote: Zygote, recipe: Path, whole: tuple[Path, float]
) -> None:
    root, _ = whole
    before = left(root)
    code, output, _ = loop(zygote, recipe, root)
    assert code == 0 and output.count("already finished") == 12, output
    code, output, _ = loop(zygote, recipe, root, "--set", "loop.comparisons=10")
    assert code == 2 and "sample.comparisons: 20 there, 10 now" in output
    code, output, _ = loop(zygote, recipe, root, "--set", "loop.label_function=tastes:whims")
    assert code == 2 and "content of label function" in output
    assert left(root) == before


def test_labels_that_mean_nothing_stop_the_loop(zygote: Zygote, recipe: Path, tmp_path: Path) -> None:
    words = ("loop.label_function=tastes:whims", "loop.patience=1", "loop.rounds=5")
    code, output, _ = loop(zygote, recipe, tmp_path / "run", *(word for one in words for word in ("--set", one)))
    assert code == 0, output
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["model"] == "sft/model" and "No policy was shown to be better" in " ".join(summary["account"])
    assert not (tmp_path / "run/round-2/ppo").exists()


def test_people_label_through_files_and_equal_labels_give_equal_policies(
    zygote: Zygote, recipe: Path, whole: tuple[Path, float], tmp_path: Path
) -> None:
    root = tmp_path / "run"
    human = ("loop.labeller=human", "loop.label_function=null", "loop.rounds=1")
    words = [word for one in human for word in ("--set", one)]
    file = root / "round-1/label/sheet.jsonl"
    code, output, _ = loop(zygote, recipe, root, *words)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert code == 4 and f"{len(rows)} of {len(rows)} pairs to label in {file}" in " ".join(output.split())
    filled = [row | {"choice": favourite(row)} for row in rows]

    write(file, [*filled[:5], filled[5] | {"choice": "c"}, *rows[6:]])
    code, output, _ = loop(zygote, recipe, root, *words)
    assert code == 2 and f"{file}:6: `choice` is 'c'" in " ".join(output.split())
    write(file, [*filled[:5], *rows[5:]])
    code, output, _ = loop(zygote, recipe, root, *words)
    assert code == 4 and f"{len(rows) - 5} of {len(rows)} pairs to label" in " ".join(output.split())
    write(file, filled)
    code, output, _ = loop(zygote, recipe, root, *words)
    assert code == 4 and "after-round-1/label/sheet.jsonl" in "".join(output.split()), output
    policy = "round-1/ppo/model/model.safetensors"
    assert (root / policy).read_bytes() == (whole[0] / policy).read_bytes()

    file = root / "after-round-1/label/sheet.jsonl"
    write(file, [json.loads(line) | {"choice": "tie"} for line in file.read_text().splitlines()])
    code, output, _ = loop(zygote, recipe, root, *words)
    assert code == 0, output
    assert json.loads((root / "lineage.json").read_text())["policies"][1]["win_rate"]["value"] == 0.5


def favourite(row: dict[str, Any]) -> str:
    a, b = (sum(c.isalpha() for c in row[side]) for side in "ab")
    return "tie" if a == b else "a" if a > b else "b"


def write(file: Path, rows: list[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def pairs(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "sample/pairs.jsonl").read_text().splitlines()]


def sheet(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "sample/sheet.jsonl").read_text().splitlines()]


def sides(pair: dict[str, Any]) -> list[tuple[tuple[str, str], str]]:
    return [((pair["id"], side), pair[side]) for side in "ab"]
