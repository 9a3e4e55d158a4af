"""`accord.train`: the same bits as the commands, and clear refusals of arguments that do not go together."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

import accord
from accord.cli.main import main
from accord.errors import ConfigError, DataError, RewardError
from accord.models.load import ModelShape, build_model, load_policy, save_model
from accord.models.scratch_tokenizer import train_tokenizer

SAMPLES = [(f"what comes after {n}?", f"{n + 1}") for n in range(9)]
PROMPTS = [f"count to {n}" for n in range(6)]
SFT = {"epochs": 2, "batch_size": 4, "learning_rate": 1e-3, "checkpoint_every": 2}
PPO = {
    "prompts_per_step": 3, "samples_per_prompt": 2, "episodes": 12, "max_new_tokens": 6, "minibatches": 2,
    "update_epochs": 1, "learning_rate": 1e-3,
}  # fmt: skip
DATA = {"max_tokens": 48}


def score(prompt: str, completion: str) -> float:
    return completion.count("e") - len(completion) / 10


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = train_tokenizer([text for pair in SAMPLES for text in pair], vocab_size=290)
    shape = ModelShape(hidden_size=16, layers=1, heads=2, max_positions=64)
    ids: dict[str, Any] = {"pad_id": tokenizer.pad_token_id, "eos_id": tokenizer.eos_token_id}
    built = build_model(shape, vocab_size=len(tokenizer), seed=0, **ids)
    return save_model(built, tokenizer, tmp_path_factory.mktemp("model") / "start")


def bits(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def command(stage: str, model: Path, out: Path, *settings: str) -> None:
    pairs = [f"model.path={model}", f"out={out}", "seed=5", "data.max_tokens=48", "data.holdout=0", *settings]
    assert main([stage, *(part for pair in pairs for part in ("--set", pair))]) == 0


def overrides(stage: str, values: dict[str, Any]) -> list[str]:
    return [f"{stage}.{key}={value}" for key, value in values.items()]


def test_sft_gives_the_bits_of_the_command(model: Path, tmp_path: Path) -> None:
    data = tmp_path / "demos.jsonl"
    data.write_text("".join(json.dumps({"prompt": p, "response": a}) + "\n" for p, a in SAMPLES))
    command("sft", model, tmp_path / "cli", f"data.sft={data}", *overrides("sft", SFT))
    result = accord.train(model, samples=SAMPLES, out=tmp_path / "api", seed=5, sft=SFT, data=DATA, quiet=True)
    assert result.model == tmp_path / "api" / "sft" / "model"
    assert bits(result.model) == bits(tmp_path / "cli" / "sft" / "model") != bits(model)
    assert result.summary["stage"] == "sft"
    load_policy(result.model)


def test_samples_may_be_pairs_or_messages(model: Path, tmp_path: Path) -> None:
    messages = [[{"role": "user", "content": p}, {"role": "assistant", "content": a}] for p, a in SAMPLES]
    found = [
        bits(accord.train(model, samples=samples, out=tmp_path / name, sft=SFT, data=DATA, quiet=True).model)
        for name, samples in (("pairs", SAMPLES), ("messages", messages))
    ]
    assert found[0] == found[1]


def test_plain_texts_are_learnt_from_their_first_token_on(model: Path, tmp_path: Path) -> None:
    settings = {"max_steps": 30, "epochs": 40, "batch_size": 2, "learning_rate": 0.01, "eval_every": 1}
    texts = ["one two three", "one two four"]
    result = accord.train(
        {"path": model, "template": "raw"}, samples=texts, out=tmp_path, sft=settings, data=DATA, quiet=True
    )
    losses = [json.loads(row)["train/loss"] for row in (result.folder / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < 0.5 * losses[0]


def test_ppo_gives_the_bits_of_the_command(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rewards_for_the_command.py").write_text(
        "def score(prompt, completion):\n    return completion.count('e') - len(completion) / 10\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    data = tmp_path / "prompts.jsonl"
    data.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in PROMPTS))
    function = ["ppo.reward_function=rewards_for_the_command:score", "ppo.value_init=policy"]
    command("ppo", model, tmp_path / "cli", f"data.prompts={data}", *function, *overrides("ppo", PPO))
    result = accord.train(
        model, reward_fn=score, prompts=PROMPTS, out=tmp_path / "api", seed=5, ppo=PPO, data=DATA, quiet=True
    )
    assert bits(result.model) == bits(tmp_path / "cli" / "ppo" / "model") != bits(model)


GUEST = """
from accord.records import Message, Turn

class Guest:
    def reset(self, prompt, random):
        return prompt

    def step(self, messages, random):
        return Turn((Message("user", f"and {random.integers(99)}"),), messages[-1].content.count("e") / 9)
