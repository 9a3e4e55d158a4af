from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from accord.atomic import write_text
from accord.errors import AccordError, CheckpointError, TrainingError
from accord.training import runfolder
from accord.training.runfolder import RunFolder

CONFIG: dict[str, Any] = {"name": "demo", "out": "runs/demo", "seed": 3, "ppo": {"kl_coef": 0.05, "steps": 100}}
FINGERPRINTS = {"prefs.jsonl": "aa11"}


def open_run(path: Path, config: dict[str, Any] = CONFIG, fingerprints: dict[str, str] = FINGERPRINTS) -> RunFolder:
    return RunFolder.open(path, resolved_config=config, fingerprints=fingerprints)


def begin(path: Path, config: dict[str, Any] = CONFIG) -> None:
    """A run that made one step and stopped."""
    with open_run(path, config) as run:
        run.truncate_after(0)
        run.append_metrics(1, {})


def test_a_new_run_records_what_was_asked_and_what_it_runs_on(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "demo"
    with open_run(path) as run:
        assert run.notes == ()
        assert run.finished is None
    assert yaml.safe_load((path / "config.yaml").read_text()) == CONFIG
    record = json.loads((path / "run.json").read_text())
    assert record["seed"] == 3
    assert record["data"] == FINGERPRINTS
    assert len(record["starts"]) == 1
    assert record["starts"][0]["command"] == sys.argv
    environment = record["starts"][0]["environment"]
    assert environment["threads"] >= 1
    assert environment["torch"].startswith("2.")


def test_the_same_run_under_another_out_continues_and_adds_a_start(tmp_path: Path) -> None:
    open_run(tmp_path).__exit__()
    with open_run(tmp_path, CONFIG | {"out": str(tmp_path)}) as run:
        assert run.notes == ()
    assert len(json.loads((tmp_path / "run.json").read_text())["starts"]) == 2


def test_a_sequence_in_the_configuration_is_recognised_as_tuple_and_as_list(tmp_path: Path) -> None:
    begin(tmp_path, {"betas": (0.9, 0.95)})
    open_run(tmp_path, {"betas": (0.9, 0.95)}).__exit__()
    open_run(tmp_path, {"betas": [0.9, 0.95]}).__exit__()
    assert yaml.safe_load((tmp_path / "config.yaml").read_text()) == {"betas": [0.9, 0.95]}


def test_another_run_in_the_folder_is_refused_with_each_difference(tmp_path: Path) -> None:
    begin(tmp_path)
    other = CONFIG | {"ppo": {"kl_coef": 0.1, "clip_range": 0.2}}
    with pytest.raises(CheckpointError) as caught:
        open_run(tmp_path, other, {"prefs.jsonl": "bb22"})
    assert caught.value.exit_code == 2
    lines = str(caught.value).splitlines()
    assert str(tmp_path) in lines[0]
    assert lines[1:-1] == [
        "  content of prefs.jsonl: aa11 there, bb22 now",
        "  ppo.clip_range: (not set) there, 0.2 now",
        "  ppo.kl_coef: 0.05 there, 0.1 now",
        "  ppo.steps: 100 there, (not set) now",
    ]
    assert "--set out=" in lines[-1]
    assert "delete" in lines[-1]


def test_an_optional_key_that_is_not_set_is_no_difference(tmp_path: Path) -> None:
    """A newer version knows more optional keys than the one that began the folder."""
    begin(tmp_path)
    with open_run(tmp_path, CONFIG | {"ppo": CONFIG["ppo"] | {"kl_budget": None}, "loop": None}):
        pass
    with pytest.raises(CheckpointError, match=r"ppo\.kl_budget: \(not set\) there, 12 now"):
        open_run(tmp_path, CONFIG | {"ppo": CONFIG["ppo"] | {"kl_budget": 12}})


def test_at_most_ten_differences_are_listed(tmp_path: Path) -> None:
    begin(tmp_path, {f"k{n:02}": n for n in range(14)})
    with pytest.raises(CheckpointError) as caught:
        open_run(tmp_path, {f"k{n:02}": n + 1 for n in range(14)})
    lines = str(caught.value).splitlines()[1:-1]
    assert len(lines) == 11
    assert lines[9].startswith("  k09:")
    assert lines[10] == "  ... and 4 more"


def test_a_refused_start_changes_nothing_and_frees_the_folder(tmp_path: Path) -> None:
    begin(tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.name != ".lock"}
    with pytest.raises(CheckpointError):
        open_run(tmp_path, {"seed": 4})
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.name != ".lock"} == before
    open_run(tmp_path).__exit__()


@pytest.mark.parametrize("left", [(), ("metrics.jsonl",)])
def test_a_start_that_failed_before_its_first_step_leaves_the_folder_to_the_mended_one(
    tmp_path: Path, left: tuple[str, ...]
) -> None:
    """A mistyped path, say, then the right one: with nothing logged, saved or finished there is no run to mix up."""
    open_run(tmp_path).__exit__()
    for name in left:
        (tmp_path / name).touch()
    begin(tmp_path, {"seed": 4})
    assert yaml.safe_load((tmp_path / "config.yaml").read_text()) == {"seed": 4}
    record = json.loads((tmp_path / "run.json").read_text())
    assert (record["seed"], record["config"], len(record["starts"])) == (4, {"seed": 4}, 1)


