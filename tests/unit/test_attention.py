"""The attention a recipe chooses. Masks in blocks are compared with torch's masked attention, values and gradients. On
a CPU torch has no kernel for FlexAttention's gradient and refuses one, so here its plain code runs."""

from __future__ import annotations

import copy
import io
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.attention.flex_attention as library
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.nn import functional as F
from transformers.integrations import flash_attention

from accord.cli.main import main
from accord.config import recipe_from
from accord.errors import CheckpointError, ConfigError
from accord.methods import context as context_module
from accord.methods.context import Context, choose_layout
from accord.methods.corpus import Corpus, Part
from accord.methods.plan import check_sizes
from accord.models import flex as flex_module
from accord.models import token_scores
from accord.models.attention import attending, check_attention
from accord.models.compiled import compile_trunk
from accord.models.flex import as_blocks, computed_pairs, flex, seen_pairs
from accord.models.layout import collate
from accord.models.load import load_policy, reward_model_from, save_model
from accord.models.precision import precision
from accord.models.recompute import recompute_activations
from accord.models.self_check import check_layouts
from accord.models.token_scores import score_completions, score_tokens
from accord.pipeline import run_stages
from accord.profiling.observer import _pass_size
from accord.records import TokenGroup
from accord.rollout.native import NativeSampler, PromptTokens
from accord.rollout.sampling import Sampling
from models_support import PAD_ID, first_counts, groups_of, reached_tokens, tiny_model, word_tokenizer
from stages_support import QUICK, answers_to, logged, saved_model

GROUPS = groups_of((3, (4, 2, 5, 0, 3)), (1, (1, 6)), (5, (2,)))
CUDA = torch.device("cuda", 0)


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """FlexAttention on this machine, with gradient; the queries it was given."""
    seen: list[Tensor] = []

    def kernel(query: Tensor, *rest: Tensor, **settings: Any) -> Any:
        seen.append(query)
        return library.flex_attention(query, *rest, **settings)

    monkeypatch.setattr(library, "_validate_device", lambda *tensors: None)
    monkeypatch.setattr(library, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    monkeypatch.setattr(flex_module, "_compiled", lambda: kernel)
    return seen


def shared(groups: list[TokenGroup] = GROUPS) -> Any:
    return collate(groups, layout="shared", pad_id=PAD_ID)


def gradients(model: Any, batch: Any, choice: str) -> dict[str, Tensor]:
    """Log-probabilities and the gradients of a sum of them; the backward pass runs outside of `attending`, as on a GPU,
    where it has a thread of its own."""
    model.zero_grad(set_to_none=True)
    with attending(choice):
        said = score_tokens(model, batch).logprobs
    (said * torch.linspace(-1, 2, said.numel(), dtype=said.dtype).view_as(said)).sum().backward()
    return {"said": said.detach()} | {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], atol: float) -> None:
    assert found.keys() == expected.keys() and len(found) > 8
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=atol, msg=name)


@settings(max_examples=10, deadline=None)
@given(
    st.integers(1, 3), st.sampled_from([1, 2, 9, 140]), st.sampled_from([(2, 2), (4, 2), (3, 1)]), st.integers(0, 99)
)
def test_any_mask_is_computed_as_torch_does(rows: int, length: int, heads: tuple[int, int], seed: int) -> None:
    """Masks of one block and of several, of grouped queries and others: values and gradients in float64."""
    numbers = torch.Generator().manual_seed(seed)
    mask = (torch.rand(rows, 1, length, length, generator=numbers) < 0.3) | torch.eye(length, dtype=torch.bool)
    size = (rows, length, 4)
    inputs = [
        torch.randn(size[0], count, *size[1:], generator=numbers, dtype=torch.float64, requires_grad=True)
        for count in (heads[0], heads[1], heads[1])
    ]
    weights = torch.randn(rows, length, heads[0], 4, generator=numbers, dtype=torch.float64)
    blocks = as_blocks(mask)
    assert torch.equal(seen_pairs(blocks), mask)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(library, "_validate_device", lambda *tensors: None)
        patch.setattr(library, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
        patch.setattr(flex_module, "_compiled", lambda: library.flex_attention)
        ours = flex(*inputs, blocks, scaling=0.3, dropout=0.0)
    theirs = F.scaled_dot_product_attention(*inputs, attn_mask=mask, scale=0.3, enable_gqa=True).transpose(1, 2)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-13)
    found, expected = (torch.autograd.grad((x * weights).sum(), inputs) for x in (ours, theirs))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_blocks_that_show_nothing_are_not_computed() -> None:
    """A prompt of 128 and three answers of 128 are four by four blocks of 128: the prompt sees itself, each answer the
    prompt and itself, 1 + 3 * 2 of the 16. An answer of one more is a fifth column and row, which sees itself, the
    prompt and the answer it belongs to."""
    batch = shared(groups_of((128, (128, 128, 128))))
    assert computed_pairs(as_blocks(batch.attention_mask)) == 7 * 128**2
    longer = shared(groups_of((128, (128, 128, 129))))
    assert computed_pairs(as_blocks(longer.attention_mask)) == (7 + 3) * 128**2


