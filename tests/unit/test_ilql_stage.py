"""ILQL: a step against a second computation, returns and rewards of tokens, the lagged targets, and the stage."""

from __future__ import annotations

import copy
import hashlib
import math
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from accord.config import ILQLConfig, recipe_from
from accord.data.order import batch_indices
from accord.errors import DataError
from accord.evaluation import stage as evaluation
from accord.methods.context import Context
from accord.methods.corpus import Corpus, Part
from accord.methods.ilql import ILQLObjective, RatedAnswers, ReturnScale, TargetSync, rated_answers
from accord.methods.ilql_stage import measured
from accord.methods.offline import OfflineTrainer
from accord.methods.plan import plan_table
from accord.models.ilql import ILQLModel, ShapedPolicy, load_heads
from accord.models.layout import Layout
from accord.models.load import ModelShape, build_model, load_policy
from accord.pipeline import run_stages
from accord.records import Completion, Group, Message, TokenGroup
from accord.training.checkpoint import Snapshot, load_latest, save_checkpoint
from accord.training.loop import Captured
from models_support import PAD_ID, tiny_model, token_group
from stages_support import answers_to, logged, run_stage_on, saved_model, weights_of

# Capital letters do not count: a turn of somebody else. Rewards stand at any token that counts.
ITEMS = [
    RatedAnswers(token_group("abc", "defg", "hij"), ((0.0, 0.0, 0.0, 1.5), (0.5, -1.0, 0.25))),
    RatedAnswers(token_group("ab", "klMNop"), ((0.0, 0.0, 0.0, 0.0, 0.0, -2.0),)),
    RatedAnswers(token_group("cdefg", "Rst", "uvw"), ((0.0, 1.0, 0.0), (0.0, 0.0, 0.75))),
    RatedAnswers(token_group("hi", "q"), ((-0.5,),)),
]
SETTINGS: dict[str, Any] = {
    "learning_rate": 0.01, "batch_size": 3, "epochs": 3, "warmup_fraction": 0.0, "tau": 0.8, "gamma": 0.9,
    "cql_coef": 0.3, "awac_coef": 0.7, "awac_beta": 0.4, "target_rate": 0.25,
}  # fmt: skip


def ilql_model() -> ILQLModel:
    """Heads that say something already, so that no term is 0."""
    model = ILQLModel(tiny_model("gpt2", dtype=torch.float64), seed=1)
    numbers = torch.Generator().manual_seed(2)
    for head in (*model.q_heads, *model.target_heads, model.value_head):
        head.outer.weight.data.copy_(0.3 * torch.randn(head.outer.weight.shape, generator=numbers, dtype=torch.float64))
    return model


def trainer(layout: Layout = "plain", budget: int = 100_000, **ilql: Any) -> tuple[OfflineTrainer[Any], ILQLModel]:
    model = ilql_model()
    section = ILQLConfig(**SETTINGS | ilql, micro_batch_tokens=budget)
    made = OfflineTrainer(
        "ilql", model, ITEMS, section, section, ILQLObjective(section),
        layout=layout, pad_id=PAD_ID, seed=0, evaluate=lambda: {},
        memory=TargetSync(model, rate=section.target_rate, every=section.sync_every),
    )  # fmt: skip
    return made, model


def numbers(row: Any) -> dict[str, float]:
    return {name: value for name, value in row.items() if not name.startswith(("time/", "system/"))}


# --- one step --------------------------------------------------------------------------------------------------------


