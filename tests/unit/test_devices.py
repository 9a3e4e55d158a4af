"""Every method on a second device: nothing is mixed, most work is done there, and the numbers are the CPU's.

The device is simulated (see `devices_support`), so an operation there does what it does here.
"""

from __future__ import annotations

import io
import json
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor

from accord.config import RLOOConfig, recipe_from
from accord.errors import ConfigError
from accord.methods import context as context_module
from accord.methods.corpus import Corpus, Part
from accord.methods.rollouts import collect
from accord.models.device import choose_device
from accord.models.load import load_policy, reward_model_from, save_model
from accord.pipeline import run_stages
from accord.records import Group
from accord.training import allocator
from accord.training.allocator import CHOICE, GPU_SETTINGS, allocator_note, keep_freed_memory
from devices_support import THERE, SecondDevice, WrongDevice
from online_support import prompts, rollout_cast
from stages_support import QUICK, answers_to, saved_model


def words(i: int) -> list[Group]:
    def told(text: str, rank: int, label: bool) -> tuple[str, dict[str, Any]]:
        return text, {"rank": rank, "score": float(2 - rank), "label": label}

    return [
        answers_to(f"shall I {i}?", told(f"yes {i}", 0, True), told("no no no", 1, False), margin=2.0),
        answers_to(f"who {i}?", told("maybe", 1, True), told(f"yes please, {i}", 0, True), told("never", 2, False)),
    ]


DATA = Part.of([made for i in range(8) for made in words(i)], "the test's data")
ROLLOUT = {
    "prompts_per_step": 2, "samples_per_prompt": 2, "episodes": 8, "max_new_tokens": 5, "learning_rate": 1e-3,
    "micro_batch_tokens": 64,
}  # fmt: skip
OFFLINE = {**QUICK, "batch_size": 6, "eval_every": 1, "micro_batch_tokens": 64}

JUDGED = {**ROLLOUT, "reward_model": "JUDGE"}
SAMPLED = {"reward_model": "JUDGE", "max_new_tokens": 5, "micro_batch_tokens": 64}
CASES: dict[str, dict[str, Any]] = {
    "sft": {"sft": {**OFFLINE, "rouge": {"prompts": 3, "max_new_tokens": 4}}},
    "reward": {"reward": {**OFFLINE, "heads": 2, "length_decorrelation": 0.5, "centring_coef": 0.1}},
    "reward spans": {"reward": {**OFFLINE, "loss": "divergence_span"}},
    "dpo": {"dpo": {**OFFLINE, "sft_coef": 0.5, "loss": "rdpo", "length_coef": 0.1}},
    "orpo": {"orpo": OFFLINE},
    "kto": {"kto": OFFLINE},
    "bco": {"kto": {**OFFLINE, "loss": "bco"}},
    "ilql": {"ilql": OFFLINE},
    "ppo with models that wait": {
        "model": {"offload": True},
        "ppo": {**JUDGED, "minibatches": 2, "ptx_coef": 0.5, "ptx_batch_size": 2, "sampler_correction": "truncated",
                "kl_in": "loss", "kl_estimator": "k2", "holdout_reward_model": "JUDGE"},
    },
    "ppo on one trunk": {"ppo": {**JUDGED, "minibatches": 2, "value_trunk": "policy"}},
    "ppo with an adapter": {"model": {"adapter": {"rank": 2}}, "reward": OFFLINE, "ppo": {**ROLLOUT, "minibatches": 2}},
    "ppo of the top block": {
        "model": {"trainable_blocks": 1}, "ppo": {**JUDGED, "minibatches": 1, "value_init": "policy"},
    },
    "rloo": {"rloo": {**ROLLOUT, "reward_function": "given:length"}},
    "grpo": {"grpo": {**JUDGED, "update_epochs": 2}},
    "reinforce": {"reinforce": {**JUDGED, "old_logprobs": "sampler"}},
    "online_dpo": {"online_dpo": JUDGED},
    "rft": {"rft": {**SAMPLED, "samples_per_prompt": 4}},
    "bestofn": {"bestofn": {**SAMPLED, "n": 3, "prompts": 4}},
    "evaluate": {"data": {"holdout": 0.6}, "sft": OFFLINE, "evaluate": {**SAMPLED, "prompts": 4}},
}  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    start = saved_model(folder / "start", DATA.groups, 0)
    policy, tokenizer = load_policy(start)
    return {"start": start, "judge": save_model(reward_model_from(policy, 1, heads=2), tokenizer, folder / "judge")}


