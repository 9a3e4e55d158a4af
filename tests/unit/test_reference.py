"""Reference log-probabilities: the model's own numbers, computed once, whatever happens to files."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from accord.errors import AccordError, TrainingError
from accord.methods import reference
from accord.methods.reference import cache_folder, reference_logprobs
from accord.models.adapters import adapters_off, add_adapter
from accord.records import Origin, TokenGroup
from models_support import PAD_ID, tiny_model, token_group

PAIRS = [token_group("abc", "defg", "hi"), token_group("kl", "mnOp", "q"), token_group("abc", "rst", "hI")]


class Reference:
    """One model and one cache; `ask` counts the completions that the model is run on."""

    def __init__(self, folder: Path, model: Any = None) -> None:
        self.model = tiny_model("llama") if model is None else model
        self.folder, self.runs = folder, 0
        self.lines: list[str] = []
        self.rows = 0
        self.model.base_model.register_forward_pre_hook(self._count, with_kwargs=True)

    @property
    def cache(self) -> Path:
        return self.folder / "cache"

    def _count(self, _module: Any, _args: Any, kwargs: dict[str, Any]) -> None:
        self.rows += kwargs["input_ids"].shape[0]

    def ask(self, groups: Sequence[TokenGroup], run: str | None = None, **changes: Any) -> Tensor:
        """Each call is a run of its own unless `run` names one."""
        self.runs += 1
        self.rows, self.lines = 0, []
        arguments: dict[str, Any] = {"weights": "w", "layout": "plain", "budget": 4096, "pad_id": PAD_ID}
        arguments |= {"cache": self.cache, "kept": self.folder / (run or f"run{self.runs}")}
        return reference_logprobs(
            self.model, groups,
            **(arguments | changes),
            console=Console(file=io.StringIO()), say=self.lines.append,
        )  # fmt: skip

    def files(self, folder: str = "cache") -> list[Path]:
        return sorted((self.folder / folder).rglob("*.safetensors"))


@pytest.fixture
def asked(tmp_path: Path) -> Reference:
    return Reference(tmp_path)


def directly(model: Any, groups: Sequence[TokenGroup]) -> list[float]:
    """The same from the model's full logits, one completion at a time."""
    sums: list[float] = []
    for group in groups:
        for completion in group.completions:
            ids = torch.tensor([group.prompt_ids + completion.ids])
            with torch.no_grad():
                logprobs = model(input_ids=ids).logits[0].log_softmax(-1)
            start = len(group.prompt_ids)
            sums.append(
                sum(float(logprobs[start + t - 1, ids[0, start + t]]) for t, m in enumerate(completion.mask) if m)
            )
    return sums


# --- the numbers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["plain", "shared"])
@pytest.mark.parametrize("budget", [16, 4096])
def test_they_are_the_models_log_probabilities_of_counted_tokens_in_order(
    asked: Reference, layout: str, budget: int
) -> None:
    expected = torch.tensor(directly(asked.model, PAIRS))
    for _ in range(2):
        found = asked.ask(PAIRS, layout=layout, budget=budget)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert len(set(expected.tolist())) == 6


def test_no_groups_give_no_numbers(asked: Reference) -> None:
    assert asked.ask([]).shape == (0,)


def test_an_order_is_the_callers_whatever_order_the_files_have(asked: Reference) -> None:
    first = asked.ask(PAIRS)
    mixed = [PAIRS[2], replace(PAIRS[0], completions=PAIRS[0].completions[::-1]), PAIRS[1], PAIRS[2]]
    assert asked.ask(mixed).tolist() == first[[4, 5, 1, 0, 2, 3, 4, 5]].tolist()
    assert asked.rows == 0


def test_a_policy_with_its_adapter_off_is_a_reference(asked: Reference, tmp_path: Path) -> None:
    first = asked.ask(PAIRS)
    other = Reference(tmp_path / "adapted")
    add_adapter(other.model, rank=4, alpha=8, targets=(), seed=0)
    for name, parameter in other.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    assert not torch.equal(other.ask(PAIRS, cache=tmp_path / "elsewhere"), first)
    with adapters_off(other.model):
        assert torch.equal(other.ask(PAIRS), first)


# --- once and not again ----------------------------------------------------------------------------------------------


def test_a_second_run_computes_nothing_and_reads_the_same_bits(asked: Reference) -> None:
    first = asked.ask(PAIRS)
    assert asked.rows == 6
    assert asked.lines == [f"reference log-probabilities: 6 computed, 0 from the cache {asked.cache}"]
    again: list[dict[str, Any]] = [{}, {"layout": "shared"}, {"budget": 16}]
    for changes in again:
        assert torch.equal(asked.ask(PAIRS, **changes), first)
        assert asked.rows == 0
        assert asked.lines == [f"reference log-probabilities: 0 computed, 6 from the cache {asked.cache}"]