def by_loops(model: ILQLModel, items: list[RatedAnswers]) -> tuple[Tensor, dict[str, float]]:
    """The whole loss from unpadded rows, token by token."""
    terms: dict[str, list[Tensor]] = {"q": [], "expectile": [], "cql": [], "awac": [], "value": [], "advantage": []}
    for item in items:
        for completion, rewards in zip(item.tokens.completions, item.rewards, strict=True):
            prompt = len(item.tokens.prompt_ids)
            ids = torch.tensor([item.tokens.prompt_ids + completion.ids])
            states = model.policy.base_model(input_ids=ids).last_hidden_state[0]
            logprobs = model.policy(input_ids=ids).logits[0].log_softmax(-1)
            counted = [t for t, counts in enumerate(completion.mask) if counts]
            for n, t in enumerate(counted):
                place, token = prompt + t - 1, completion.ids[t]
                follows = 0.0
                if n + 1 < len(counted):
                    follows = model.value_head(states[prompt + counted[n + 1] - 1])[0].item()
                q = [head(states[place]) for head in model.q_heads]
                smaller = min(float(head(states[place])[token].detach()) for head in model.target_heads)
                value = model.value_head(states[place])[0]
                u = smaller - value
                target = rewards[t] + 0.9 * follows
                terms["q"].append(sum(((x[token] - target) ** 2 for x in q), torch.zeros(())))
                terms["expectile"].append((0.8 if u > 0 else 0.2) * u**2)
                terms["cql"].append(sum((x.logsumexp(0) - x[token] for x in q), torch.zeros(())))
                terms["awac"].append(-math.exp(0.4 * float(u.detach())) * logprobs[place, token])
                terms["value"].append(value.detach())
                terms["advantage"].append(u.detach())
    means = {name: torch.stack(values).mean() for name, values in terms.items()}
    loss = means["q"] + means["expectile"] + 0.3 * means["cql"] + 0.7 * means["awac"]
    std = torch.stack(terms["advantage"]).std(unbiased=False)
    names = {"loss": loss, "value_mean": means["value"], "advantage_mean": means["advantage"], "advantage_std": std}
    names |= {f"{name}_loss": means[name] for name in ("q", "expectile", "cql", "awac")}
    return loss, {f"train/{name}": float(value.detach()) for name, value in names.items()}


def test_a_step_is_the_sum_of_the_four_terms_over_the_counted_tokens_of_its_batch() -> None:
    made, model = trainer("shared", 16)
    oracle = copy.deepcopy(model)
    loss, metrics = by_loops(oracle, [ITEMS[i] for i in batch_indices(1, len(ITEMS), 3, 0, "ilql")])
    loss.backward()
    norm = math.sqrt(sum(float(p.grad.square().sum()) for p in oracle.parameters() if p.grad is not None))
    row = made.step(1).metrics
    assert {name: row[name] for name in metrics} == pytest.approx(metrics, rel=1e-9)
    assert row["train/grad_norm"] == pytest.approx(norm, rel=1e-8)


def test_neither_layout_nor_micro_batches_change_weights_or_metrics() -> None:
    runs = []
    for layout, budget in (("plain", 100_000), ("plain", 16), ("shared", 16), ("shared", 24)):
        made, model = trainer(layout, budget)  # type: ignore[arg-type]
        start = {name: value.clone() for name, value in model.state_dict().items()}
        rows = [numbers(made.step(step).metrics) for step in range(1, made.total_steps + 1)]
        runs.append((model.state_dict(), rows))
        for part in ("policy.", "q_heads.", "target_heads.", "value_head."):
            assert any(not torch.equal(x, start[n]) for n, x in model.state_dict().items() if n.startswith(part)), part
    weights, rows = runs[0]
    for other_weights, other_rows in runs[1:]:
        for name, value in weights.items():
            torch.testing.assert_close(other_weights[name], value, rtol=0, atol=1e-10)
        for row, other in zip(rows, other_rows, strict=True):
            assert other == pytest.approx(row, rel=1e-9, abs=1e-10)


def test_targets_move_every_so_many_updates_by_their_share() -> None:
    made, model = trainer(sync_every=2)

    def flat(heads: Any) -> Tensor:
        return torch.cat([x.flatten() for x in heads.state_dict().values()])

    start = flat(model.target_heads)
    made.step(1)
    assert torch.equal(flat(model.target_heads), start)
    made.step(2)
    second = flat(model.target_heads)
    torch.testing.assert_close(second, 0.75 * start + 0.25 * flat(model.q_heads))
    made.step(3)
    assert torch.equal(flat(model.target_heads), second)


