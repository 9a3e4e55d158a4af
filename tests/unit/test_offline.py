"""Training on files: how data become what a stage needs, and that cutting a step into passes changes no number."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from accord.config import DataConfig, RewardConfig, SFTConfig
from accord.data.order import batch_indices
from accord.errors import DataError
from accord.methods.corpus import Corpus, Part, read_corpus, split_holdout
from accord.methods.offline import OfflineTrainer
from accord.methods.reward import Comparison, RewardObjective
from accord.methods.sft import SFTObjective, held_out_loss
from accord.models.layout import Layout
from accord.models.load import reward_model_from
from accord.records import Completion, Group, Message, TokenGroup
from models_support import PAD_ID, tiny_model, token_group


def group(prompt: str, *answers: str, ranks: tuple[int, ...] = ()) -> Group:
    completions = tuple(
        Completion((Message("assistant", text),), rank=rank)
        for text, rank in zip(answers, ranks or (None,) * len(answers), strict=True)
    )
    return Group((Message("user", prompt),) if prompt else (), completions)


def part(*groups: Group) -> Part:
    return Part.of(groups, "memory")


DEMONSTRATIONS = part(group("a", "yes"), group("b", "no"))
PAIRS = part(group("c", "good", "bad", ranks=(0, 1)), group("c", "bad", "good", ranks=(1, 0)))

# --- the corpus ------------------------------------------------------------------------------------------------------


def test_demonstrations_are_the_sft_data_else_the_chosen_answers() -> None:
    assert Corpus(sft=DEMONSTRATIONS, preferences=PAIRS).demonstrations().groups == DEMONSTRATIONS.groups
    made = Corpus(preferences=PAIRS).demonstrations()
    assert [(g.prompt[0].content, [c.text for c in g.completions]) for g in made.groups] == [("c", ["good"])] * 2
    assert any("data.sft is not set" in note for note in made.notes)
    with pytest.raises(DataError, match=r"set `data\.sft`"):
        Corpus(prompts=part(group("a"))).demonstrations()


def test_comparisons_come_from_preferences_and_from_nothing_else() -> None:
    groups = Corpus(preferences=PAIRS).comparisons().groups
    assert [[c.rank for c in g.completions] for g in groups] == [[0, 1], [1, 0]]
    with pytest.raises(DataError, match=r"set `data\.preferences`"):
        Corpus(sft=DEMONSTRATIONS).comparisons()


def test_prompts_are_those_given_else_of_preferences_else_of_demonstrations_and_distinct() -> None:
    def texts(corpus: Corpus) -> list[str]:
        return [g.prompt[0].content for g in corpus.all_prompts().groups]

    given_prompts = part(group("x"), group("y"), group("x"))
    assert texts(Corpus(prompts=given_prompts, preferences=PAIRS, sft=DEMONSTRATIONS)) == ["x", "y"]
    assert texts(Corpus(preferences=PAIRS, sft=DEMONSTRATIONS)) == ["c"]
    assert texts(Corpus(sft=DEMONSTRATIONS)) == ["a", "b"]
    assert any("1 repeated prompts" in note for note in Corpus(prompts=given_prompts).all_prompts().notes)
    with pytest.raises(DataError, match=r"set `data\.prompts`"):
        Corpus().all_prompts()


def test_evaluation_prompts_are_only_those_given() -> None:
    assert Corpus(prompts=part(group("a"))).evaluation_prompts() is None
    found = Corpus(evaluation=part(group("a"), group("a"), group("b"))).evaluation_prompts()
    assert found is not None and len(found.groups) == 2


def test_texts_without_a_prompt_are_no_prompts_and_counted() -> None:
    found = Corpus(sft=part(group("", "a text"), group("a", "yes"))).all_prompts()
    assert len(found.groups) == 1
    assert any("1 texts without a prompt left out" in note for note in found.notes)


@settings(max_examples=50, derandomize=True, deadline=None)
@given(st.lists(st.text(max_size=5), max_size=20), st.floats(0, 0.99))
def test_a_prompt_is_held_out_or_not_by_its_text_alone(prompts: list[str], share: float) -> None:
    groups = [Group((Message("user", text),)) for text in prompts]
    train, held_out = split_holdout(groups, share)
    assert {g.prompt_id for g in train}.isdisjoint(g.prompt_id for g in held_out)
    assert [g for g in groups if g in train] == [*train] and [g for g in groups if g in held_out] == [*held_out]
    for one in groups:
        assert split_holdout([one], share)[1] == ((one,) if one in held_out else ())


def test_the_held_out_share_is_the_one_asked_for_and_grows_with_it() -> None:
    """5,000 prompts: the share's standard error is sqrt(.2 * .8 / 5000) = .006."""
    groups = [Group((Message("user", str(i)),)) for i in range(5000)]
    assert split_holdout(groups, 0.0)[1] == ()
    small, large = (split_holdout(groups, share)[1] for share in (0.05, 0.2))
    assert len(large) / 5000 == pytest.approx(0.2, abs=0.025)
    assert {g.prompt_id for g in small} < {g.prompt_id for g in large}


