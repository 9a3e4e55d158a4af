"""`accord.train` with samples and rewards: the bits of the command, rewards of tokens, and refusals."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import accord
from accord.cli.main import main
from accord.errors import CheckpointError, ConfigError, DataError
from accord.models.ilql import load_heads
from accord.models.load import ModelShape, build_model, load_policy, save_model
from accord.models.scratch_tokenizer import train_tokenizer

SAMPLES = [(f"say {n}", answer) for n in range(5) for answer in ("yes", "no")]
RETURNS = [1.5 if answer == "yes" else -n / 4 for n, (_, answer) in enumerate(SAMPLES)]
ILQL = {"epochs": 2, "batch_size": 4, "learning_rate": 1e-3, "checkpoint_every": 2}
DATA = {"max_tokens": 48}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = train_tokenizer([text for pair in SAMPLES for text in pair], vocab_size=290)
    shape = ModelShape(hidden_size=16, layers=1, heads=2, max_positions=64)
    ids: dict[str, Any] = {"pad_id": tokenizer.pad_token_id, "eos_id": tokenizer.eos_token_id}
    built = build_model(shape, vocab_size=len(tokenizer), seed=0, **ids)
    return save_model(built, tokenizer, tmp_path_factory.mktemp("model") / "start")


def trained(model: Path, out: Path, rewards: Any, samples: Any = SAMPLES, **sections: Any) -> accord.TrainResult:
    arguments: dict[str, Any] = {"ilql": ILQL, "data": DATA} | sections
    return accord.train(model, samples=samples, rewards=rewards, out=out, seed=5, quiet=True, **arguments)


def bits(folder: Path) -> tuple[bytes, bytes]:
    return (folder / "model.safetensors").read_bytes(), (folder / "ilql_heads.safetensors").read_bytes()


def test_ilql_gives_the_bits_of_the_command(model: Path, tmp_path: Path) -> None:
    rows = [
        {"prompt": prompt, "completion": answer, "score": score}
        for (prompt, answer), score in zip(SAMPLES, RETURNS, strict=True)
    ]
    data = tmp_path / "rated.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"model.path": model, "out": tmp_path / "cli", "seed": 5, "data.max_tokens": 48, "data.holdout": 0,
                "data.preferences": data} | {f"ilql.{key}": value for key, value in ILQL.items()}  # fmt: skip
    assert main(["ilql", *(word for key, value in settings.items() for word in ("--set", f"{key}={value}"))]) == 0
    result = trained(model, tmp_path / "api", RETURNS)
    assert result.model == tmp_path / "api" / "ilql" / "model"
    assert bits(result.model) == bits(tmp_path / "cli" / "ilql" / "model")
    heads, beta = load_heads(load_policy(result.model)[0], result.model)
    assert beta == 1.0 and heads.q_heads[0].outer.weight.any()


def test_a_return_is_the_reward_of_the_last_token(model: Path, tmp_path: Path) -> None:
    """As a list with zeros before it, the same to the bit; at the first token, another problem."""
    _, tokenizer = load_policy(model)
    lengths = [len(tokenizer(answer)["input_ids"]) + 1 for _, answer in SAMPLES]
    last = [[0.0] * (n - 1) + [r] for n, r in zip(lengths, RETURNS, strict=True)]
    first = [[r] + [0.0] * (n - 1) for n, r in zip(lengths, RETURNS, strict=True)]
    found = [bits(trained(model, tmp_path / name, r).model) for name, r in (("a", RETURNS), ("b", last), ("c", first))]
    assert found[0] == found[1]
    assert found[0][0] != found[2][0] and found[0][1] != found[2][1]


def test_numbers_of_numpy_and_whole_numbers_are_numbers(model: Path, tmp_path: Path) -> None:
    whole = [int(r > 0) for r in RETURNS]
    found = [
        bits(trained(model, tmp_path / str(i), r).model)
        for i, r in enumerate((whole, np.array(whole, dtype=np.float32)))
    ]
    assert found[0] == found[1]


def test_other_rewards_are_another_run(model: Path, tmp_path: Path) -> None:
    trained(model, tmp_path, RETURNS)
    with pytest.raises(CheckpointError, match="content of samples"):
        trained(model, tmp_path, [r + 1 for r in RETURNS])


@pytest.mark.parametrize(
    ("rewards", "message"),
    [
        (RETURNS[:-1], "10 samples and 9 rewards: give one for each sample"),
        ([], "rewards is empty"),
        ([*RETURNS[:-1], math.nan], r"rewards\[9\] is nan: expected a finite number"),
        ([*RETURNS[:-1], "good"], r"rewards\[9\] is 'good'"),
        ([*RETURNS[:-1], []], r"rewards\[9\] is \[\]"),
        ([*RETURNS[:-1], [0.0, math.inf]], r"rewards\[9\] is \[0.0, inf\]"),
        ([*RETURNS[:-1], [0.0, None]], r"rewards\[9\] is \[0.0, None\]"),
    ],
)
def test_rewards_that_cannot_be_used_are_named(rewards: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        trained(Path("no-model"), tmp_path, rewards)
    assert list(tmp_path.iterdir()) == []


def test_rewards_of_tokens_must_be_as_many_as_the_tokens(model: Path, tmp_path: Path) -> None:
    rewards = [*RETURNS[:-1], [0.0] * 40]
    with pytest.raises(DataError, match=r"the answer 'no' has 40 rewards for \d+ tokens.*its end token included"):
        trained(model, tmp_path, rewards)


def test_rewards_alone_or_beside_a_reward_function_are_refused(tmp_path: Path) -> None:
    def score(prompt: str, completion: str) -> float:
        return 0.0

    with pytest.raises(ConfigError, match="rewards= go with samples="):
        accord.train("no-model", rewards=RETURNS, out=tmp_path)
    with pytest.raises(ConfigError, match="rewards= go with samples="):
        accord.train("no-model", reward_fn=score, prompts=["a"], rewards=[1.0], out=tmp_path)
