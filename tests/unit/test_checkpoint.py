from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from accord.errors import AccordError, ConfigError, TrainingError
from accord.training.checkpoint import Loaded, Snapshot, load_latest, save_checkpoint

PROPERTY = settings(max_examples=50, derandomize=True, deadline=None)
FILES = ("manifest.json", "model.safetensors", "optimizer.safetensors", "state.json")


def snapshot(step: int) -> Snapshot:
    """A small state in which every file differs between steps."""
    model = {"weight": torch.arange(12.0).reshape(3, 4) + step, "count": torch.tensor(step)}
    return Snapshot(step, {"model": model, "optimizer": {"exp_avg": torch.full((5,), step / 3)}}, {"kl_coef": step / 7})


def bits(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.dtype, tuple(tensor.shape), bytes(tensor.contiguous().reshape(-1).view(torch.uint8).tolist())


def require_equal(loaded: Loaded, expected: Snapshot) -> None:
    found = loaded.snapshot
    assert found is not None
    assert found.step == expected.step
    assert found.values == expected.values
    assert found.tensors.keys() == expected.tensors.keys()
    for component, tensors in expected.tensors.items():
        assert {n: bits(t) for n, t in found.tensors[component].items()} == {n: bits(t) for n, t in tensors.items()}


def only_value(values: dict[str, Any]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        save_checkpoint(Path(folder), Snapshot(1, {}, values))
        loaded = load_latest(Path(folder)).snapshot
    assert loaded is not None
    return loaded.values


# --- what is saved is what is loaded


@pytest.mark.parametrize("shape", [(), (1,), (0, 3), (7,), (3, 5)])
@pytest.mark.parametrize(
    "dtype",
    [
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
        torch.bool,
    ],
)
def test_every_dtype_and_shape_keeps_its_bits(tmp_path: Path, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    if dtype.is_floating_point and tensor.numel():
        tensor.view(-1)[0] = float("-inf")
        tensor.view(-1)[-1] = -0.0
    saved = Snapshot(1, {"model": {"t": tensor}, "nothing": {}}, {})
    save_checkpoint(tmp_path, saved)
    require_equal(load_latest(tmp_path), saved)


leaves = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
json_values = st.recursive(leaves, lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(), v, max_size=3))


@PROPERTY
@given(values=st.dictionaries(st.text(), json_values, max_size=4))
def test_values_come_back_exactly(values: dict[str, Any]) -> None:
    """`repr` also tells -0.0 from 0.0, 1 from 1.0 and True from 1."""
    assert repr(only_value(values)) == repr(values)


def test_half_a_surrogate_pair_and_a_128_bit_integer_come_back() -> None:
    values = {"text": "\ud83d", "counter": 2**128 - 1, "tiny": 5e-324}
    assert only_value(values) == values


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_value_that_is_not_finite_is_refused_by_name(tmp_path: Path, bad: float) -> None:
    with pytest.raises(TrainingError, match=r"values\.norm\.mean\[1\]"):
        save_checkpoint(tmp_path, Snapshot(1, {}, {"norm": {"mean": [0.0, bad]}}))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("bad", [(1, 2), {1: 2}, {"a", "b"}, b"x", torch.tensor(1)])
def test_a_value_that_json_would_change_is_refused(tmp_path: Path, bad: object) -> None:
    with pytest.raises(TypeError, match=r"values\.x"):
        save_checkpoint(tmp_path, Snapshot(1, {}, {"x": bad}))


def test_tied_sliced_transposed_and_gradient_tensors_can_be_saved(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    parameter = torch.nn.Parameter(base.clone())
    tensors = {
        "embed": base,
        "head": base,
        "transposed": base.T,
        "column": base[:, 1],
        "rows": base[1:],
        "expanded": torch.ones(1).expand(4),
        "parameter": parameter,
        "tied_parameter": parameter,
    }
    saved = Snapshot(1, {"model": tensors}, {})
    save_checkpoint(tmp_path, saved)
    require_equal(load_latest(tmp_path), saved)


def test_loaded_tensors_live_in_fresh_aligned_memory_of_their_own(tmp_path: Path) -> None:
    """Odd sizes put the tensors at odd places in the file; a view into it would inherit them."""
    tensors = {f"t{n}": torch.arange(2 * n + 1, dtype=torch.uint8) for n in range(8)} | {"f": torch.arange(5.0)}
    path = save_checkpoint(tmp_path, Snapshot(1, {"model": tensors}, {}))
    found = load_latest(tmp_path).snapshot
    assert found is not None
    with open(path / "model.safetensors", "r+b") as file:
        file.write(b"\xff" * os.path.getsize(path / "model.safetensors"))
    for name, tensor in found.tensors["model"].items():
        assert torch.equal(tensor, tensors[name])
        assert tensor.data_ptr() % 64 == 0
        assert tensor.untyped_storage().nbytes() == tensor.nbytes


def test_no_file_of_a_checkpoint_is_a_pickle(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, snapshot(1))
    assert sorted(p.name for p in path.iterdir()) == list(FILES)
    assert json.loads((path / "manifest.json").read_text())["files"].keys() == set(FILES[1:])


def test_without_checkpoints_there_is_no_snapshot_and_nothing_to_note(tmp_path: Path) -> None:
    assert load_latest(tmp_path) == Loaded(None)
    assert load_latest(tmp_path / "absent") == Loaded(None)


def test_steps_are_ordered_as_numbers(tmp_path: Path) -> None:
    for step in (99_999_999, 100_000_000):
        save_checkpoint(tmp_path, snapshot(step))
    require_equal(load_latest(tmp_path), snapshot(100_000_000))


# --- damage


def truncate(size: Callable[[int], int]) -> Callable[[Path, Path], None]:
    return lambda path, _older: os.truncate(path, size(path.stat().st_size))


def flip_a_bit(path: Path, _older: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES: dict[str, Callable[[Path, Path], object]] = {
    "emptied": truncate(lambda size: 0),
    "cut to one byte": truncate(lambda size: 1),
    "cut in half": truncate(lambda size: size // 2),
    "one byte short": truncate(lambda size: size - 1),
    "one bit flipped": flip_a_bit,
    "deleted": lambda path, _older: path.unlink(),
    "swapped with an older one": lambda path, older: shutil.copy(older, path),
    "filled with zeros": lambda path, _older: path.write_bytes(bytes(path.stat().st_size)),
    "grown by a byte": lambda path, _older: path.write_bytes(path.read_bytes() + b"\n"),
    "replaced by a folder": lambda path, _older: (path.unlink(), path.mkdir()),
}


def require_fallback(folder: Path, file: str) -> str:
    """The newest of steps 1 and 2 is damaged in `file`: one note, the older is used, and the next load is clean."""
    loaded = load_latest(folder)
    require_equal(loaded, snapshot(1))
    (note,) = loaded.notes
    assert "step-00000002" in note
    assert f"({file}: " in note
    assert (folder / ".corrupt-step-00000002").is_dir()
    again = load_latest(folder)
    require_equal(again, snapshot(1))
    assert again.notes == ()
    return note


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("file", FILES)
def test_a_damaged_file_is_noted_and_the_older_checkpoint_is_used(tmp_path: Path, file: str, damage: str) -> None:
    older, newer = (save_checkpoint(tmp_path, snapshot(step)) for step in (1, 2))
    DAMAGES[damage](newer / file, older / file)
    require_fallback(tmp_path, file)


def test_an_extra_file_is_noted_and_the_older_checkpoint_is_used(tmp_path: Path) -> None:
    _, newer = (save_checkpoint(tmp_path, snapshot(step)) for step in (1, 2))
    (newer / "extra.safetensors").write_bytes(b"x")
    assert "not listed" in require_fallback(tmp_path, "extra.safetensors")


def test_an_older_checkpoint_under_a_newer_name_is_not_believed(tmp_path: Path) -> None:
    older, newer = (save_checkpoint(tmp_path, snapshot(step)) for step in (1, 2))
    shutil.rmtree(newer)
    shutil.copytree(older, newer)
    require_fallback(tmp_path, "manifest.json")


@PROPERTY
@given(data=st.data(), file=st.sampled_from(FILES))
def test_any_flipped_bit_anywhere_is_noticed(data: st.DataObject, file: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        _, newer = (save_checkpoint(Path(folder), snapshot(step)) for step in (1, 2))
        content = bytearray((newer / file).read_bytes())
        bit = data.draw(st.integers(0, 8 * len(content) - 1))
        content[bit // 8] ^= 1 << bit % 8
        (newer / file).write_bytes(content)
        loaded = load_latest(Path(folder))
        require_equal(loaded, snapshot(1))
        (note,) = loaded.notes
        assert f"({file}: " in note


def test_when_all_are_damaged_there_is_no_snapshot_but_a_note_for_each(tmp_path: Path) -> None:
    for step in (1, 2):
        (save_checkpoint(tmp_path, snapshot(step)) / "state.json").write_text("{}")
    loaded = load_latest(tmp_path)
    assert loaded.snapshot is None
    assert len(loaded.notes) == 2
    assert "step-00000002" in loaded.notes[0]
    assert "step-00000001" in loaded.notes[1]


def test_the_same_step_can_be_damaged_twice(tmp_path: Path) -> None:
    for _ in range(3):
        os.truncate(save_checkpoint(tmp_path, snapshot(1)) / "state.json", 0)
        assert load_latest(tmp_path).snapshot is None
    assert len(list(tmp_path.glob(".corrupt-step-00000001*"))) == 3


def test_half_written_folders_are_cleaned_up_in_silence(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, snapshot(1))
    shutil.copytree(path, tmp_path / ".tmp-step-00000002")
    loaded = load_latest(tmp_path)
    require_equal(loaded, snapshot(1))
    assert loaded.notes == ()
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]


# --- how it is saved


def test_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    for step in range(1, 6):
        save_checkpoint(tmp_path, snapshot(step), keep=3)
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"step-0000000{step}" for step in (3, 4, 5)]


@pytest.mark.parametrize("keep", [1, 0, -1])
def test_keeping_fewer_than_two_is_refused_with_the_reason(tmp_path: Path, keep: int) -> None:
    with pytest.raises(ConfigError, match=f"keep is {keep}.*damaged"):
        save_checkpoint(tmp_path, snapshot(1), keep=keep)


def test_a_step_that_is_already_saved_is_left_as_it_is(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, snapshot(1))
    before = {p.name: p.stat().st_mtime_ns for p in path.iterdir()}
    assert save_checkpoint(tmp_path, snapshot(1)) == path
    assert {p.name: p.stat().st_mtime_ns for p in path.iterdir()} == before


def test_each_byte_is_durable_before_what_depends_on_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files, then the manifest, then the folder's names, then the commit by rename, then the parent, then removals."""
    for step in (1, 2):
        save_checkpoint(tmp_path, snapshot(step))
    events: list[str] = []
    real_fsync, real_replace, real_rmtree = os.fsync, os.replace, shutil.rmtree

    def fsync(descriptor: int) -> None:
        events.append("fsync " + os.path.relpath(os.readlink(f"/proc/self/fd/{descriptor}"), tmp_path))
        real_fsync(descriptor)

    def replace(source: Path, target: Path) -> None:
        events.append(f"rename {os.path.relpath(source, tmp_path)} to {os.path.relpath(target, tmp_path)}")
        real_replace(source, target)

    def rmtree(path: Path, **options: Any) -> None:
        if path.exists():
            events.append(f"remove {os.path.relpath(path, tmp_path)}")
        real_rmtree(path, **options)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    monkeypatch.setattr(shutil, "rmtree", rmtree)
    save_checkpoint(tmp_path, snapshot(3))
    new = ".tmp-step-00000003"
    manifest = f"{new}/.manifest.json.tmp-{os.getpid()}"
    assert sorted(events[:3]) == [f"fsync {new}/{file}" for file in FILES[1:]]
    assert events[3:] == [
        f"fsync {manifest}",
        f"rename {manifest} to {new}/manifest.json",
        f"fsync {new}",
        f"rename {new} to step-00000003",
        "fsync .",
        "rename step-00000001 to .tmp-step-00000001",
        "remove .tmp-step-00000001",
    ]


def require_untouched(folder: Path, error: AccordError) -> None:
    assert str(folder / "step-00000002") in str(error)
    assert [p.name for p in folder.iterdir()] == ["step-00000001"]
    require_equal(load_latest(folder), snapshot(1))


def test_too_little_space_is_said_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """10,000 float32 numbers and the two characters of an empty state: 1.2 * 40,002 rounded up is 48,003 bytes."""
    save_checkpoint(tmp_path, snapshot(1))
    usage = namedtuple("usage", "total used free")
    big = Snapshot(2, {"model": {"weight": torch.zeros(10_000)}}, {})
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 48_002, 48_002))
    with pytest.raises(TrainingError, match=r"48,003 bytes are needed, 48,002 are free") as caught:
        save_checkpoint(tmp_path, big)
    require_untouched(tmp_path, caught.value)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 48_003, 48_003))
    save_checkpoint(tmp_path, big)
    require_equal(load_latest(tmp_path), big)


@pytest.mark.parametrize("limit", [0, 50, 150, 250, 1000])
def test_a_disk_that_fills_up_while_saving_costs_no_older_checkpoint(tmp_path: Path, limit: int) -> None:
    save_checkpoint(tmp_path, snapshot(1))
    big = Snapshot(2, snapshot(2).tensors | {"value": {"weight": torch.zeros(300)}}, {})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(TrainingError, match="make room") as caught:
            save_checkpoint(tmp_path, big)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    require_untouched(tmp_path, caught.value)


@pytest.mark.parametrize("failing_call", range(5))
def test_a_disk_that_cannot_make_bytes_durable_costs_no_older_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing_call: int
) -> None:
    save_checkpoint(tmp_path, snapshot(1))
    real_fsync, calls = os.fsync, iter(range(100))

    def fsync(descriptor: int) -> None:
        if next(calls) == failing_call:
            raise OSError(5, "Input/output error")
        real_fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(TrainingError, match="Input/output error") as caught:
        save_checkpoint(tmp_path, snapshot(2))
    monkeypatch.setattr(os, "fsync", real_fsync)
    require_untouched(tmp_path, caught.value)


