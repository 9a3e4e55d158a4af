"""TRL checkpoints with a value head: what is imported computes what TRL computed, and what cannot be read is named.

The checkpoints are written here tensor by tensor, as `save_pretrained` of TRL 0.11 lays them out: the causal model's
own names, and `v_head.summary.weight` (1, H) and `v_head.summary.bias` (1,) beside them.
"""

from __future__ import annotations

import io
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from accord.cli.main import main
from accord.config import recipe_from
from accord.errors import AccordError, ConfigError
from accord.methods.corpus import Corpus, Part
from accord.models.layout import collate
from accord.models.load import ModelShape, build_model, load_reward_model, save_model
from accord.models.scratch_tokenizer import train_tokenizer
from accord.models.token_scores import score_values
from accord.models.value_head import import_value_head
from accord.pipeline import run_stages
from accord.records import TokenCompletion, TokenGroup
from stages_support import answers_to

GROUPS = [answers_to(f"say {i}", ("yes", {})) for i in range(8)]
BIAS = 0.75


def plain_model(folder: Path, kind: Any = "llama") -> Path:
    tokenizer = train_tokenizer([f"say {i} yes" for i in range(8)], vocab_size=300)
    ids: dict[str, Any] = {"pad_id": tokenizer.pad_token_id, "eos_id": tokenizer.eos_token_id}
    shape = ModelShape(hidden_size=16, layers=2, heads=2, max_positions=64, kind=kind)
    return save_model(build_model(shape, vocab_size=len(tokenizer), seed=1, **ids), tokenizer, folder)


def head(**changes: torch.Tensor) -> dict[str, torch.Tensor]:
    weight = torch.randn(1, 16, generator=torch.Generator().manual_seed(5))
    return {"v_head.summary.weight": weight, "v_head.summary.bias": torch.tensor([BIAS]), **changes}