"""


def test_an_environment_gives_the_bits_of_the_command(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "guests_for_the_command.py").write_text(GUEST)
    monkeypatch.syspath_prepend(tmp_path)
    data = tmp_path / "prompts.jsonl"
    data.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in PROMPTS))
    named = ["ppo.environment=guests_for_the_command:Guest", "ppo.max_turns=2", "ppo.value_init=policy"]
    command("ppo", model, tmp_path / "cli", f"data.prompts={data}", *named, *overrides("ppo", PPO))
    guest = importlib.import_module("guests_for_the_command").Guest
    settings = PPO | {"max_turns": 2}
    result = accord.train(
        model, environment=guest, prompts=PROMPTS, out=tmp_path / "api", seed=5, ppo=settings, data=DATA, quiet=True
    )
    assert bits(result.model) == bits(tmp_path / "cli" / "ppo" / "model") != bits(model)
    assert any("guests_for_the_command:Guest" in text for text in result.summary["account"])


PAIRS = [(f"what comes after {n}?", f"{n + 1}", f"{n} and {n} again") for n in range(9)]
PREFERENCE = {"epochs": 2, "batch_size": 4, "learning_rate": 1e-3, "checkpoint_every": 2}


@pytest.mark.parametrize("method", ["dpo", "orpo", "kto", "reward"])
def test_pairs_give_the_bits_of_the_command(method: str, model: Path, tmp_path: Path) -> None:
    data = tmp_path / "pairs.jsonl"
    rows = [{"prompt": p, "chosen": c, "rejected": r} for p, c, r in PAIRS]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command(method, model, tmp_path / "cli", f"data.preferences={data}", *overrides(method, PREFERENCE))
    arguments: dict[str, Any] = {"method": method, "seed": 5, method: PREFERENCE, "data": DATA, "quiet": True}
    made = [
        bits(accord.train(model, pairs=pairs, out=tmp_path / name, **arguments).model)
        for name, pairs in (("tuples", PAIRS), ("dicts", rows))
    ]
    assert made[0] == made[1] == bits(tmp_path / "cli" / method / "model") != bits(model)


def test_pairs_alone_mean_dpo(model: Path, tmp_path: Path) -> None:
    result = accord.train(model, pairs=PAIRS, out=tmp_path, dpo=PREFERENCE, data=DATA, quiet=True)
    assert result.folder == tmp_path / "dpo" and result.summary["stage"] == "dpo"


def test_kto_learns_from_samples_with_labels(model: Path, tmp_path: Path) -> None:
    samples = [
        {"prompt": prompt, "completion": answer, "label": good}
        for prompt, chosen, rejected in PAIRS
        for answer, good in ((chosen, True), (rejected, False))
    ]
    arguments: dict[str, Any] = {"method": "kto", "kto": PREFERENCE, "data": DATA, "quiet": True}
    one = accord.train(model, samples=samples, out=tmp_path / "labels", **arguments)
    other = accord.train(model, pairs=PAIRS, out=tmp_path / "pairs", **arguments)
    assert bits(one.model) == bits(other.model)


def test_columns_of_a_row_that_nothing_reads_are_said(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": p, "chosen": c, "rejected": r, "annotator": "me"} for p, c, r in PAIRS]
    accord.train(model, pairs=rows, out=tmp_path, dpo=PREFERENCE, data=DATA)
    assert "pairs: columns not used: annotator" in capsys.readouterr().out


@pytest.mark.parametrize("method", ["rloo", "grpo", "reinforce", "online_dpo"])
def test_other_methods_give_the_bits_of_their_commands(
    method: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / f"rewards_of_{method}.py").write_text(
        "def score(prompt, completion):\n    return completion.count('e') - len(completion) / 10\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    data = tmp_path / "prompts.jsonl"
    data.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in PROMPTS))
    function = f"{method}.reward_function=rewards_of_{method}:score"
    verb = method.replace("_", "-")
    command(verb, model, tmp_path / "cli", f"data.prompts={data}", function, *overrides(method, PPO))
    arguments: dict[str, Any] = {"out": tmp_path / "api", "seed": 5, "data": DATA, "quiet": True, method: PPO}
    result = accord.train(model, reward_fn=score, prompts=PROMPTS, method=method, **arguments)
    assert result.model == tmp_path / "api" / method / "model"
    assert bits(result.model) == bits(tmp_path / "cli" / method / "model") != bits(model)
    assert result.summary["stage"] == method and result.summary["account"]
    assert "Policy trained with" in (result.model / "README.md").read_text()


def test_another_seed_gives_other_bits(model: Path, tmp_path: Path) -> None:
    found = [
        bits(
            accord.train(
                model, reward_fn=score, prompts=PROMPTS, out=tmp_path / str(seed), seed=seed, ppo=PPO, data=DATA,
                quiet=True,
            ).model
        )
        for seed in (0, 1)
    ]  # fmt: skip
    assert found[0] != found[1]


def test_calling_again_returns_the_finished_run_without_scoring_anything(model: Path, tmp_path: Path) -> None:
    calls: list[str] = []

    def counted(prompt: str, completion: str) -> float:
        calls.append(prompt)
        return 0.0

    arguments: dict[str, Any] = {"prompts": PROMPTS, "out": tmp_path, "ppo": PPO, "data": DATA, "quiet": True}
    first = accord.train(model, reward_fn=counted, **arguments)
    assert len(calls) == PPO["episodes"]
    second = accord.train(model, reward_fn=counted, **arguments)
    assert len(calls) == PPO["episodes"]
    assert second.summary == first.summary


def test_a_reward_function_that_raises_stops_the_run_and_names_the_prompt(model: Path, tmp_path: Path) -> None:
    def moody(prompt: str, completion: str) -> float:
        if prompt == PROMPTS[2]:
            raise LookupError("no opinion on this")
        return 0.0

    with pytest.raises(RewardError, match=rf"(?s)moody failed on .*LookupError: no opinion on this.*{PROMPTS[2]!r}"):
        accord.train(model, reward_fn=moody, prompts=PROMPTS, out=tmp_path, ppo=PPO, data=DATA, quiet=True)
    assert not (tmp_path / "ppo" / "summary.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, r"takes reward_fn= and prompts= \(PPO\), or samples= \(SFT\)"),
        ({"reward_fn": score, "samples": SAMPLES}, "takes reward_fn="),
        ({"samples": SAMPLES, "prompts": PROMPTS}, "takes reward_fn="),
        ({"pairs": PAIRS, "samples": SAMPLES}, "takes reward_fn="),
        ({"method": "dpo", "samples": SAMPLES}, r"\(method='dpo'\) takes pairs=; it was given samples="),
        ({"method": "kto"}, r"\(method='kto'\) takes pairs= or samples=; it was given nothing"),
        ({"method": "grpo", "reward_fn": score}, r"needs prompts="),
        ({"method": "dp", "pairs": PAIRS}, r"method='dp' \(did you mean 'dpo'\?\) is none of ppo, "),
        ({"pairs": PAIRS, "dpo": {"betta": 1}}, "did you mean `dpo.beta`"),
        ({"reward_fn": score}, r"needs prompts=\[\.\.\.\]"),
        ({"environment": dict}, r"accord.train\(environment=...\) needs prompts="),
        ({"environment": "me:Guest", "prompts": PROMPTS}, "expected a class"),
        ({"environment": dict, "prompts": PROMPTS}, "`ppo.environment` needs `ppo.max_turns`"),
        ({"environment": dict, "prompts": PROMPTS, "method": "rft"}, r"\(method='rft'\) takes reward_fn= and prompts="),
        ({"samples": SAMPLES, "learning_rate": 1}, "did you mean `sft.learning_rate`"),
        ({"samples": SAMPLES, "sft": {"epoch": 1}}, "did you mean `sft.epochs`"),
        ({"samples": SAMPLES, "sft": 3}, "`sft`"),
        ({"reward_fn": score, "prompts": PROMPTS, "ppo": {"target_kl": 1}}, "`ppo.target_kl` is read only by"),
    ],
)
def test_arguments_that_do_not_go_together_are_refused(arguments: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        accord.train("no-model", out=tmp_path, quiet=True, **arguments)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"samples": [("a", "b"), 7]}, r"samples\[1\] is 7: expected a text, a \(prompt, answer\) pair"),
        ({"samples": [[{"role": "user", "content": "a"}]]}, r"samples\[0\] .* with an assistant turn"),
        ({"samples": [[{"role": "user"}]]}, r"\[0\] is .*expected .*content"),
        (
            {"samples": [{"prompt": "a", "completion": ""}]},
            r"samples\[0\]: completion: found empty text; expected text",
        ),
        ({"pairs": [PAIRS[0], ("a", "b")]}, r"pairs\[1\] is \('a', 'b'\): expected a \(prompt, chosen, rejected\)"),
        ({"pairs": [PAIRS[0], ("a", "b", 3)]}, r"pairs\[1\]: rejected: found 3"),
        ({"pairs": [{"good": "b"}]}, r"pairs\[0\]: no known format. The columns are: good"),
        ({"pairs": [("a", "b", "b")]}, r"pairs\[0\]: rejected: found the same text as in chosen"),
        ({"reward_fn": score, "prompts": ["a", [{"text": "b"}]]}, r"prompts\[1\] is .*expected a text or a list"),
    ],
)
def test_rows_that_cannot_be_used_are_named(arguments: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        accord.train("no-model", out=tmp_path, quiet=True, **arguments)