@pytest.mark.parametrize("kind", ["llama", "gpt_neox", "gemma3_text", "opt"])
def test_values_and_gradients_are_those_of_the_masked_kernel(kind: str, passes: list[Tensor]) -> None:
    """Grouped queries, queries of their own, norms of queries and keys, and places that are learned."""
    model = tiny_model(kind, dtype=torch.float64)
    expected = gradients(model, shared(), "sdpa")
    assert not passes
    found = gradients(model, shared(), "flex")
    assert len(passes) == model.config.num_hidden_layers
    assert_close(found, expected, 1e-11)


def test_rows_without_a_mask_are_left_to_the_causal_kernel(passes: list[Tensor]) -> None:
    model, batch = tiny_model("llama"), collate(GROUPS, layout="plain", pad_id=PAD_ID)
    ours, theirs = (gradients(model, batch, choice) for choice in ("flex", "auto"))
    assert not passes
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_no_gradient_comes_from_another_completion_or_padding(passes: list[Tensor]) -> None:
    only, used = first_counts(GROUPS[0])
    model = tiny_model("opt", tie_word_embeddings=False)
    with attending("flex"):
        score_tokens(model, shared([only, *GROUPS[1:]])).logprobs[0].sum().backward()
    assert passes and reached_tokens(model) == used


def test_blocks_of_the_trunk_that_run_again_see_the_same_mask(passes: list[Tensor]) -> None:
    model = tiny_model("llama")
    twin = copy.deepcopy(model)
    recompute_activations(twin)
    kept, again = (gradients(m, shared(), "flex") for m in (model, twin))
    assert len(passes) == 3 * model.config.num_hidden_layers
    assert all(torch.equal(kept[name], again[name]) for name in kept)


def test_16_bits_reach_queries_keys_and_values_alike(passes: list[Tensor]) -> None:
    """Rotated queries are float32 where autocast made the values bfloat16: torch would refuse the mixture."""
    model = tiny_model("llama")
    with precision("bfloat16"):
        found, expected = (gradients(model, shared(), choice) for choice in ("flex", "sdpa"))
    assert {query.dtype for query in passes} == {torch.bfloat16}
    torch.testing.assert_close(found["said"], expected["said"], rtol=0, atol=0.05)
    assert all(x.dtype == torch.float32 for name, x in found.items() if name != "said")


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_compiled_trunk_takes_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "_validate_device", lambda *tensors: None)
    torch._dynamo.reset()
    model, plain = (tiny_model("opt", num_hidden_layers=1) for _ in range(2))
    counter = CompileCounter()
    compile_trunk(model, backend=counter)
    assert_close(gradients(model, shared(), "flex"), gradients(plain, shared(), "sdpa"), 1e-4)
    assert counter.frame_count == 1, "attention broke the trunk's graph"
    torch._dynamo.reset()