# --- killed at any moment

KILLS = '''
import json, os, random, shutil, signal, sys, time
from pathlib import Path
import torch
from accord.training import checkpoint
from accord.training.checkpoint import Snapshot, load_latest, save_checkpoint

torch.set_num_threads(1)  # threads do not survive a fork
FOLDER = Path(sys.argv[1])

def snapshot(step):
    tensors = {"model": {"w": torch.full((20_000,), float(step))}, "optimizer": {"m": torch.full((20_000,), -step)}}
    return Snapshot(step, tensors, {"x": step / 3})

def check(folder, acknowledged):
    """The newest checkpoint is the last one whose save returned, or the one being saved when the kill came."""
    loaded = load_latest(folder)
    assert loaded.notes == (), loaded.notes
    if loaded.snapshot is None:
        assert acknowledged == 0, acknowledged
        return 0
    step = loaded.snapshot.step
    assert step in (acknowledged, acknowledged + 1), (step, acknowledged)
    expected = snapshot(step)
    assert loaded.snapshot.values == expected.values
    for part in expected.tensors:
        for name, tensor in expected.tensors[part].items():
            assert torch.equal(loaded.snapshot.tensors[part][name], tensor)
    return step

def fork(work):
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            work(lambda step: os.write(writer, b"x"))
        finally:
            os._exit(0)
    os.close(writer)
    return child, reader

def ending(child, reader, start):
    _, status = os.waitpid(child, 0)
    with os.fdopen(reader, "rb") as pipe:
        return status, start + len(pipe.read())

def at_random_times(folder, kills):
    randomness, step, started = random.Random(0), 1, time.monotonic()
    save_checkpoint(folder, snapshot(1))
    longest = max(0.1, 5 * (time.monotonic() - started))  # a busy disk takes long to sync
    for _ in range(kills):
        def work(acknowledge, start=step):
            for next_step in range(start + 1, start + 10_000):
                save_checkpoint(folder, snapshot(next_step))
                acknowledge(next_step)
        child, reader = fork(work)
        time.sleep(randomness.uniform(0.0, longest))
        os.kill(child, signal.SIGKILL)
        status, acknowledged = ending(child, reader, step)
        assert os.WIFSIGNALED(status)
        step = check(folder, acknowledged)
    return step

def before_every_call(folder):
    """Die before the n-th fsync, rename, write of tensors, or removal of a save that replaces an older checkpoint."""
    deaths = 0
    while True:
        shutil.rmtree(folder, ignore_errors=True)
        for step in (1, 2):
            save_checkpoint(folder, snapshot(step))
        def work(acknowledge):
            calls = iter(range(1000))
            def dying(real):
                def call(*args, **options):
                    if next(calls) == deaths:
                        os.kill(os.getpid(), signal.SIGKILL)
                    return real(*args, **options)
                return call
            os.fsync, os.replace, os.unlink, os.rmdir = map(dying, (os.fsync, os.replace, os.unlink, os.rmdir))
            checkpoint.save_file = dying(checkpoint.save_file)
            save_checkpoint(folder, snapshot(3))
            acknowledge(3)
        status, acknowledged = ending(*fork(work), 2)
        check(folder, acknowledged)
        assert not list(folder.glob(".*")), list(folder.glob(".*"))
        if not os.WIFSIGNALED(status):
            assert acknowledged == 3
            return deaths
        deaths += 1

print(json.dumps({"last_step": at_random_times(FOLDER / "random", 20), "deaths": before_every_call(FOLDER / "calls")}))
'''


def test_a_kill_at_any_moment_leaves_the_newest_or_the_previous_checkpoint(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-c", KILLS, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["last_step"] > 1
    assert report["deaths"] >= 10