def test_files_are_read_with_their_limit_notes_and_content_hash(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"p{i}", "chosen": "a", "rejected": "b"}) + "\n" for i in range(5)))
    data = DataConfig.model_validate({"preferences": {"path": str(path), "limit": 3}})
    corpus = read_corpus(data)
    assert len(corpus.preferences.groups) == 3
    assert "5 rows, 5 usable groups, the first 3 used" in corpus.preferences.notes[0]
    before = corpus.preferences.sources
    assert list(before) == [str(path)]
    path.write_text(path.read_text().replace("p0", "q0"))
    assert read_corpus(data).preferences.sources != before


def test_the_content_of_groups_in_memory_stands_for_a_file() -> None:
    def name(*groups: Group) -> str:
        return Part.of(groups, "x").sources["x"]

    base = group("a", "b", "c", ranks=(0, 1))
    others = [
        group("a", "b", "c", ranks=(1, 0)),
        group("a", "b", "d", ranks=(0, 1)),
        group("b", "b", "c", ranks=(0, 1)),
        Group(base.prompt, base.completions, margin=1.0),
        Group(base.prompt, base.completions, soft_label=0.7),
        Group((Message("system", "a"),), base.completions),
    ]
    assert name(base) == name(group("a", "b", "c", ranks=(0, 1)))
    assert len({name(g) for g in (base, *others)}) == 1 + len(others)


# --- one step, however it is cut -------------------------------------------------------------------------------------

TEXTS: list[TokenGroup] = [
    token_group("abc", "defg", "hij"),
    token_group("ab", "klmnop", "q"),
    token_group("cdefg", "RSt", "uvw"),
    token_group("hi", "abcdefgh", "BCd"),
]
COMPARISONS = [
    Comparison(tokens, ranks, margin, soft_label)
    for tokens, ranks, margin, soft_label in zip(
        TEXTS, ((0, 1), (1, 0), (0, 1), (1, 0)), (0.0, 0.5, 0.0, 1.0), (1.0, 0.75, 0.875, 0.625), strict=True
    )
] + [Comparison(token_group("xy", "a", "bcd", "ef"), (1, 0, 2))]


def sft_trainer(layout: Layout, budget: int) -> tuple[OfflineTrainer[Any], Any]:
    model = tiny_model("gpt2", dtype=torch.float64)
    section = SFTConfig(learning_rate=0.01, batch_size=3, epochs=2, micro_batch_tokens=budget, eval_every=2)
    return trainer("sft", model, TEXTS, section, SFTObjective(), layout), model


def reward_trainer(layout: Layout, budget: int) -> tuple[OfflineTrainer[Any], Any]:
    model = reward_model_from(tiny_model("gpt2", dtype=torch.float64), 0)
    section = RewardConfig(learning_rate=0.01, batch_size=3, epochs=2, micro_batch_tokens=budget, centring_coef=0.1)
    return trainer("reward", model, COMPARISONS, section, RewardObjective(0.1), layout), model


def trainer(stage: str, model: Any, items: Any, section: Any, objective: Any, layout: Layout) -> OfflineTrainer[Any]:
    return OfflineTrainer(
        stage, model, items, section, section, objective,
        layout=layout, pad_id=PAD_ID, seed=0, evaluate=lambda: {"eval/loss": 1.5},
    )  # fmt: skip


def numbers(rows: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{k: v for k, v in row.items() if not k.startswith(("time/", "system/"))} for row in rows]


@pytest.mark.parametrize("make", [sft_trainer, reward_trainer])
def test_neither_layout_nor_micro_batches_change_weights_or_metrics(
    make: Callable[[Layout, int], tuple[OfflineTrainer[Any], Any]],
) -> None:
    """float64 (and gpt2, whose norms stay in it), so that what remains is the order of summation."""
    runs = []
    for layout, budget in (("plain", 100_000), ("plain", 16), ("shared", 16), ("shared", 24)):
        made, model = make(layout, budget)  # type: ignore[arg-type]
        start = {name: value.clone() for name, value in model.state_dict().items()}
        rows = numbers([dict(made.step(step).metrics) for step in range(1, made.total_steps + 1)])
        runs.append((model.state_dict(), rows))
        assert any(not torch.equal(value, start[name]) for name, value in model.state_dict().items())
    weights, rows = runs[0]
    for other_weights, other_rows in runs[1:]:
        for name, value in weights.items():
            torch.testing.assert_close(other_weights[name], value, rtol=0, atol=1e-10)
        for row, other in zip(rows, other_rows, strict=True):
            assert other == pytest.approx(row, rel=1e-9, abs=1e-10)


def _norm(model: Any) -> float:
    return math.sqrt(sum(float(p.grad.square().sum()) for p in model.parameters() if p.grad is not None))


def _row(text: TokenGroup, index: int) -> dict[str, torch.Tensor]:
    ids = text.prompt_ids + text.completions[index].ids
    return {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}


