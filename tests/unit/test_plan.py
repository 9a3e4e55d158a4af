"""What is refused before anything is trained, and what makes a run another run."""

from __future__ import annotations

from importlib.resources import files
from typing import Any

import pytest

from accord.config import recipe_from
from accord.errors import ConfigError
from accord.methods.corpus import Corpus, Part
from accord.methods.plan import check_sizes, plan_table
from accord.models.adapters import add_adapter
from accord.models.load import ModelShape, build_model, load_policy
from accord.records import Completion, Group, Message
from accord.rewards.scorers import FunctionScorer


def corpus() -> Corpus:
    answers = (Completion((Message("assistant", "yes"),), rank=0), Completion((Message("assistant", "no"),), rank=1))
    groups = [Group((Message("user", f"question {i}"),), answers) for i in range(40)]
    return Corpus(preferences=Part.of(groups, "pairs"))


def test_an_evaluation_without_held_out_prompts_is_refused_before_training() -> None:
    stages = ["reward", "evaluate"]
    sections = {"model": {"path": "quickstart"}, "reward": {}, "evaluate": {}}
    check_sizes(recipe_from({**sections, "data": {"holdout": 0.3}}), corpus(), stages)
    with pytest.raises(ConfigError, match=r"raise `data.holdout`"):
        check_sizes(recipe_from({**sections, "data": {"holdout": 0.0}}), corpus(), stages)


def test_an_edited_reward_function_is_another_one() -> None:
    def ones(prompt: str, completion: str) -> float:
        return 1.0

    def twos(prompt: str, completion: str) -> float:
        return 2.0

    assert FunctionScorer(ones, "f").fingerprint == FunctionScorer(ones, "g").fingerprint
    assert FunctionScorer(ones, "f").fingerprint != FunctionScorer(twos, "f").fingerprint


# --- the memory of a dry run -----------------------------------------------------------------------------------------


def planned(
    model: dict[str, Any], adapter: dict[str, Any] | None, blocks: int | None = None, **more: Any
) -> tuple[list[str], str]:
    """What `--dry-run` says of sft and ppo: models in memory with their bytes, and what stands below the table."""
    sections = {"sft": {}, "ppo": {"prompts_per_step": 4, "minibatches": 2}} | more
    recipe = recipe_from({"model": model | {"adapter": adapter, "trainable_blocks": blocks}, **sections})
    table = plan_table(recipe, corpus(), ["sft", "ppo"])
    cells = [list(column.cells) for column in table.columns]
    return [f"{models}: {memory}" for models, memory in zip(cells[3], cells[4], strict=True)], str(table.caption)


def trained_parameters(model: Any, targets: tuple[str, ...], **more: Any) -> int:
    add_adapter(model, rank=8, alpha=8, targets=targets, seed=0, **more)
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("kind", "targets"),
    [("llama", ()), ("llama", ("q_proj", "mlp.down_proj")), ("gpt2", ()), ("gpt2", ("attn.c_proj",))],
)
def test_the_size_of_an_adapter_is_known_before_there_is_a_model(kind: Any, targets: tuple[str, ...]) -> None:
    scratch = {"kind": kind, "hidden_size": 64, "layers": 3, "heads": 4, "vocab_size": 300, "max_positions": 32}
    _, caption = planned({"scratch": scratch}, {"rank": 8, "targets": targets})
    model = build_model(ModelShape(64, 3, 4, 32, kind), vocab_size=300, pad_id=0, eos_id=1, seed=0)
    assert f"about {trained_parameters(model, targets):,} in an adapter" in caption


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_lengths_and_ranks_by_name_are_counted(kind: Any) -> None:
    scratch = {"kind": kind, "hidden_size": 64, "layers": 3, "heads": 4, "vocab_size": 300, "max_positions": 32}
    more: dict[str, Any] = {"kind": "dora", "ranks": {"mlp.c_proj" if kind == "gpt2" else "down_proj": 3}}
    _, caption = planned({"scratch": scratch}, {"rank": 8, **more})
    model = build_model(ModelShape(64, 3, 4, 32, kind), vocab_size=300, pad_id=0, eos_id=1, seed=0)
    assert f"about {trained_parameters(model, (), **more):,} in an adapter" in caption


@pytest.mark.parametrize("targets", [(), ("q_proj", "mlp.down_proj")])
def test_the_size_of_an_adapter_is_read_from_the_headers_of_files(targets: tuple[str, ...]) -> None:
    _, caption = planned({"path": "quickstart"}, {"rank": 8, "targets": targets})
    model, _ = load_policy(str(files("accord") / "assets" / "quickstart"))
    assert f"about {trained_parameters(model, targets):,} in an adapter" in caption


def number(text: str, before: str) -> int:
    return int(text.split(before)[0].split()[-1].replace(",", ""))