def test_a_checkpoint_brings_back_policy_heads_targets_and_moments(tmp_path: Path) -> None:
    old, old_model = trainer()
    rows = [numbers(old.step(step).metrics) for step in (1, 2)]
    captured = old.capture()
    save_checkpoint(tmp_path, Snapshot(2, captured.tensors, captured.values))
    rows = [numbers(old.step(step).metrics) for step in (3, 4)]
    new, new_model = trainer()
    snapshot = load_latest(tmp_path).snapshot
    assert snapshot is not None
    new.restore(Captured(snapshot.tensors, snapshot.values))
    assert [numbers(new.step(step).metrics) for step in (3, 4)] == rows
    assert all(torch.equal(x, new_model.state_dict()[name]) for name, x in old_model.state_dict().items())


def test_held_out_answers_are_measured_as_a_step_and_by_the_q_of_their_last_token() -> None:
    model, objective = ilql_model(), ILQLObjective(ILQLConfig(**SETTINGS))
    _, metrics = by_loops(model, ITEMS)
    found = measured(model, ITEMS, objective, "shared", PAD_ID, 16)
    expected = {name.replace("train", "eval"): value for name, value in metrics.items() if "loss" in name}
    assert found.metrics == pytest.approx(expected, rel=1e-9)
    last = {}
    for item in ITEMS:
        for completion, value in zip(item.tokens.completions, item.returns, strict=True):
            t = max(t for t, counts in enumerate(completion.mask) if counts)
            ids = torch.tensor([item.tokens.prompt_ids + completion.ids])
            state = model.policy.base_model(input_ids=ids).last_hidden_state[0, len(item.tokens.prompt_ids) + t - 1]
            last[value] = min(head(state)[completion.ids[t]].item() for head in model.target_heads)
    assert dict(zip(found.returns, found.last_q, strict=True)) == pytest.approx(last)
    assert found.correlation.value == pytest.approx(statistics.correlation(list(last), list(last.values())))


# --- rewards ---------------------------------------------------------------------------------------------------------


def group(*known: dict[str, Any]) -> tuple[Group, TokenGroup]:
    """Answers "de", "fGh", "i" (capital: does not count), with what is known of each."""
    texts = ("de", "fGh", "i")[: len(known)]
    answers = tuple(Completion((Message("assistant", t),), **k) for t, k in zip(texts, known, strict=True))
    return Group((Message("user", "abc"),), answers), token_group("abc", *texts)


def test_a_return_stands_at_the_last_token_that_counts() -> None:
    found = rated_answers(*group({"score": 3.5}, {"label": True}, {"label": False}))
    assert found is not None
    assert found.rewards == ((0.0, 3.5), (0.0, 0.0, 1.0), (-1.0,))
    assert found.returns == (3.5, 1.0, -1.0)


def test_rewards_of_tokens_skip_what_somebody_else_wrote_and_come_before_scores_before_marks() -> None:
    found = rated_answers(
        *group({"rewards": (0.5, 2.0), "score": 9.0}, {"rewards": (1.0, -1.5)}, {"score": 0.0, "label": True})
    )
    assert found is not None
    assert found.rewards == ((0.5, 2.0), (1.0, 0.0, -1.5), (0.0,))


def test_answers_that_nobody_judged_are_left_out() -> None:
    found = rated_answers(*group({"score": 1.0}, {}, {"score": 2.0}))
    assert found is not None
    assert (len(found.tokens.completions), found.rewards) == (2, ((0.0, 1.0), (2.0,)))
    assert found.tokens.completions[1] == token_group("abc", "i").completions[0]
    assert rated_answers(*group({}, {})) is None