@pytest.mark.parametrize("left", ["checkpoints", "summary.json"])
def test_a_run_that_saved_or_finished_without_a_logged_step_is_not_given_up(tmp_path: Path, left: str) -> None:
    open_run(tmp_path).__exit__()
    (tmp_path / left).mkdir()
    with pytest.raises(CheckpointError, match="already holds a run that differs"):
        open_run(tmp_path, {"seed": 4})


leaves = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
values = st.recursive(
    leaves, lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(), v, max_size=3), max_leaves=6
)


@settings(max_examples=50, derandomize=True, deadline=None)
@given(config=st.dictionaries(st.text(), values, max_size=4))
def test_any_configuration_is_recognised_as_itself(config: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        begin(Path(folder), config)
        with open_run(Path(folder), config) as run:
            assert run.notes == ()


def test_a_changed_thread_count_is_noted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_run(tmp_path).__exit__()
    changed = runfolder.environment() | {"threads": 64, "platform": "elsewhere"}
    monkeypatch.setattr(runfolder, "environment", lambda device: changed)
    with open_run(tmp_path) as run:
        (note,) = run.notes
    assert "threads" in note
    assert "-> 64" in note
    assert "platform" not in note
    with open_run(tmp_path) as run:
        assert run.notes == ()


def test_somebody_elses_config_file_is_refused_and_kept(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("mine: 1\n")
    with pytest.raises(CheckpointError, match=r"config\.yaml of something else"):
        open_run(tmp_path)
    assert (tmp_path / "config.yaml").read_text() == "mine: 1\n"


def test_a_start_killed_before_config_yaml_is_made_up_for(tmp_path: Path) -> None:
    open_run(tmp_path).__exit__()
    (tmp_path / "config.yaml").unlink()
    open_run(tmp_path).__exit__()
    assert yaml.safe_load((tmp_path / "config.yaml").read_text()) == CONFIG


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "{}", '{"starts": [], "data": {}, "config": {}}', '{"starts": [1]}']
)
def test_a_damaged_run_record_is_a_clear_error(tmp_path: Path, content: str) -> None:
    open_run(tmp_path).__exit__()
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"run\.json is not readable.*delete"):
        open_run(tmp_path)


def test_a_file_in_place_of_the_folder_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="run folder"):
        open_run(tmp_path / "file")
    with pytest.raises(CheckpointError, match="run folder"):
        open_run(tmp_path / "file" / "below")


def test_a_second_process_is_told_who_works_in_the_folder(tmp_path: Path) -> None:
    with open_run(tmp_path):
        program = (
            "import sys, pathlib; from accord.training.runfolder import RunFolder\n"
            "try: RunFolder.open(pathlib.Path(sys.argv[1]), resolved_config={}, fingerprints={})\n"
            "except Exception as error: print(type(error).__name__, error)"
        )
        result = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True)
    assert result.stdout.startswith("CheckpointError")
    assert f"process {os.getpid()}" in result.stdout