def test_flash_kernels_are_given_plain_rows_in_16_bits_and_no_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package's kernel is torch's here; what transformers hands to it is seen."""
    seen: list[tuple[Any, ...]] = []

    def kernel(query: Tensor, key: Tensor, value: Tensor, mask: Any, **settings: Any) -> Tensor:
        seen.append((settings["target_dtype"], mask))
        rows = (x.to(settings["target_dtype"]).transpose(1, 2) for x in (query, key, value))
        return F.scaled_dot_product_attention(
            *rows, is_causal=True, scale=settings["softmax_scale"], enable_gqa=True
        ).transpose(1, 2)

    monkeypatch.setattr(flash_attention, "_flash_attention_forward", kernel)
    model = tiny_model("llama")
    model.config._attn_implementation = "flash_attention_2"
    with precision("bfloat16"):
        check = check_layouts(model, GROUPS, PAD_ID)
        found = score_tokens(model, collate(GROUPS, layout="plain", pad_id=PAD_ID)).logprobs
        model.config._attn_implementation = "sdpa"
        expected = score_tokens(model, collate(GROUPS, layout="plain", pad_id=PAD_ID)).logprobs
    assert check.layout == "plain" and "'flash_attention_2' takes no mask" in check.reason
    assert set(seen) == {(torch.bfloat16, None)}
    torch.testing.assert_close(found, expected, rtol=0, atol=0.05)


def test_every_kind_of_pass_has_its_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where torch compiles one kind only, two and more are compiled all the same: without a kernel all pairs would be
    computed. Compiled to plain calls."""
    torch._dynamo.reset()
    counter = CompileCounter()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    kernel = flex_module._compiled.__wrapped__()
    monkeypatch.setattr(flex_module, "_compiled", lambda: kernel)
    with torch._dynamo.config.patch(recompile_limit=1):
        for rows, length, compiled in ((2, 9, 1), (1, 9, 2), (3, 12, 2), (1, 130, 3)):
            x, mask = torch.ones(rows, 1, length, 4), torch.ones(rows, 1, length, length, dtype=torch.bool).tril()
            torch.testing.assert_close(flex(x, x, x, as_blocks(mask)), x.transpose(1, 2))
            assert counter.frame_count == compiled
    torch._dynamo.reset()


def test_what_an_architecture_adds_to_attention_is_refused() -> None:
    x = torch.zeros(1, 1, 2, 4)
    blocks = as_blocks(torch.ones(1, 1, 2, 2, dtype=torch.bool))
    for added in ({"softcap": 3.0}, {"position_bias": x}, {"dropout": 0.1}):
        with pytest.raises(ValueError, match=f"knows no {next(iter(added))}"):
            flex(x, x, x, blocks, **added)