def test_rewards_of_tokens_must_be_as_many_as_the_tokens_that_count() -> None:
    with pytest.raises(DataError, match="the answer 'fGh' has 3 rewards for 2 tokens"):
        rated_answers(*group({"score": 1.0}, {"rewards": (1.0, 2.0, 3.0)}))


def test_standardised_returns_have_mean_0_and_variance_1_and_the_shift_stands_where_the_return_does() -> None:
    """Returns 1, 3, 8: mean 4, variance (9 + 1 + 16) / 3."""
    raw = rated_answers(*group({"score": 1.0}, {"rewards": (5.0, -2.0)}, {"score": 8.0}))
    assert raw is not None
    scale = ReturnScale.of(raw.returns)
    std = math.sqrt(26 / 3)
    assert (scale.mean, scale.std) == pytest.approx((4.0, std))
    scaled = scale.apply(raw)
    assert scaled.rewards[0] == pytest.approx((0.0, -3 / std))
    assert scaled.rewards[1] == pytest.approx((5 / std, 0.0, -6 / std))
    assert scaled.rewards[2] == pytest.approx((4 / std,))
    assert math.fsum(scaled.returns) == pytest.approx(0, abs=1e-12)
    assert math.fsum(x * x for x in scaled.returns) / 3 == pytest.approx(1)
    assert ReturnScale().apply(raw) == raw


def test_equal_returns_teach_nothing_and_are_refused() -> None:
    with pytest.raises(DataError, match="all 3 answers have the return 2, so none is better than another"):
        ReturnScale.of([2.0, 2.0, 2.0])


# --- the stage -------------------------------------------------------------------------------------------------------

RATED = Part.of(
    [answers_to(f"ask {i}", ("yes", {"score": 2.0 + i / 8}), ("no", {"score": -i / 4})) for i in range(24)], "rated"
)
PAIRS = Part.of([answers_to(f"ask {i}", ("yes", {"rank": 0}), ("no", {"rank": 1})) for i in range(24)], "pairs")


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_model(tmp_path_factory.mktemp("start") / "model", RATED.groups, 0)


def files_of(out: Path) -> dict[str, str]:
    folder = out / "ilql" / "model"
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("*.safetensors"))}


def test_the_stage_leaves_a_policy_with_heads_and_says_how_it_is_sampled(start: Path, tmp_path: Path) -> None:
    summary = run_stage_on(tmp_path, start, RATED, "ilql", {"beta": 2.5, "target_rate": 1.0})
    folder = tmp_path / "ilql" / "model"
    policy, _ = load_policy(folder)
    model, beta = load_heads(policy, folder)
    assert beta == 2.5
    for head, target in zip(model.q_heads, model.target_heads, strict=True):
        assert head.outer.weight.any()
        assert torch.equal(head.outer.weight, target.outer.weight)
    assert weights_of(tmp_path, "ilql") != (start / "model.safetensors").read_bytes()
    names = [row["name"] for row in summary["headline"]]
    assert names == ["eval/return_correlation", "eval/q_loss", "eval/awac_loss"]
    account = " ".join(summary["account"])
    assert "with beta = 2.5" in account and "scaled to mean 0 and variance 1" in account
    assert "beta = 0: imitation" in (folder / "README.md").read_text()
    last = logged(tmp_path, "ilql")[-1]
    assert {"eval/loss", "eval/q_loss", "eval/expectile_loss", "eval/cql_loss", "eval/awac_loss"} <= last.keys()
    assert "count +1" not in summary["printed"]


def test_pairs_count_plus_and_minus_one_and_it_says_so(start: Path, tmp_path: Path) -> None:
    """Returns 1 and -1 in equal numbers: mean 0, standard deviation 1, whether or not they are standardised."""
    marks = Part.of(
        [answers_to(f"ask {i}", ("yes", {"score": 1.0}), ("no", {"score": -1.0})) for i in range(24)], "marks"
    )
    summary = run_stage_on(tmp_path / "pairs", start, PAIRS, "ilql", {})
    run_stage_on(tmp_path / "scores", start, marks, "ilql", {"standardise": False})
    assert "48 answers marked good or bad count +1 and -1 (of a pair, the chosen and the rejected one)" in " ".join(
        summary["printed"].split()
    )
    assert files_of(tmp_path / "pairs") == files_of(tmp_path / "scores")
    assert len(files_of(tmp_path / "pairs")) == 2