def test_other_weights_another_configuration_commit_or_number_format_share_nothing(asked: Reference) -> None:
    asked.ask(PAIRS)
    asked.ask(PAIRS, weights="other")
    assert asked.rows == 6
    asked.model.config.rope_parameters["rope_theta"] = 20000.0
    asked.ask(PAIRS)
    assert asked.rows == 6
    asked.model.config._commit_hash = "1234"
    asked.ask(PAIRS)
    assert asked.rows == 6
    asked.model.to(torch.bfloat16)
    asked.ask(PAIRS)
    assert asked.rows == 6
    asked.ask(PAIRS)
    assert asked.rows == 0


@pytest.mark.parametrize(
    ("changed", "computed"),
    [
        (token_group("abd", "defg", "hi"), 2),  # the prompt
        (token_group("abc", "defh", "hi"), 1),  # a completion
        (token_group("abc", "deFg", "hi"), 1),  # what counts
        (token_group("ab", "cdefg", "chi"), 2),  # where the completion begins
        (token_group("abc", "hi"), 0),
        (token_group("abc", "rst", "hI", "defg", "hi", "new"), 1),
    ],
)
def test_only_what_is_not_known_is_computed(asked: Reference, changed: TokenGroup, computed: int) -> None:
    """Groups share by completion: the third of `PAIRS` has the first one's prompt."""
    asked.ask(PAIRS)
    groups = [PAIRS[1], changed, PAIRS[0]]
    torch.testing.assert_close(asked.ask(groups), torch.tensor(directly(asked.model, groups)), rtol=1e-5, atol=1e-5)
    asked.ask(groups)
    assert asked.rows == 0
    # `directly` runs the model too, so what was computed is counted in a folder of its own.
    again = Reference(asked.folder / "again")
    again.ask(PAIRS)
    again.ask(groups)
    assert again.rows == computed


def test_a_completion_that_stands_there_twice_is_computed_once(asked: Reference) -> None:
    found = asked.ask([PAIRS[0], token_group("abc", "hi", "hi")])
    assert asked.rows == 2
    assert found[1] == found[2] == found[3]


# --- a run that continues --------------------------------------------------------------------------------------------


def test_a_run_reads_what_it_used_before_whatever_became_of_the_cache(asked: Reference) -> None:
    """Another run's numbers for the same completions differ here by more than rounding, to be told apart."""
    first = asked.ask(PAIRS, run="mine")
    asked.model.get_input_embeddings().weight.data.mul_(1.5)
    for path in asked.files():
        path.unlink()
    other = asked.ask(PAIRS, run="other")
    assert not torch.allclose(other, first)
    assert torch.equal(asked.ask(PAIRS, run="mine"), first)
    assert asked.rows == 0
    assert asked.lines == [
        f"reference log-probabilities: 0 computed, 0 from the cache {asked.cache}, 6 kept by this run"
    ]


def test_what_comes_from_the_cache_is_kept_by_the_run_too(asked: Reference) -> None:
    first = asked.ask(PAIRS)
    asked.ask(PAIRS, run="mine")
    for path in asked.files():
        path.unlink()
    assert torch.equal(asked.ask(PAIRS, run="mine"), first)
    assert asked.rows == 0


def test_an_interrupted_computation_goes_on_where_it_was_and_ends_with_the_same_bits(
    asked: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "GROUPS_AT_ONCE", 2)
    groups = [token_group("abc", "d" * n + "ef", "g" * n) for n in range(1, 8)]
    whole = Reference(asked.folder / "whole").ask(groups)

    def dies(_module: Any, _args: Any) -> None:
        if asked.rows > 8:
            raise KeyboardInterrupt

    hook = asked.model.base_model.register_forward_pre_hook(dies)
    with pytest.raises(KeyboardInterrupt):
        asked.ask(groups, run="mine")
    hook.remove()
    assert torch.equal(asked.ask(groups, run="mine"), whole)
    assert asked.rows == 6


# --- files that are damaged, half written, or written by others ------------------------------------------------------


@pytest.mark.parametrize("place", ["cache", "mine"])
@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty"])
def test_a_damaged_file_is_said_and_computed_again(asked: Reference, place: str, damage: str) -> None:
    first = asked.ask(PAIRS, run="mine")
    (other,) = asked.files("mine" if place == "cache" else "cache")
    other.unlink()
    (path,) = asked.files(place)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes({"truncated": content[:-7], "flipped": content, "empty": b""}[damage])
    torch.testing.assert_close(asked.ask(PAIRS, run="mine"), first, rtol=1e-5, atol=1e-5)
    assert asked.rows == 6
    assert asked.lines[0] == f"{path} is damaged and is removed; what it held is computed again"
    asked.ask(PAIRS)
    assert asked.rows == 0 and len(asked.lines) == 1


def test_a_damaged_file_is_said_once(asked: Reference) -> None:
    asked.ask(PAIRS)
    damaged = asked.files()[0].with_name(f"{0:064}.safetensors")
    damaged.write_bytes(b"no file of ours")
    asked.ask(PAIRS)
    assert len(asked.lines) == 2 and not damaged.exists()
    asked.ask(PAIRS)
    assert len(asked.lines) == 1 and asked.rows == 0