def test_the_start_up_check_compares_blocks_too(passes: list[Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    with attending("flex"):
        check = check_layouts(model, GROUPS, PAD_ID)
        assert check.layout == "shared" and check.max_difference < 1e-5 and passes
        monkeypatch.setattr(token_scores, "as_blocks", lambda mask: as_blocks(torch.ones_like(mask).tril()))
        wrong = check_layouts(model, GROUPS, PAD_ID)
    assert wrong.layout == "plain" and "changes log-probabilities" in wrong.reason


def test_a_profile_counts_the_blocks_that_run() -> None:
    model, batch = tiny_model("llama"), shared()
    blocks = as_blocks(batch.attention_mask)
    found = _pass_size(batch.input_ids, blocks, model.config, 0)
    masked = _pass_size(batch.input_ids, batch.attention_mask, model.config, 0)
    assert (found.tokens, found.tokens_run, found.pairs) == (masked.tokens, masked.tokens_run, masked.pairs)
    assert found.pairs_run == 3 * 128**2 > masked.pairs_run


# --- what is chosen ---------------------------------------------------------------------------------------------------


def test_models_are_loaded_with_it_and_saved_without(tmp_path: Path) -> None:
    folder = save_model(tiny_model("llama"), word_tokenizer(), tmp_path / "model")
    with attending("eager"):
        model, tokenizer = load_policy(folder)
    assert model.config._attn_implementation == reward_model_from(model, 0).config._attn_implementation == "eager"
    theirs, _ = load_policy(folder)
    assert theirs.config._attn_implementation == "sdpa"
    batch = shared()
    torch.testing.assert_close(
        score_tokens(model, batch).logprobs, score_tokens(theirs, batch).logprobs, rtol=0, atol=1e-5
    )
    score_completions(reward_model_from(model, 0), batch)
    again = save_model(model, tokenizer, tmp_path / "again")
    assert json.loads((again / "config.json").read_text()) == json.loads((folder / "config.json").read_text())
    assert load_policy(again)[0].config._attn_implementation == "sdpa"


@pytest.mark.parametrize(("kind", "choice"), [("gemma2", "sdpa"), ("gemma2", "flex"), ("gpt2", "flex")])
def test_an_architecture_without_it_is_refused(kind: str, choice: str, tmp_path: Path) -> None:
    """Gemma 2 caps its scores, which sdpa cannot; GPT-2's code takes no blocks."""
    folder = save_model(tiny_model(kind), word_tokenizer(), tmp_path / "model")
    with attending(choice), pytest.raises(ConfigError, match=f"`model.attention` = {choice} does not fit G"):
        load_policy(folder)


def test_samples_do_not_depend_on_blocks() -> None:
    model, prompts = tiny_model("llama"), [PromptTokens((5, 9, 3), 14), PromptTokens((4, 7), 15)]
    sampled = []
    for choice in ("auto", "flex"):
        with attending(choice):
            sampled.append(NativeSampler(model, pad_id=PAD_ID).generate(prompts, 2, Sampling(5), ("ppo", 0, 1)))
    assert sampled[0] == sampled[1]


@pytest.mark.parametrize(
    ("keys", "why"),
    [
        ({"attention": "flex", "device": "cpu"}, "`model.attention` = flex runs on a GPU alone"),
        ({"attention": "flash", "device": "cpu", "precision": "bfloat16"}, "= flash runs on a GPU alone"),
        ({"attention": "flex", "layout": "plain"}, "`model.layout` = plain has none"),
        ({"attention": "flash", "layout": "shared", "precision": "bfloat16"}, "takes no mask"),
        ({"attention": "flash"}, "`model.precision` is float32"),
        ({"attn_implementation": "sdpa"}, "attention"),
        ({"attention": "flash_attention_2"}, "'flash'"),
    ],
)
def test_contradictions_are_found_before_anything_is_loaded(keys: dict[str, str], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        recipe_from({"model": {"path": "quickstart", **keys}})


def test_what_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for choice in ("auto", "sdpa", "eager"):
        check_attention(choice, torch.device("cpu"))
    check_attention("flex", CUDA)
    for choice in ("flex", "flash"):
        with pytest.raises(ConfigError, match=f"`model.attention` = {choice} runs on a GPU alone.*on the cpu here"):
            check_attention(choice, torch.device("cpu"))
    monkeypatch.setattr("accord.models.extras.find_spec", lambda name: None)
    keys = {"path": "quickstart", "attention": "flash", "precision": "bfloat16"}
    for check in (
        lambda: check_attention("flash", CUDA),
        lambda: check_sizes(recipe_from({"model": keys}), Corpus(), []),
    ):
        with pytest.raises(ConfigError, match="needs the package flash-attn, which is not installed"):
            check()


PART = Part.of(
    [answers_to(f"ask {i}", ("yes, do", {"rank": 0}), (f"no {i}", {"rank": 1})) for i in range(20)], "the test's data"
)


def trained(out: Path, model: Path, attention: str) -> tuple[list[dict[str, float]], str]:
    """The metrics of a stage, and what it said."""
    tree = {"model": {"path": str(model), "attention": attention}, "threads": 1, "out": str(out), "dpo": QUICK}
    screen = io.StringIO()
    run_stages(recipe_from(tree), Corpus(preferences=PART), ["dpo"], Console(file=screen, width=1000))
    return logged(out, "dpo"), screen.getvalue()


def test_a_stage_trains_by_it_and_says_the_same(
    passes: list[Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = saved_model(tmp_path / "model", PART.groups, 0)
    expected, said = trained(tmp_path / "auto", model, "auto")
    assert "attention by" not in said
    with pytest.raises(ConfigError, match="flex runs on a GPU alone"):
        trained(tmp_path / "flex", model, "flex")
    assert not passes and not (tmp_path / "flex").exists()
    monkeypatch.setattr(context_module, "check_attention", lambda choice, device: None)
    for choice in ("eager", "flex"):
        found, said = trained(tmp_path / choice, model, choice)
        assert f"attention by {choice}, " in said
        assert " 0 from the cache" in said, "another attention's reference was taken"
        assert len(found) == len(expected) > 1
        for ours, theirs in zip(found, expected, strict=True):
            assert ours["train/loss"] == pytest.approx(theirs["train/loss"], abs=1e-5)
            assert ours["train/grad_norm"] == pytest.approx(theirs["train/grad_norm"], rel=1e-3)
    assert passes
    # It decides last bits: a run goes on with what it was begun with.
    with pytest.raises(CheckpointError, match="attention"):
        trained(tmp_path / "flex", model, "sdpa")


@pytest.mark.parametrize(("attention", "completions", "times"), [("flex", 1, 1), ("flex", 3, 0), ("auto", 1, 0)])
def test_blocks_without_a_mask_to_cut_are_said(attention: str, completions: int, times: int) -> None:
    screen, groups = io.StringIO(), groups_of((6, (3,) * completions))
    context = Context(
        recipe_from({"model": {"path": "x", "attention": attention}}), Corpus(), Console(file=screen, width=1000)
    )
    layout = choose_layout(context, tiny_model("llama"), groups, PAD_ID)
    assert layout.removesuffix("_packed") == ("plain" if completions == 1 else "shared")
    assert screen.getvalue().count("`model.attention` = flex has nothing to do") == times


def test_the_command_refuses_with_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keys = ["model.path=quickstart", "model.device=cpu", "model.attention=flex", f"out={tmp_path}"]
    assert main(["sft", *(part for key in keys for part in ("--set", key))]) == 2
    assert "flex runs on a GPU alone" in "".join(capsys.readouterr())


# --- on a GPU ---------------------------------------------------------------------------------------------------------


def on_gpu(**changes: Any) -> Any:
    return tiny_model("llama", hidden_size=128, head_dim=32, max_position_embeddings=1024, **changes).to("cuda")


@pytest.mark.gpu
def test_on_a_real_gpu_passes_of_every_shape_are_those_of_sdpa() -> None:
    """More kinds of passes than torch compiles by itself: with gradient and without, of one row and several, of one
    block and several, also where rows and blocks are as many."""
    model = on_gpu()
    for groups in (
        groups_of((20, (30, 30))),
        groups_of((20, (30, 30)), (9, (5,))),
        groups_of((200, (60, 61))),
        groups_of((200, (60, 61)), (130, (9, 9, 9))),
        groups_of((200, (60, 61)), (130, (9, 9, 9)), (20, (128, 20))),
        groups_of((128, (128, 128))),
    ):
        batch = collate(groups, layout="shared", pad_id=PAD_ID, device="cuda")
        assert_close(gradients(model, batch, "flex"), gradients(model, batch, "sdpa"), 5e-3)
        with torch.no_grad(), attending("flex"):
            found = score_tokens(model, batch).logprobs
        with torch.no_grad():
            torch.testing.assert_close(found, score_tokens(model, batch).logprobs, rtol=0, atol=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("option", ["precision", "recompute", "compile"])
def test_on_a_real_gpu_blocks_go_with_other_options(option: str) -> None:
    model, twin = on_gpu(), on_gpu()
    if option == "recompute":
        recompute_activations(model)
    if option == "compile":
        compile_trunk(model)
    batch = collate(groups_of((60, (80, 90, 70))), layout="shared", pad_id=PAD_ID, device="cuda")
    with precision("bfloat16" if option == "precision" else "float32"):
        found, expected = gradients(model, batch, "flex"), gradients(twin, batch, "sdpa")
    assert found.keys() == expected.keys()
    ours, theirs = (torch.cat([x.flatten() for x in numbers.values()]) for numbers in (found, expected))
    assert float((ours - theirs).norm() / theirs.norm()) < (0.1 if option == "precision" else 1e-3)


@pytest.mark.gpu
def test_on_a_real_gpu_flash_reads_plain_rows_as_the_model_does(tmp_path: Path) -> None:
    pytest.importorskip("flash_attn")
    folder = save_model(on_gpu(), word_tokenizer(), tmp_path / "model")
    with precision("bfloat16"), attending("flash"):
        model, _ = load_policy(folder, device="cuda")
        assert check_layouts(model, GROUPS, PAD_ID).layout == "plain"
        batch = collate(GROUPS, layout="plain", pad_id=PAD_ID, device="cuda")
        found = score_tokens(model, batch).logprobs
        found.sum().backward()
        theirs, _ = load_policy(folder, device="cuda")
        theirs.set_attn_implementation("sdpa")
        torch.testing.assert_close(found, score_tokens(theirs, batch).logprobs, rtol=0, atol=0.1)
