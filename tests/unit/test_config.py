"""Recipes: what is read, what is refused, and that every refusal names the key and the edit that mends it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from accord.config import PPOConfig, Recipe, load_recipe, recipe_from
from accord.config.load import parse_override, section_in
from accord.config.reference import key_lines, reference_page
from accord.errors import ConfigError

SECTIONS = {
    name: section
    for name, field in Recipe.model_fields.items()
    if (section := section_in(field.annotation)) is not None
}


def refusal(tree: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        recipe_from(tree)
    assert caught.value.exit_code == 2
    return str(caught.value)


def written(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


# --- unknown keys ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tree", "suggestion"),
    [
        ({"ppo": {"clip_rang": 0.2}}, "unknown key `ppo.clip_rang`; did you mean `ppo.clip_range`?"),
        ({"ppo": {"cliprange": 0.2}}, "unknown key `ppo.cliprange`; here it is called `ppo.clip_range`"),
        ({"sft": {"lr": 1}}, "here it is called `sft.learning_rate`"),
        ({"reward": {"center_rewards_coefficient": 1}}, "here it is called `reward.centring_coef`"),
        ({"orpo": {"beta": 1}}, "here it is called `orpo.odds_ratio_coef`"),
        ({"model": {"adapter": {"r": 8}}}, "here it is called `model.adapter.rank`"),
        ({"stf": {}}, "unknown key `stf`; did you mean `sft`?"),
        ({"kl_coef": 0.1}, "unknown key `kl_coef`; did you mean `ppo.kl_coef`?"),
        ({"init_kl_coef": 0.1}, "did you mean `ppo.kl_coef`?"),
        ({"actor_learning_rate": 1}, "did you mean `sft.learning_rate`?"),
        ({"ppo": {}, "actor_learning_rate": 1}, "did you mean `ppo.learning_rate`?"),
        ({"ppo": {"--init_kl_coef": 1}}, "unknown key `ppo.--init_kl_coef`; here it is called `ppo.kl_coef`"),
        ({"--ckpt.max_num": 1}, "here it is called `ppo.keep_checkpoints`"),
        ({"model": {"scratch": {"layer": 2}}}, "did you mean `model.scratch.layers`?"),
        ({"data": {"sft": [{"path": "a", "formt": "x"}]}}, "did you mean `data.sft.0.format`?"),
        ({"sft": {"zzzzzz": 1}}, "known here: optimiser, learning_rate, "),
    ],
)
def test_an_unknown_key_is_refused_with_the_name_it_should_have(tree: dict[str, Any], suggestion: str) -> None:
    assert suggestion in refusal(tree)


def test_all_mistakes_are_reported_at_once() -> None:
    message = refusal({"sft": {"epoch": 1, "batch_size": 0}, "seed": -1})
    for part in ("`sft.epoch`", "`sft.batch_size`", "`seed`", "found 0", "found -1"):
        assert part in message


@settings(max_examples=50, derandomize=True, deadline=None)
@given(st.sampled_from(sorted(SECTIONS)), st.data())
def test_a_key_with_a_letter_missing_is_traced_back(name: str, data: st.DataObject) -> None:
    key = data.draw(st.sampled_from([key for key in SECTIONS[name].model_fields if len(key) > 4]))
    place = data.draw(st.integers(0, len(key) - 1))
    typed = key[:place] + key[place + 1 :]
    message = refusal({name: {typed: None}})
    assert f"unknown key `{name}.{typed}`" in message
    assert f"`{name}.{key}`" in message or "did you mean" in message


# --- contradictions --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tree", "parts"),
    [
        ({"model": {"path": "a", "scratch": {}}}, ["`model.path`", "`model.scratch`"]),
        ({"model": {"scratch": {"hidden_size": 30, "heads": 4}}}, ["`model.scratch.heads` = 4", "30"]),
        ({"data": {"max_tokens": 64, "max_prompt_tokens": 64}}, ["`data.max_prompt_tokens` = 64", "`data.max_tokens`"]),
        ({"ppo": {"reward_model": "a", "reward_function": "b:c"}}, ["`ppo.reward_model`", "`ppo.reward_function`"]),
        ({"ppo": {"reward_function": "b:c"}}, ["set `ppo.value_init` = policy"]),
        ({"ppo": {"kl_controller": "adaptive"}}, ["needs `ppo.target_kl`"]),
        ({"ppo": {"kl_controller": "adaptive", "target_kl": 6, "kl_coef": 0}}, ["`ppo.kl_coef`, which is 0"]),
        ({"ppo": {"kl_horizon": 50}}, ["`ppo.kl_horizon` is read only by `ppo.kl_controller` = adaptive"]),
        ({"ppo": {"target_kl": 6}}, ["`ppo.target_kl` is read only by `ppo.kl_controller` = adaptive"]),
        ({"rloo": {"environment": "a:b"}}, ["`rloo.environment` needs `rloo.max_turns`"]),
        ({"grpo": {"max_turns": 3}}, ["`grpo.max_turns` is read only with `grpo.environment`"]),
        (
            {"grpo": {"environment": "a:b", "max_turns": 3, "shaping": {"reference": "par"}}},
            ["`grpo.shaping.reference` = par", "`grpo.environment`"],
        ),
        ({"ppo": {"minibatches": 64, "prompts_per_step": 32}}, ["`ppo.minibatches` = 64", "32"]),
        ({"ppo": {"max_new_tokens": 1024}}, ["`ppo.max_new_tokens` = 1024", "`data.max_tokens` = 1024"]),
        ({"evaluate": {"max_new_tokens": 1024}}, ["`evaluate.max_new_tokens` = 1024"]),
        ({"ppo": {"prompts_per_step": 1, "samples_per_prompt": 1, "minibatches": 1}}, ["`ppo.whiten_advantages`"]),
        ({"grpo": {"reward_model": "a", "reward_function": "b:c"}}, ["`grpo.reward_model`", "`grpo.reward_function`"]),
        ({"rloo": {"minibatches": 64, "prompts_per_step": 32}}, ["`rloo.minibatches` = 64", "32"]),
        ({"bestofn": {"max_new_tokens": 1024}}, ["`bestofn.max_new_tokens` = 1024", "`data.max_tokens` = 1024"]),
        ({"dpo": {"label_smoothing": 0.2}}, ["`dpo.label_smoothing`", "conservative or robust, and `dpo.loss` is dpo"]),
        ({"dpo": {"target_margin": 2, "loss": "ipo"}}, ["`dpo.target_margin`", "simpo, and `dpo.loss` is ipo"]),
        ({"reinforce": {"prompts_per_step": 1}}, ["single completion", "`reinforce.samples_per_prompt`"]),
        ({"rft": {"start_quantile": 0.9, "end_quantile": 0.8}}, ["`rft.end_quantile` = 0.8", "`rft.start_quantile`"]),
    ],
)
def test_a_contradiction_names_both_keys(tree: dict[str, Any], parts: list[str]) -> None:
    message = refusal(tree)
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    "tree",
    [
        {"ppo": {"reward_function": "b:c", "value_init": "policy"}},
        {"ppo": {"kl_controller": "adaptive", "target_kl": 6}},
        {"ppo": {"kl_coef": 0}},
        {"ppo": {"environment": "a:b", "max_turns": 1}},
        {"ppo": {"prompts_per_step": 4, "minibatches": 4}},
        {"data": {"max_tokens": 64, "max_prompt_tokens": 63}},
        {section: {} for section in ("sft", "reward", "ppo", "evaluate")},
    ],
)
def test_what_is_no_contradiction_passes(tree: dict[str, Any]) -> None:
    recipe_from(tree)


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("ppo", "clip_range", 1.0),
        ("ppo", "gae_lambda", 1.1),
        ("ppo", "temperature", 0),
        ("ppo", "kl_coef", -0.1),
        ("ppo", "kl_controller", "sometimes"),
        ("sft", "loss_on", "user"),
        ("sft", "learning_rate", "fast"),
        ("sft", "keep_checkpoints", 1),
        ("reward", "max_steps", 0),
        ("evaluate", "top_p", 0),
        ("data", "holdout", 1.0),
    ],
)
def test_a_value_out_of_range_is_refused_with_what_was_found(section: str, key: str, value: Any) -> None:
    message = refusal({section: {key: value}})
    assert f"`{section}.{key}`" in message
    assert f"found {value!r}" in message


# --- files and overrides ---------------------------------------------------------------------------------------------


def test_later_settings_win_over_earlier_ones_the_file_and_the_defaults(tmp_path: Path) -> None:
    path = written(tmp_path, "sft: {epochs: 2, batch_size: 8}\n")
    recipe = load_recipe(
        path, ["sft.epochs=3", "sft.epochs=4"], defaults={"sft": {"epochs": 1, "eval_every": 7}, "name": "below"}
    )
    assert recipe.sft is not None
    assert (recipe.sft.epochs, recipe.sft.batch_size, recipe.sft.eval_every, recipe.name) == (4, 8, 7, "below")


def test_a_section_without_keys_is_switched_on_and_null_switches_it_off(tmp_path: Path) -> None:
    path = written(tmp_path, "sft:\nreward: {}\n")
    recipe = load_recipe(path, ["reward=null"])
    assert recipe.sft is not None
    assert recipe.reward is None and recipe.ppo is None


def test_a_mapping_given_as_a_value_replaces_and_dotted_keys_are_joined(tmp_path: Path) -> None:
    path = written(tmp_path, "ppo: {scorers: {a: {function: 'm:f'}, b: {function: 'm:g'}}, value_init: policy}\n")
    recipe = load_recipe(path, ["ppo.scorers.c.function=m:h"])
    assert recipe.ppo is not None and list(recipe.ppo.scorers) == ["a", "b", "c"]
    recipe = load_recipe(path, ["ppo.scorers={c: {function: 'm:h'}}", "ppo.scorers.c.weight=2"])
    assert recipe.ppo is not None and list(recipe.ppo.scorers) == ["c"] and recipe.ppo.scorers["c"].weight == 2
    recipe = load_recipe(path, ["ppo.scorers=null", "ppo.scorers.c.function=m:h"])
    assert recipe.ppo is not None and list(recipe.ppo.scorers) == ["c"]
    recipe = load_recipe(path, ["ppo.scorers.a=null"])
    assert recipe.ppo is not None and list(recipe.ppo.scorers) == ["b"]
    recipe = load_recipe(path, ["ppo.scorers={}"])
    assert recipe.ppo is not None and not recipe.ppo.scorers and recipe.ppo.value_init == "policy"


def test_null_takes_a_setting_back(tmp_path: Path) -> None:
    path = written(tmp_path, "data: {sft: a.jsonl}\nmodel: {adapter: {rank: 4, targets: [q_proj]}}\nsft: {epochs: 3}\n")
    recipe = load_recipe(path, ["data.sft=null", "model.adapter.targets=null", "sft.epochs=null"])
    plain = load_recipe(None, ["model.adapter.rank=4", "sft={}"])
    assert recipe == plain
    recipe = load_recipe(path, ["model.adapter=null"])  # here null is a value: no adapter
    assert recipe.model.adapter is None


@pytest.mark.parametrize(
    ("text", "keys", "value"),
    [
        ("ppo.kl_coef=0.1", ("ppo", "kl_coef"), 0.1),
        ("sft.learning_rate=1e-5", ("sft", "learning_rate"), 1e-5),
        ("sft.learning_rate=2.5E+3", ("sft", "learning_rate"), 2500.0),
        ("data.holdout=.5e-1", ("data", "holdout"), 0.05),
        ("data.sft=[a.jsonl, b.jsonl]", ("data", "sft"), ["a.jsonl", "b.jsonl"]),
        ("reward=null", ("reward",), None),
        ("out=a=b", ("out",), "a=b"),
        ("name='12'", ("name",), "12"),
        ("name=e5", ("name",), "e5"),
        ("data.lenient=true", ("data", "lenient"), True),
        ("ppo={kl_coef: 1e-2}", ("ppo",), {"kl_coef": 0.01}),
    ],
)
def test_an_override_is_read_as_yaml_with_exponents_as_numbers(text: str, keys: tuple[str, ...], value: Any) -> None:
    found = parse_override(text)
    assert found == (keys, value)
    assert type(found[1]) is type(value)


@pytest.mark.parametrize("text", ["ppo.kl_coef", "=1", "ppo={", "seed.x=1", "ppo..kl_coef=1"])
def test_an_override_that_cannot_be_read_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError):
        load_recipe(written(tmp_path, "seed: 1\n"), [text])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model.adapter={ranks: {q_proj:2}}", r"ranks\.q_proj:2`: .*found None; YAML wants a space .*: `q_proj: 2`"),
        ("ppo={kl_coef:0.1}", r"unknown key `ppo\.kl_coef:0\.1`; YAML wants a space .*: `kl_coef: 0\.1`"),
    ],
)
def test_a_colon_without_a_space_is_pointed_out(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_recipe(None, [text])


def test_a_mistake_of_set_is_not_blamed_on_the_file(tmp_path: Path) -> None:
    path = written(tmp_path, "sft: {epochs: 0}\nmodel: {path: x}\n")
    given = ["sft.batch_size=0", "reward={epoch: 2}", "data.sft=[{path: a, formt: x}]"]
    with pytest.raises(ConfigError) as caught:
        load_recipe(path, given)
    ours, theirs = str(caught.value).split("--set: ")
    assert ours == f"{path}: `sft.epochs`: input should be greater than or equal to 1; found 0\n"
    found = ["`sft.batch_size`: input", "unknown key `reward.epoch`; did you", "unknown key `data.sft.0.formt`; did"]
    assert [sum(start in line for start in found) for line in theirs.splitlines()] == [0, 1, 1, 1]


def test_a_key_that_a_mapping_of_set_lacks_is_missing_there(tmp_path: Path) -> None:
    path = written(tmp_path, "data: {sft: a}\n")
    with pytest.raises(ConfigError, match=r"^--set: `data.sft.0.path`: field required"):
        load_recipe(path, ["data={sft: [{format: sft}]}"])
    with pytest.raises(ConfigError, match=r"recipe.yaml: `data.sft.0.path`: field required"):
        load_recipe(written(tmp_path, "data: {sft: [{format: sft}]}\n"), ["data.holdout=0.5"])


def test_a_value_cannot_be_used_as_a_section() -> None:
    with pytest.raises(ConfigError, match="'seed' is a value, not a section"):
        load_recipe(None, ["seed=1", "seed.x=1"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sft: {epochs: 1\n", r"recipe\.yaml:\d+: not valid YAML"),
        ("- sft\n", "expected sections .* found list"),
        ("seed: 1\n[a, b]: 1\n", r"recipe\.yaml:2: .*\['a', 'b'\] is no key"),
        ("seed: 1\nsft: {}\nseed: 2\n", r"recipe\.yaml:3: .*'seed' stands twice"),
        ("sft:\n  epochs: 1\n  epochs: 2\n", r"recipe\.yaml:3: .*'epochs' stands twice"),
    ],
)
def test_a_broken_recipe_file_is_one_clear_sentence(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_recipe(written(tmp_path, text))


def test_a_missing_recipe_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: no such recipe file"):
        load_recipe(tmp_path / "nowhere.yaml")


def test_data_sources_may_be_one_path_several_or_described() -> None:
    recipe = recipe_from({"data": {"sft": "a.jsonl", "prompts": ["b.csv", {"path": "c.csv", "limit": 3}]}})
    assert [(s.path, s.limit) for s in recipe.data.sft] == [("a.jsonl", None)]
    assert [(s.path, s.limit) for s in recipe.data.prompts] == [("b.csv", None), ("c.csv", 3)]


def test_a_recipe_survives_being_written_and_read_again(tmp_path: Path) -> None:
    recipe = recipe_from(
        {"seed": 5, "model": {"scratch": {}}, "sft": {"learning_rate": 1e-5}, "data": {"sft": ["a", "b"]}, "ppo": {}}
    )
    assert recipe_from(recipe.model_dump(mode="json")) == recipe


# --- what is said about the keys -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(SECTIONS))
def test_every_key_is_explained_and_stands_in_help_and_reference(name: str) -> None:
    page, help_text = reference_page(), key_lines(name)
    for key, field in SECTIONS[name].model_fields.items():
        assert field.description and field.description.endswith((".", ")"))
        assert f"{name}.{key} (" in help_text
        assert f"`{key}`" in page


def test_settings_cannot_be_changed_after_they_were_checked() -> None:
    section = PPOConfig()
    with pytest.raises(ValueError, match="frozen"):
        section.kl_coef = 1.0