def test_a_run_whose_own_file_is_damaged_gets_the_same_bits_from_the_cache(asked: Reference) -> None:
    first = asked.ask(PAIRS, run="mine")
    (path,) = asked.files("mine")
    path.write_bytes(b"")
    assert torch.equal(asked.ask(PAIRS, run="mine"), first)
    assert asked.rows == 0


def test_a_kill_between_writing_and_renaming_leaves_nothing_that_is_read(
    asked: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The temporary file of the killed process stays behind, whole or in part."""

    def killed(source: Path, _destination: Path) -> None:
        left.append((source, source.read_bytes()))
        raise KeyboardInterrupt

    left: list[tuple[Path, bytes]] = []
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", killed)
        asked.ask(PAIRS, run="mine")
    for path, content in left:
        path.write_bytes(content)
        path.with_name(f"{path.name}9").write_bytes(content[:20])
    assert left and asked.files("mine") == asked.files() == []
    first = asked.ask(PAIRS, run="mine")
    assert asked.rows == 6 and len(asked.lines) == 1
    assert torch.equal(asked.ask(PAIRS, run="mine"), first)
    assert asked.rows == 0


def test_runs_that_compute_at_once_do_not_disturb_each_other(asked: Reference, tmp_path: Path) -> None:
    """While the first computes, the second begins and ends, with some of the same completions."""
    second = Reference(tmp_path)
    found: list[Tensor] = []

    def meanwhile(_module: Any, _args: Any) -> None:
        if not found:
            found.append(second.ask(PAIRS[1:], run="second"))

    asked.model.base_model.register_forward_pre_hook(meanwhile)
    first = asked.ask(PAIRS, run="first")
    expected = torch.tensor(directly(second.model, PAIRS))
    torch.testing.assert_close(first, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[0], expected[2:], rtol=1e-5, atol=1e-5)
    assert len(asked.files()) == 2
    assert torch.equal(asked.ask(PAIRS, run="first"), first) and asked.rows == 0
    assert torch.equal(second.ask(PAIRS[1:], run="second"), found[0]) and second.rows == 0
    asked.ask(PAIRS)
    assert asked.rows == 0


def test_a_file_that_another_process_removes_while_it_is_read_is_no_error(
    asked: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = asked.ask(PAIRS)
    read = Path.read_bytes

    def removed(path: Path) -> bytes:
        path.unlink()
        return read(path)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", removed)
        torch.testing.assert_close(asked.ask(PAIRS), first, rtol=1e-5, atol=1e-5)
    assert asked.rows == 6


def test_a_cache_that_cannot_be_written_is_said_and_the_run_goes_on(asked: Reference) -> None:
    blocked = asked.folder / "file"
    blocked.write_text("not a folder")
    first = asked.ask(PAIRS, run="mine", cache=blocked)
    assert asked.lines[0].startswith("other runs will compute these reference log-probabilities again: cannot make")
    assert torch.equal(asked.ask(PAIRS, run="mine", cache=blocked), first)
    assert asked.rows == 0


def test_a_run_folder_that_cannot_be_written_is_an_error(asked: Reference) -> None:
    blocked = asked.folder / "file"
    blocked.write_text("not a folder")
    with pytest.raises(AccordError, match="cannot make the folder"):
        asked.ask(PAIRS, kept=blocked)


def test_numbers_that_are_not_finite_are_refused_and_not_kept(asked: Reference) -> None:
    asked.model.get_input_embeddings().weight.data[3] = float("nan")
    groups = [replace(PAIRS[1], origin=Origin("pairs.jsonl", 7)), replace(PAIRS[0], origin=Origin("pairs.jsonl", 9))]
    with pytest.raises(TrainingError, match=r"a completion of pairs\.jsonl:9 the log-probability nan"):
        asked.ask(groups)
    assert asked.files() == []


# --- where, and how it is shown --------------------------------------------------------------------------------------


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("ACCORD_CACHE", str(tmp_path / "ours"))
    assert cache_folder() == tmp_path / "ours" / "reference-logprobs"
    monkeypatch.setenv("ACCORD_CACHE", "~/ours")
    assert cache_folder() == tmp_path / "home" / "ours" / "reference-logprobs"
    monkeypatch.delenv("ACCORD_CACHE")
    assert cache_folder() == tmp_path / "xdg" / "accord" / "reference-logprobs"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == tmp_path / "home" / ".cache" / "accord" / "reference-logprobs"


@pytest.mark.parametrize(("patience", "shown"), [(0.0, True), (1e9, False)])
def test_work_that_will_take_long_shows_how_far_it_is(
    asked: Reference, monkeypatch: pytest.MonkeyPatch, patience: float, shown: bool
) -> None:
    monkeypatch.setattr(reference, "GROUPS_AT_ONCE", 1)
    monkeypatch.setattr(reference, "PATIENCE_SECONDS", patience)
    screen = io.StringIO()
    reference_logprobs(
        asked.model, PAIRS, weights="w", layout="plain", budget=4096, pad_id=PAD_ID,
        kept=asked.folder / "kept", cache=asked.cache, console=Console(file=screen), say=asked.lines.append,
    )  # fmt: skip
    assert ("reference 3/3" in screen.getvalue()) == shown