def test_returns_are_standardised_unless_told_otherwise(start: Path, tmp_path: Path) -> None:
    """Ten times the scores plus three are the same returns once standardised, to rounding; and others if not."""
    scaled = Part.of(
        [
            answers_to(g.prompt[0].content, *((c.text, {"score": 10 * (c.score or 0.0) + 3}) for c in g.completions))
            for g in RATED.groups
        ],
        "scaled",
    )
    rows = {}
    for name, part in (("raw", RATED), ("scaled", scaled)):
        for standardise in (True, False):
            out = tmp_path / f"{name}-{standardise}"
            run_stage_on(out, start, part, "ilql", {"standardise": standardise})
            rows[name, standardise] = logged(out, "ilql")[-1]["eval/q_loss"]
    assert rows["raw", True] == pytest.approx(rows["scaled", True], rel=1e-4)
    assert rows["raw", False] != pytest.approx(rows["scaled", False], rel=1e-2)


def test_without_anything_held_out_it_warns(start: Path, tmp_path: Path) -> None:
    summary = run_stage_on(tmp_path, start, RATED, "ilql", {}, holdout=0.0)
    assert (summary["headline"], len(summary["warnings"])) == ([], 1)
    assert "set `data.holdout`" in summary["warnings"][0]


def test_a_q_that_learned_nothing_warns_that_beta_would_steer_by_noise(start: Path, tmp_path: Path) -> None:
    summary = run_stage_on(tmp_path, start, RATED, "ilql", {"learning_rate": 0.0})
    assert "steer by noise" in " ".join(summary["warnings"])


def test_equal_returns_stop_the_stage(start: Path, tmp_path: Path) -> None:
    equal = Part.of([answers_to(f"ask {i}", ("yes", {"score": 1.0})) for i in range(8)], "equal")
    with pytest.raises(DataError, match="use `accord sft`"):
        run_stage_on(tmp_path, start, equal, "ilql", {})


def test_unjudged_answers_are_counted_and_left_out(start: Path, tmp_path: Path) -> None:
    some = Part.of([answers_to(f"ask {i}", ("yes", {"score": float(i)}), ("no", {})) for i in range(8)], "half judged")
    summary = run_stage_on(tmp_path, start, some, "ilql", {}, holdout=0.0)
    assert "8 of the rated answers have no score and no mark, or do not fit: left out" in summary["printed"]


class Interrupted(Exception):
    pass