def checkpoint(folder: Path, kind: Any = "llama", *, apart: bool = False) -> Path:
    """As TRL saves it; `apart`, as LLaMA-Factory does, with the head in a file of its own."""
    plain_model(folder, kind)
    if apart:
        save_file(head(), folder / "value_head.safetensors", metadata={"format": "pt"})
    else:
        weights = folder / "model.safetensors"
        save_file(load_file(weights) | head(), weights, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(("kind", "apart"), [("llama", False), ("llama", True), ("gpt2", False)])
def test_values_are_those_of_the_head_on_the_last_hidden_states(tmp_path: Path, kind: str, apart: bool) -> None:
    """V[t] = w . h[t] + b with h from transformers' causal model, at the position before each completion token."""
    trl = checkpoint(tmp_path / "trl", kind, apart=apart)
    found = import_value_head(trl, tmp_path / "out")
    assert found.bias == BIAS

    prompt, answer = (5, 6, 7, 8), (9, 10, 11)
    plain = AutoModelForCausalLM.from_pretrained(trl)
    with torch.no_grad():
        hidden = plain(torch.tensor([[*prompt, *answer]]), output_hidden_states=True).hidden_states[-1][0]
    parts = head()
    expected = hidden @ parts["v_head.summary.weight"][0] + parts["v_head.summary.bias"]

    value, tokenizer = load_reward_model(found.value)
    group = TokenGroup(prompt, (TokenCompletion(answer, (True,) * len(answer)),))
    with torch.no_grad():
        values = score_values(value, collate([group], layout="plain", pad_id=tokenizer.pad_token_id))
    torch.testing.assert_close(values[0], expected[len(prompt) - 1 : -1])

    classifier = AutoModelForSequenceClassification.from_pretrained(found.value)
    with torch.no_grad():
        read = classifier(torch.tensor([[*prompt, *answer]])).logits[0, 0]
    torch.testing.assert_close(read, expected[-1] - BIAS)


def test_the_policy_is_the_checkpoints_own_without_the_head(tmp_path: Path) -> None:
    trl = checkpoint(tmp_path / "trl")
    policy = import_value_head(trl, tmp_path / "out").policy
    ours, theirs = load_file(policy / "model.safetensors"), load_file(trl / "model.safetensors")
    assert ours.keys() == {name for name in theirs if not name.startswith("v_head.")}
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_generation_configuration_that_forgot_the_end_gets_it_back(tmp_path: Path) -> None:
    trl = checkpoint(tmp_path / "trl")
    path = trl / "generation_config.json"
    kept = {k: v for k, v in json.loads(path.read_text()).items() if k != "eos_token_id"}
    path.write_text(json.dumps(kept))
    config = json.loads((trl / "config.json").read_text())
    (trl / "config.json").write_text(json.dumps(config | {"eos_token_id": None}))
    policy = import_value_head(trl, tmp_path / "out").policy
    assert json.loads((policy / "generation_config.json").read_text())["eos_token_id"] is not None


@pytest.mark.parametrize("apart", [False, True])
def test_pickled_weights_are_refused_with_a_command_that_converts_them(tmp_path: Path, apart: bool) -> None:
    trl = plain_model(tmp_path / "trl")
    weights = trl / "model.safetensors"
    if apart:
        torch.save(head(), trl / "value_head.bin")
    else:
        torch.save(load_file(weights) | head(), trl / "pytorch_model.bin")
        weights.unlink()
    with pytest.raises(ConfigError, match="can run code when they are opened") as refused:
        import_value_head(trl, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    program = shlex.split(str(refused.value).splitlines()[-1])
    assert program[:2] == ["python", "-c"] and "weights_only=True" in program[2]
    exec(program[2], {})
    assert import_value_head(trl, tmp_path / "out").bias == BIAS


def test_what_is_no_such_checkpoint_is_named(tmp_path: Path) -> None:
    plain = plain_model(tmp_path / "plain")
    with pytest.raises(ConfigError, match=r"no v_head.summary.weight .* a plain policy needs no import"):
        import_value_head(plain, tmp_path / "out")
    save_file({"v_head.0.weight": torch.zeros(32, 16)}, plain / "value_head.safetensors")
    with pytest.raises(ConfigError, match=r"found v_head.0.weight \(trlX's is two layers"):
        import_value_head(plain, tmp_path / "out")
    save_file(head(**{"v_head.summary.weight": torch.zeros(1, 8)}), plain / "value_head.safetensors")
    with pytest.raises(ConfigError, match=re.escape("has shape (1, 8)")):
        import_value_head(plain, tmp_path / "out")
    for weight in (torch.full((1, 16), float("nan")), torch.zeros(1, 16, dtype=torch.int64)):
        save_file({"v_head.summary.weight": weight}, plain / "value_head.safetensors")
        with pytest.raises(ConfigError, match=r"no finite numbers \(torch\.\w+\): a value model that diverged"):
            import_value_head(plain, tmp_path / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/kept").touch()
    with pytest.raises(ConfigError, match="exists already and nothing is replaced"):
        import_value_head(checkpoint(tmp_path / "trl"), tmp_path / "full")


def ppo(policy: Path, value: Path | str, out: Path) -> None:
    """One rollout with learning rates of 0, so that what the checkpoint holds is what the stage began with."""
    tree = {
        "model": {"path": str(policy)}, "threads": 1, "out": str(out), "data": {"holdout": 0.0, "max_tokens": 32},
        "ppo": {"value_init": str(value), "episodes": 4, "prompts_per_step": 2, "samples_per_prompt": 2,
                "max_new_tokens": 4, "learning_rate": 0.0, "minibatches": 1, "update_epochs": 1},
    }  # fmt: skip
    functions = {"ppo.reward_function": lambda prompt, completion: float(len(completion))}
    corpus = Corpus(sft=Part.of(GROUPS, "demonstrations"))
    run_stages(recipe_from(tree), corpus, ["ppo"], Console(file=io.StringIO()), functions)


def test_ppo_begins_with_the_imported_value_model_bias_included(tmp_path: Path) -> None:
    found = import_value_head(checkpoint(tmp_path / "trl"), tmp_path / "imported")
    ppo(found.policy, found.value, tmp_path / "out")
    (file,) = (tmp_path / "out/ppo/checkpoints").rglob("value.safetensors")
    kept, imported = load_file(file), load_file(found.value / "model.safetensors")
    assert kept["score.bias"] == BIAS
    assert all(torch.equal(kept[name], tensor) for name, tensor in imported.items())
    with pytest.raises(AccordError, match="value weights"):  # another value model is another run
        other = import_value_head(checkpoint(tmp_path / "other", "gpt2"), tmp_path / "imported-too")
        ppo(found.policy, other.value, tmp_path / "out")


def test_a_value_model_that_cannot_be_one_is_refused_before_anything_runs(tmp_path: Path) -> None:
    policy = plain_model(tmp_path / "policy")
    with pytest.raises(ConfigError, match="no-such/folder/here: no such folder"):
        ppo(policy, "no-such/folder/here", tmp_path / "out")
    assert not (tmp_path / "out/ppo").exists()


def test_the_command_says_what_to_do_next(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trl = checkpoint(tmp_path / "trl")
    assert main(["import-value-head", str(trl), "--out", str(tmp_path / "out")]) == 0
    assert f"--set ppo.value_init={tmp_path / 'out' / 'value'}" in capsys.readouterr().out
    assert main(["import-value-head", str(trl), "--out", str(tmp_path / "out")]) == 2