def length(prompt: str, completion: str) -> float:
    return float(len(completion) % 5)


def run(out: Path, models: dict[str, Path], case: str, **model_keys: Any) -> None:
    sections = json.loads(json.dumps(CASES[case]).replace("JUDGE", str(models["judge"])))
    model = {"path": str(models["start"]), **sections.pop("model", {}), **model_keys}
    data = {"holdout": 0.3, "max_tokens": 48, **sections.pop("data", {})}
    recipe = recipe_from({"threads": 1, "out": str(out), "data": data, "model": model, **sections})
    functions = {f"{name}.reward_function": length for name in sections if "reward_function" in sections[name]}
    run_stages(recipe, Corpus(preferences=DATA), list(sections), Console(file=io.StringIO()), functions)


def left(out: Path) -> dict[str, Any]:
    """What a run left that does not tell the time: weights, metrics and samples."""
    found: dict[str, Any] = {}
    for path in out.glob("*/model/*.safetensors"):
        found |= {f"{path.relative_to(out)} {name}": tensor for name, tensor in load_file(path).items()}
    for path in out.glob("*/*.jsonl"):
        for number, line in enumerate(path.read_text().splitlines()):
            row = json.loads(line)
            timeless = {key: row[key] for key in row if not key.startswith(("time/", "system/"))}
            found |= {f"{path.relative_to(out)} {number} {key}": value for key, value in timeless.items()}
    return found


def texts(found: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in found.items() if not isinstance(value, Tensor | float | int)}