def test_a_stage_that_broke_off_ends_with_the_same_bits(
    start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It breaks off in step 6; the last checkpoint is of step 4, between two moves of the targets."""
    settings = {"max_steps": 9, "epochs": 9, "checkpoint_every": 4, "sync_every": 3, "target_rate": 0.5}
    run_stage_on(tmp_path / "whole", start, RATED, "ilql", settings)
    after_update = TargetSync.after_update

    def break_off(self: TargetSync, step: int) -> None:
        after_update(self, step)
        if step == 6:
            raise Interrupted

    with monkeypatch.context() as patch:
        patch.setattr(TargetSync, "after_update", break_off)
        with pytest.raises(Interrupted):
            run_stage_on(tmp_path / "broken", start, RATED, "ilql", settings)
    summary = run_stage_on(tmp_path / "broken", start, RATED, "ilql", settings)
    assert "continuing ilql after step 4 of 9" in summary["printed"]
    assert files_of(tmp_path / "broken") == files_of(tmp_path / "whole")
    rows = [[numbers(row) for row in logged(tmp_path / name, "ilql")] for name in ("broken", "whole")]
    assert rows[0] == rows[1] and len(rows[0]) == 9


def test_an_adapter_may_be_trained_under_the_heads(start: Path, tmp_path: Path) -> None:
    data = {"holdout": 0.3, "max_tokens": 64}
    model = {"path": str(start), "adapter": {"rank": 2}}
    section = {"batch_size": 8, "max_steps": 4, "epochs": 4, "learning_rate": 0.01, "checkpoint_every": 2}
    tree = {"model": model, "threads": 1, "out": str(tmp_path), "data": data, "ilql": section}
    run_stages(recipe_from(tree), Corpus(preferences=RATED), ["ilql"], Console(quiet=True))
    policy, _ = load_policy(tmp_path / "ilql" / "model")
    heads, _ = load_heads(policy, tmp_path / "ilql" / "model")
    assert heads.q_heads[0].outer.weight.any() and heads.target_heads[0].outer.weight.any()
    assert (tmp_path / "ilql" / "adapter").is_dir()
    embeddings = [m.get_input_embeddings().weight for m in (policy, load_policy(start)[0])]
    assert torch.equal(*embeddings), "only the adapter and the heads are trained"


# --- around the stage ------------------------------------------------------------------------------------------------


def test_evaluation_answers_with_the_heads_where_there_are_some(start: Path, tmp_path: Path) -> None:
    run_stage_on(tmp_path, start, RATED, "ilql", {"beta": 3.0})
    tree = {"model": {"path": str(start)}, "out": str(tmp_path), "ilql": {}, "evaluate": {}}
    context = Context(recipe_from(tree), Corpus(), Console(quiet=True))
    shaped = evaluation._contestant(context, "ilql", tmp_path / "ilql" / "model", None, tmp_path)
    plain = evaluation._contestant(context, "base", start, None, tmp_path)
    assert isinstance(shaped.model, ShapedPolicy) and not isinstance(plain.model, ShapedPolicy)
    policy, _ = load_policy(tmp_path / "ilql" / "model")
    ids = torch.tensor([[5, 6, 7]])
    expected = ShapedPolicy(load_heads(policy, tmp_path / "ilql" / "model")[0], 3.0)(input_ids=ids).logits
    assert torch.equal(shaped.model(input_ids=ids).logits, expected)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_plan_counts_the_q_heads_and_their_copies(kind: Any) -> None:
    """20 bytes a weight: 16 for one that is trained, 4 for its copy. Biases, which are few, are left out."""
    scratch = {"kind": kind, "hidden_size": 64, "layers": 1, "heads": 4, "vocab_size": 8000, "max_positions": 32}
    plans = []
    for stage in ("kto", "ilql"):
        recipe = recipe_from({"model": {"scratch": scratch}, stage: {}})
        table = plan_table(recipe, Corpus(preferences=PAIRS), [stage])
        plans.append(str(next(iter(table.columns[4].cells))))
    model = ILQLModel(build_model(ModelShape(64, 1, 4, 32, kind), vocab_size=8000, pad_id=0, eos_id=1, seed=0), seed=0)
    heads = sum(p.numel() for p in model.q_heads.parameters() if p.ndim == 2)
    megabytes = [float(text.removesuffix(" MB").replace(",", "")) for text in plans]
    assert megabytes[1] - megabytes[0] == pytest.approx(20 * heads / 1e6, abs=1.01)


def test_the_plan_reads_width_and_vocabulary_from_the_files() -> None:
    recipe = recipe_from({"model": {"path": "quickstart"}, "ilql": {}, "kto": {}})
    corpus = Corpus(preferences=PAIRS)
    kto, ilql = (str(next(iter(plan_table(recipe, corpus, [s]).columns[4].cells))) for s in ("kto", "ilql"))
    assert float(ilql.removesuffix(" MB")) > 1.2 * float(kto.removesuffix(" MB"))
    assert "Q heads" in str(next(iter(plan_table(recipe, corpus, ["ilql"]).columns[3].cells)))