def test_with_adapters_the_policy_is_its_own_reference_and_the_value_model_shares_its_weights() -> None:
    """16 bytes for what trains, 4 for what does not. Four models without adapters; with them two, and two adapters."""
    scratch = {"hidden_size": 256, "layers": 8, "vocab_size": 8000}
    plain, caption = planned({"scratch": scratch}, None)
    adapted, other = planned({"scratch": scratch}, {"rank": 64})
    whole, small = number(caption, " parameters"), number(other, " in an adapter")
    assert plain == [
        f"1 trained, 0 frozen: {16 * whole / 1e6:,.0f} MB", f"2 trained, 2 frozen: {40 * whole / 1e6:,.0f} MB",
    ]  # fmt: skip
    assert adapted == [
        f"1 adapter, 1 frozen: {(4 * whole + 16 * small) / 1e6:,.0f} MB",
        f"2 adapters, 2 frozen: {(8 * whole + 32 * small) / 1e6:,.0f} MB",
    ]


def test_a_trunk_in_4_bits_is_counted_as_such() -> None:
    """4.127 bits for each weight of a linear layer instead of 32."""
    scratch = {"hidden_size": 256, "layers": 8, "vocab_size": 8000}
    (whole, _), _ = planned({"scratch": scratch}, {"rank": 64})
    (small, _), _ = planned({"scratch": scratch, "quantise": "nf4"}, {"rank": 64})
    model = build_model(ModelShape(256, 8, 4, 32), vocab_size=8000, pad_id=0, eos_id=1, seed=0)
    linear = sum(p.numel() for name, p in model.named_parameters() if "_proj" in name)
    saved = number(whole.rpartition(": ")[2], " MB") - number(small.rpartition(": ")[2], " MB")
    assert abs(saved - linear * (32 - 4.127) / 8 / 1e6) <= 1


def test_moments_of_8_bits_are_counted_as_such() -> None:
    """Of what trains: 4 bytes of weight, 4 of gradient, and twice a byte with 4 more for every 256."""
    scratch = {"hidden_size": 256, "layers": 8, "vocab_size": 8000}
    (sft, ppo), caption = planned(
        {"scratch": scratch}, None, ppo={"prompts_per_step": 4, "minibatches": 2, "optimiser": "adamw_8bit"}
    )
    whole = number(caption, " parameters")
    assert sft == f"1 trained, 0 frozen: {16 * whole / 1e6:,.0f} MB"
    assert ppo.startswith("2 trained, 2 frozen: ") and abs(number(ppo[21:], " MB") - 28.0625 * whole / 1e6) <= 1


def test_a_reward_model_of_the_same_run_is_an_adapter_on_the_same_trunk() -> None:
    scratch = {"hidden_size": 256, "layers": 8, "vocab_size": 8000}
    (_, ppo), caption = planned({"scratch": scratch}, {"rank": 64}, reward={})
    whole, small = number(planned({"scratch": scratch}, None)[1], " parameters"), number(caption, " in an adapter")
    assert ppo == f"2 adapters, 1 frozen adapter, 1 frozen: {(4 * whole + 36 * small) / 1e6:,.0f} MB"


def test_top_blocks_are_trained_in_place_and_the_other_roles_have_their_own() -> None:
    """Policy 4 bytes a weight and 12 more for what trains; reference 4, value model 16, and a reward model of the run 4
    for each weight of the top."""
    scratch = {"hidden_size": 256, "layers": 8, "vocab_size": 8000}
    (sft, other), caption = planned({"scratch": scratch}, None, 2)
    (_, ppo), _ = planned({"scratch": scratch}, None, 2, reward={})
    whole = number(planned({"scratch": scratch}, None)[1], " parameters")
    top = number(caption, " in the top 2 blocks")
    model = build_model(ModelShape(256, 8, 4, 32), vocab_size=8000, pad_id=0, eos_id=1, seed=0)
    matrices = [p for block in model.base_model.layers[-2:] for p in block.parameters() if p.dim() == 2]
    assert top == sum(p.numel() for p in matrices)
    assert sft == f"1 top, 1 frozen: {(4 * whole + 12 * top) / 1e6:,.0f} MB"
    assert other == f"2 tops, 1 frozen top, 2 frozen: {(8 * whole + 32 * top) / 1e6:,.0f} MB"
    assert ppo == f"2 tops, 2 frozen tops, 1 frozen: {(4 * whole + 36 * top) / 1e6:,.0f} MB"


def test_more_top_blocks_than_a_file_has_are_refused_before_it_is_loaded() -> None:
    blocks = load_policy(str(files("accord") / "assets" / "quickstart"))[0].config.num_hidden_layers
    with pytest.raises(ConfigError, match=f"has {blocks} blocks; choose 1 to {blocks}"):
        planned({"path": "quickstart"}, None, blocks + 1)
    planned({"path": "quickstart"}, None, blocks)