def numbers(found: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in found.items() if isinstance(value, Tensor | float | int)}


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Recipes find a GPU, and an empty cache."""
    monkeypatch.setenv("ACCORD_CACHE", str(tmp_path / "another cache"))
    monkeypatch.setattr(context_module, "choose_device", lambda name: THERE)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a simulated GPU")


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize("case", CASES)
def test_a_stage_on_another_device_mixes_nothing(case: str, models: dict[str, Path], tmp_path: Path) -> None:
    with SecondDevice() as devices:
        run(tmp_path / "out", models, case)
    assert devices.operations > 1000


@pytest.mark.parametrize("case", ["dpo", "grpo"])
def test_a_stage_on_another_device_ends_with_the_same_numbers(
    case: str, models: dict[str, Path], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    run(tmp_path / "here", models, case)
    request.getfixturevalue("elsewhere")
    with SecondDevice():
        run(tmp_path / "there", models, case)
    here, there = left(tmp_path / "here"), left(tmp_path / "there")
    # Not to the bit: a file's weights are read where they lie, and a copy's alignment lets kernels round otherwise.
    torch.testing.assert_close(numbers(there), numbers(here), rtol=1e-3, atol=1e-5)
    assert texts(there) == texts(here)


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
def test_on_a_real_gpu_the_first_step_has_the_numbers_of_the_cpu(
    case: str, models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path / "here", models, case, device="cpu", offload=False)
    monkeypatch.setenv("ACCORD_CACHE", str(tmp_path / "another cache"))
    run(tmp_path / "there", models, case, device="cuda")
    here, there = (
        {name: value for name, value in left(tmp_path / folder).items() if "metrics.jsonl 0 train/" in name}
        for folder in ("here", "there")
    )
    torch.testing.assert_close(numbers(there), numbers(here), rtol=1e-2, atol=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("keys", [
    {"precision": "bfloat16"}, {"precision": "float16"}, {"activation_checkpointing": True}, {"offload": True},
], ids=lambda keys: next(iter(keys)))  # fmt: skip
def test_on_a_real_gpu_every_option_trains(keys: dict[str, Any], models: dict[str, Path], tmp_path: Path) -> None:
    run(tmp_path / "out", models, "ppo on one trunk", device="cuda", **keys)
    assert any("train/grad_norm" in name for name in left(tmp_path / "out"))


def test_a_reference_that_waits_is_on_the_device_only_while_it_is_asked() -> None:
    section = RLOOConfig(prompts_per_step=2, samples_per_prompt=2, max_new_tokens=4)
    with SecondDevice():
        cast = rollout_cast(dtype=torch.float32)
        cast.policy.to("cuda")
        seen: list[torch.device] = []
        cast.reference.register_forward_pre_hook(lambda module, inputs: seen.append(module.device))
        cast.reference.base_model.register_forward_pre_hook(lambda module, inputs: seen.append(module.device))
        waiting = collect(replace(cast, offload=THERE), prompts()[:2], section, ("rloo", 0, 1))
        assert cast.reference.device.type == "cpu"
        assert set(seen) == {THERE}
        cast.reference.to("cuda")
        staying = collect(cast, prompts()[:2], section, ("rloo", 0, 1))
        assert cast.reference.device == THERE
    assert torch.equal(waiting.ref_logprobs, staying.ref_logprobs)


@pytest.mark.parametrize(("model", "why"), [
    ({"device": "cpu"}, "model.device"), ({"adapter": {}}, "model.adapter"), ({"trainable_blocks": 1}, "trainable"),
])  # fmt: skip
def test_offloading_what_cannot_move_is_a_contradiction(model: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        recipe_from({"model": {"path": "x", "offload": True, **model}})


def test_the_machine_is_said_once_and_what_has_no_effect_too(models: dict[str, Path], tmp_path: Path) -> None:
    screen = io.StringIO()
    model = {"path": str(models["start"]), "offload": True, "precision": "bfloat16", "device": "auto"}
    tree = {"threads": 1, "out": str(tmp_path / "out"), "data": {"max_tokens": 48}, "model": model, "orpo": OFFLINE}
    run_stages(recipe_from(tree), Corpus(preferences=DATA), ["orpo"], Console(file=screen, width=1000))
    said = screen.getvalue()
    if not torch.cuda.is_available():
        assert said.count("device: cpu, 1 CPU threads, bfloat16, freed memory") == 1
        assert said.count("float32 is faster there") == said.count("`model.offload` has nothing to do") == 1


@pytest.mark.parametrize(("choice", "asked"), [(None, "expandable_segments:True"), ("keep", "mine"), ("system", None)])
def test_the_allocator_settings_can_be_refused_and_those_that_are_there_stay(
    choice: str | None, asked: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (CHOICE, *GPU_SETTINGS, "THP_MEM_ALLOC_ENABLE"):
        monkeypatch.delenv(name, raising=False)
    if choice is not None:
        monkeypatch.setenv(CHOICE, choice)
    if asked == "mine":
        monkeypatch.setenv(GPU_SETTINGS[1], "mine")
    calls: list[tuple[int, int]] = []
    library = SimpleNamespace(mallopt=lambda key, value: calls.append((key, value)))
    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda name: library)
    monkeypatch.setattr(allocator, "_kept", False)
    keep_freed_memory()
    assert os.environ.get(GPU_SETTINGS[1]) == asked
    assert len(calls) == (0 if choice == "system" else 2)
    assert ("kept" in allocator_note()) == (choice != "system")
    monkeypatch.setenv(CHOICE, "maybe")
    with pytest.raises(ConfigError, match=CHOICE):
        keep_freed_memory()


def test_on_a_gpu_only_what_a_gpu_mixes_may_be_mixed() -> None:
    with SecondDevice():
        there, here = torch.ones(2, device="cuda"), torch.ones(2)
        assert {
            x.device for x in (there + torch.tensor(1.0), there[torch.tensor([0])], there[0], there.view(1, 2))
        } == {THERE}
        assert (there.cpu() + here).device.type == "cpu"
        for mixed in (lambda: there + here, lambda: here[torch.tensor([0], device="cuda")], there.numpy):
            with pytest.raises(WrongDevice):
                mixed()


@pytest.mark.parametrize(("name", "gpus", "chosen"), [
    ("auto", 0, "cpu"), ("auto", 2, "cuda:0"), ("cpu", 2, "cpu"), ("cuda", 1, "cuda:0"), ("cuda:1", 2, "cuda:1"),
])  # fmt: skip
def test_auto_is_the_first_gpu_or_the_cpu(name: str, gpus: int, chosen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert str(choose_device(name)) == chosen


@pytest.mark.parametrize(
    ("name", "gpus", "why"), [("cuda", 0, "no usable GPU"), ("cuda:2", 2, "has 2, counted from 0")]
)
def test_a_gpu_that_is_not_there_is_refused(name: str, gpus: int, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    with pytest.raises(ConfigError, match=why):
        choose_device(name)
    with pytest.raises(ConfigError, match="device"):
        recipe_from({"model": {"path": "x", "device": "tpu"}})