def test_the_lock_of_a_killed_process_is_free(tmp_path: Path) -> None:
    program = (
        "import sys, pathlib, time; from accord.training.runfolder import RunFolder\n"
        "with RunFolder.open(pathlib.Path(sys.argv[1]), resolved_config={}, fingerprints={}):\n"
        "    print('open', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "open\n"
        with pytest.raises(CheckpointError, match=f"process {process.pid}"):
            open_run(tmp_path, {}, {})
        process.send_signal(signal.SIGKILL)
        process.wait()
    with open_run(tmp_path, {}, {}):
        assert (tmp_path / ".lock").read_text() == f"{os.getpid()}\n"


def log_steps(run: RunFolder, steps: range) -> None:
    for step in steps:
        run.append_metrics(step, {"l": step / 3})
        run.append_samples(step, [{"t": "a"}, {"t": "b"}])


def test_logs_cut_at_any_byte_continue_as_if_never_interrupted(tmp_path: Path) -> None:
    """Steps 1 and 2 were synced before the checkpoint of step 2; a kill in step 3 can leave any part of its lines."""
    with open_run(tmp_path) as run:
        run.truncate_after(0)
        log_steps(run, range(1, 3))
        synced = {name: len((tmp_path / name).read_bytes()) for name in ("metrics.jsonl", "samples.jsonl")}
        log_steps(run, range(3, 5))
    whole = {name: (tmp_path / name).read_bytes() for name in synced}
    step_three = {name: whole[name].index(b'{"step": 4') for name in synced}
    for cut in range(max(step_three[name] - synced[name] for name in synced) + 1):
        for name in synced:
            (tmp_path / name).write_bytes(whole[name][: min(synced[name] + cut, step_three[name])])
        with open_run(tmp_path) as run:
            run.truncate_after(2)
            assert {name: len((tmp_path / name).read_bytes()) for name in synced} == synced
            log_steps(run, range(3, 5))
        assert {name: (tmp_path / name).read_bytes() for name in synced} == whole


def test_a_line_without_its_line_end_is_dropped(tmp_path: Path) -> None:
    with open_run(tmp_path) as run:
        run.truncate_after(0)
        log_steps(run, range(1, 3))
    metrics = tmp_path / "metrics.jsonl"
    first, second = metrics.read_bytes().splitlines(keepends=True)
    metrics.write_bytes(first + second[:-1])
    with open_run(tmp_path) as run:
        run.truncate_after(2)
    assert metrics.read_bytes() == first


def test_zeros_that_a_power_cut_left_at_the_end_are_dropped(tmp_path: Path) -> None:
    with open_run(tmp_path) as run:
        run.truncate_after(0)
        log_steps(run, range(1, 3))
    metrics = tmp_path / "metrics.jsonl"
    whole = metrics.read_bytes()
    for tail in (b"\0" * 50, b"\0" * 50 + b"\n", b"7\n", b'{"l": 1}\n', b'{"step": "x"}\n'):
        metrics.write_bytes(whole + tail)
        with open_run(tmp_path) as run:
            run.truncate_after(2)
        assert metrics.read_bytes() == whole


def test_starting_from_scratch_empties_the_logs(tmp_path: Path) -> None:
    with open_run(tmp_path) as run:
        run.truncate_after(0)
        log_steps(run, range(1, 3))
    with open_run(tmp_path) as run:
        run.truncate_after(0)
    assert (tmp_path / "metrics.jsonl").read_bytes() == b""
    assert (tmp_path / "samples.jsonl").read_bytes() == b""


def test_every_metric_keeps_its_bits_and_every_sample_its_line(tmp_path: Path) -> None:
    text = "two\nlines \u2028 \x85 half \ud83d 日本"
    with open_run(tmp_path) as run:
        run.truncate_after(0)
        run.append_metrics(1, {"train/loss": 0.1 + 0.2, "train/tokens": 12})
        run.append_samples(1, [{"completion": text, "score": None}])
    assert (
        tmp_path / "metrics.jsonl"
    ).read_text() == '{"step": 1, "train/loss": 0.30000000000000004, "train/tokens": 12}\n'
    (line,) = (tmp_path / "samples.jsonl").read_text().splitlines()
    assert json.loads(line) == {"step": 1, "completion": text, "score": None}


def test_a_metric_that_is_not_a_number_is_refused(tmp_path: Path) -> None:
    with open_run(tmp_path) as run:
        run.truncate_after(0)
        with pytest.raises(ValueError, match="JSON"):
            run.append_metrics(1, {"train/loss": float("nan")})
    assert (tmp_path / "metrics.jsonl").read_bytes() == b""


def test_lines_reach_the_system_before_the_next_one_is_asked_for(tmp_path: Path) -> None:
    with open_run(tmp_path) as run:
        run.truncate_after(0)
        run.append_metrics(1, {"l": 1})
        assert (tmp_path / "metrics.jsonl").read_bytes() == b'{"step": 1, "l": 1}\n'


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of what was made durable, in order."""
    names: list[str] = []
    real_fsync = os.fsync

    def fsync(descriptor: int) -> None:
        names.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        real_fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    return names


def test_the_names_of_new_folders_and_logs_are_made_durable(tmp_path: Path, synced: list[str]) -> None:
    with open_run(tmp_path / "runs" / "demo") as run:
        assert synced[:2] == [tmp_path.name, "runs"]
        synced.clear()
        run.truncate_after(0)
        assert synced == ["metrics.jsonl", "samples.jsonl", "guards.jsonl", "demo"]


def test_a_finished_run_has_its_summary_and_synced_its_logs_first(tmp_path: Path, synced: list[str]) -> None:
    with open_run(tmp_path) as run:
        run.truncate_after(0)
        log_steps(run, range(1, 2))
        synced.clear()
        run.finish({"win_rate": 0.7})
        assert run.finished == {"win_rate": 0.7}
    assert synced[:3] == ["metrics.jsonl", "samples.jsonl", "guards.jsonl"]
    assert synced[3].startswith(".summary.json.tmp-")
    with open_run(tmp_path) as run:
        assert run.finished == {"win_rate": 0.7}


@contextmanager
def disk_that_refuses_files_above(size: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_that_fills_up_under_a_log_is_a_clear_error_and_repaired_on_resume(tmp_path: Path) -> None:
    with open_run(tmp_path) as run:
        run.truncate_after(0)
        run.append_metrics(1, {"l": 1})
        with disk_that_refuses_files_above(30), pytest.raises(TrainingError, match=r"metrics\.jsonl.*Make room"):
            run.append_metrics(2, {"l": 2})
    assert len((tmp_path / "metrics.jsonl").read_bytes()) == 30
    with open_run(tmp_path) as run:
        run.truncate_after(2)
    assert (tmp_path / "metrics.jsonl").read_bytes() == b'{"step": 1, "l": 1}\n'


def test_a_write_the_disk_refuses_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    write_text(path, "old")
    with disk_that_refuses_files_above(100), pytest.raises(AccordError, match=str(path)):
        write_text(path, "x" * 1000)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["summary.json"]
