"""Compiled passes say and teach what plain ones do, are compiled a few times whatever the shapes, and leave the rest
alone. Compiled to plain calls, for compiling to machine code takes minutes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch._dynamo.testing import CompileCounter

from accord.config import recipe_from
from accord.errors import ConfigError
from accord.methods.corpus import Corpus, Part
from accord.models.compiled import check_compiler, compile_seconds, compile_trunk, trunk_of
from accord.models.layout import collate
from accord.models.sharing import sharing_copy
from accord.models.token_scores import score_tokens
from accord.pipeline import run_stages
from accord.records import Completion, Group, Message
from models_support import PAD_ID, tiny_model, token_group

SHAPES = (
    [token_group("abc", "defg", "hi"), token_group("kl", "mnop", "qrs")],
    [token_group("abcde", "fg", "hijkl"), token_group("mn", "op", "q"), token_group("r", "stuvw")],
    [token_group("ab", "cdefghi", "j", "k")] * 4,
)


def gradients(model: Any, groups: Any) -> list[torch.Tensor]:
    model.zero_grad()
    said = score_tokens(model, collate(groups, layout="shared", pad_id=PAD_ID)).logprobs
    said.square().sum().backward()
    return [said.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
def test_passes_of_all_shapes_are_compiled_once_and_say_and_teach_the_same() -> None:
    torch._dynamo.reset()
    model, plain = (tiny_model("gpt2", num_hidden_layers=1) for _ in range(2))
    counter, before = CompileCounter(), compile_seconds()
    compile_trunk(model, backend=counter)
    counts = []
    for groups in SHAPES:
        ours, theirs = gradients(model, groups), gradients(plain, groups)
        assert len(ours) == len(theirs) > 12
        for found, expected in zip(ours, theirs, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
        counts.append(counter.frame_count)
    assert counts[0] > 0 and len(set(counts)) == 1, counts
    assert compile_seconds() > before
    with torch.no_grad():
        score_tokens(model, collate([token_group("a", "b")], layout="plain", pad_id=PAD_ID))
        model(input_ids=torch.tensor([[3, 4]]))
    assert counter.frame_count == counts[0]
    torch._dynamo.reset()


def test_only_the_model_itself_is_compiled_and_only_with_gradient() -> None:
    model = tiny_model("llama", num_hidden_layers=1)
    compile_trunk(model, backend="eager")
    assert trunk_of(model) is not model.base_model
    with torch.no_grad():
        assert trunk_of(model) is model.base_model
    for other in (sharing_copy(model), copy.deepcopy(model)):
        assert trunk_of(other) is other.base_model


@pytest.mark.parametrize("key", ["compile", "compile_sampling"])
def test_without_a_compiler_the_key_the_program_and_the_way_out_are_named(
    key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    check_compiler(f"model.{key}", torch.device("cuda"))
    model = {"scratch": {"hidden_size": 16, "layers": 1, "heads": 2, "vocab_size": 300}, key: True}
    recipe = recipe_from({"model": model, "sft": {}, "out": str(tmp_path / "run")})
    groups = [Group((Message("user", "ask"),), (Completion((Message("assistant", "yes"),)),))] * 4
    with pytest.raises(ConfigError, match=rf"`model.{key}` needs a C\+\+ compiler .* no (clang|g)\+\+ .* or drop"):
        run_stages(recipe, Corpus(sft=Part.of(groups, "demonstrations")), ["sft"], Console(quiet=True))
    assert not (tmp_path / "run").exists()
    (tmp_path / "mine").touch(0o755)
    monkeypatch.setenv("CXX", "mine")
    check_compiler(f"model.{key}", torch.device("cpu"))


@pytest.mark.parametrize("other", [{"quantise": "nf4", "adapter": {}}, {"activation_checkpointing": True}])
def test_what_cannot_be_compiled_is_a_contradiction(other: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=rf"`model.compile` and `model.{next(iter(other))}` are both set"):
        recipe_from({"model": {"path": "quickstart", "compile": True} | other})