def test_a_step_weighs_every_counted_token_of_its_batch_the_same() -> None:
    """Loss and gradient of the first step against a sum over unpadded rows, in which capital letters do not count."""
    made, model = sft_trainer("shared", 16)
    oracle = copy.deepcopy(model)
    terms = []
    for text in (TEXTS[i] for i in batch_indices(1, len(TEXTS), 3, 0, "sft")):
        for index, completion in enumerate(text.completions):
            logprobs = oracle(**_row(text, index)).logits[0, len(text.prompt_ids) - 1 : -1].log_softmax(-1)
            terms += [-logprobs[t, completion.ids[t]] for t, counts in enumerate(completion.mask) if counts]
    loss = torch.stack(terms).mean()
    loss.backward()
    row = made.step(1).metrics
    assert row["train/loss"] == pytest.approx(loss.item(), rel=1e-10)
    assert row["train/grad_norm"] == pytest.approx(_norm(oracle), rel=1e-8)


def test_a_step_weighs_every_prompt_of_its_batch_the_same_and_every_pair_of_a_prompt() -> None:
    """The gradient of the first step is that of: the mean over prompts of the mean over their pairs of
    -p log sigmoid(d - m) - (1 - p) log sigmoid(m - d), plus 0.1 times the mean over prompts of (2 mean score)^2."""
    made, model = reward_trainer("shared", 16)
    oracle = copy.deepcopy(model)
    losses, plain = [], []
    for item in (COMPARISONS[i] for i in batch_indices(1, len(COMPARISONS), 3, 0, "reward")):
        rows = [_row(item.tokens, index) for index in range(len(item.ranks))]
        scores = [oracle.score(oracle.base_model(**row).last_hidden_state[0, -1])[0] for row in rows]
        pairs = [(i, j) for i in range(len(rows)) for j in range(len(rows)) if item.ranks[i] < item.ranks[j]]
        p = item.soft_label

        def pair(d: torch.Tensor, p: float = p) -> torch.Tensor:
            return -p * torch.log(torch.sigmoid(d)) - (1 - p) * torch.log(torch.sigmoid(-d))

        plain.append(torch.stack([pair(scores[i] - scores[j]).detach() for i, j in pairs]).mean())
        loss = torch.stack([pair(scores[i] - scores[j] - item.margin) for i, j in pairs]).mean()
        losses.append(loss + 0.1 * (2 * torch.stack(scores).mean()) ** 2)
    torch.stack(losses).mean().backward()
    row = made.step(1).metrics
    assert row["train/loss"] == pytest.approx(torch.stack(plain).mean().item(), rel=1e-10)
    assert row["train/grad_norm"] == pytest.approx(_norm(oracle), rel=1e-8)


def test_progress_counts_and_evaluation_are_reported_when_due() -> None:
    made, _ = sft_trainer("plain", 64)
    assert made.total_steps == 4  # 4 texts in batches of 3: two steps an epoch
    rows = [made.step(step).metrics for step in range(1, 5)]
    assert ["eval/loss" in row for row in rows] == [False, True, False, True]
    assert [row["train/epoch"] for row in rows] == [0.75, 1.0, 1.75, 2.0]
    assert rows[1]["train/sequences"] == sum(len(text.completions) for text in TEXTS)
    assert rows[1]["train/tokens"] == sum(sum(c.mask) for text in TEXTS for c in text.completions)
    assert rows[3]["train/tokens"] == 2 * rows[1]["train/tokens"]


def test_a_captured_trainer_goes_on_as_the_old_one() -> None:
    old, old_model = reward_trainer("shared", 32)
    old.step(1)
    captured = old.capture()
    captured.tensors["model"] = {name: value.clone() for name, value in captured.tensors["model"].items()}
    captured.tensors["optimiser"] = {name: value.clone() for name, value in captured.tensors["optimiser"].items()}
    first = numbers([dict(old.step(2).metrics)])
    new, new_model = reward_trainer("shared", 32)
    new.restore(captured)
    assert numbers([dict(new.step(2).metrics)]) == first
    assert all(torch.equal(v, new_model.state_dict()[name]) for name, v in old_model.state_dict().items())


def test_the_held_out_loss_of_a_text_does_not_depend_on_its_neighbours() -> None:
    model = tiny_model("gpt2", dtype=torch.float64)
    alone = [held_out_loss(model, [text], "plain", PAD_ID, 16)[0] for text in TEXTS]
    together = held_out_loss(model, TEXTS, "shared", PAD_ID, 10_000)
    for one, other in zip(sorted(alone), sorted(together), strict=True):
        assert one == pytest.approx(other, rel=1e-10)


@pytest.mark.parametrize(("ranks", "teaches"), [((0, 1), True), ((1, 1), False), ((0, 0, 1), True), ((2, 2, 2), False)])
def test_ties_alone_teach_nothing(ranks: tuple[int, ...], teaches: bool) -> None:
    answers = ("defg", "hij", "k")[: len(ranks)]
    assert Comparison(token_group("abc", *answers), ranks).has_pairs == teaches
    assert not Comparison(token_group("abc", *["defg"] * len(ranks)), ranks).has_pairs, "equal answers score the same"
