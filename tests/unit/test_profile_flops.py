"""What is counted as a pass's arithmetic: by hand, and against torch's own count of what was run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from accord.models import layout as layouts
from accord.models import shared_attention
from accord.models.adapters import adapters_off, add_adapter
from accord.models.blocks import train_top_blocks
from accord.models.layout import collate
from accord.models.projection import LogitTransform, token_logprobs
from accord.models.recompute import recompute_activations
from accord.models.token_scores import score_tokens
from accord.phases import ITERATION, phase
from accord.profiling.flops import (
    Attention,
    Flops,
    Matrix,
    Trunk,
    attention_flops,
    causal_pairs,
    matrix_flops,
    trunk_flops,
)
from accord.profiling.observer import Observer, Work
from accord.records import TokenCompletion, TokenGroup
from accord.rollout.native import NativeSampler, PromptTokens
from accord.rollout.sampling import Sampling
from models_support import PAD_ID, tiny_model


def test_a_matrix_costs_two_operations_an_element_and_token() -> None:
    """(3 tokens, 4) @ (4, 5): 3 * 5 sums of 4 products, 2 * 60 = 120. Backward the same for the gradient of the input,
    (3, 5) @ (5, 4), where it is wanted, and for that of the matrix, (4, 3) @ (3, 5), where it is trained."""
    assert matrix_flops(3, Matrix(4, 5)) == Flops(120, 0)
    assert matrix_flops(3, Matrix(4, 5, reached=True)) == Flops(120, 120)
    assert matrix_flops(3, Matrix(4, 5, trained=True)) == Flops(120, 120)
    assert matrix_flops(3, Matrix(4, 5, trained=True, reached=True)) == Flops(120, 240)


def test_attention_costs_four_operations_a_pair_and_unit_of_width() -> None:
    """7 pairs, width 8: the scores 2 * 7 * 8 and the weighted sums as many."""
    assert attention_flops(7, Attention(8)) == Flops(224, 0)
    assert attention_flops(7, Attention(8, reached=True)) == Flops(224, 448)


def test_a_trunk_is_the_sum_of_its_layers() -> None:
    trunk = Trunk((Matrix(4, 5, True, True), Matrix(5, 4)), (Attention(8, True), Attention(8)))
    assert trunk_flops(3, 7, trunk) == Flops(120 + 120 + 224 + 224, 240 + 448)


def test_pairs_under_a_causal_mask() -> None:
    """4 tokens see 1 + 2 + 3 + 4; behind 10 others each sees 10 more."""
    assert causal_pairs(4) == 10
    assert causal_pairs(4, 10) == 50


GROUPS = (
    TokenGroup((5, 6, 7), (TokenCompletion((8, 9, 1), (True,) * 3), TokenCompletion((10, 1), (True,) * 2))),
    TokenGroup((11, 12), (TokenCompletion((13,), (True,)), TokenCompletion((14, 15), (True, False)))),
)


def torchs_count() -> FlopCounterMode:
    """Counts every product; torch leaves out those that are added in place."""

    def added_in_place(_into: Any, a: Any, b: Any, **_: Any) -> int:
        return 2 * a[0] * a[1] * b[1]

    return FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: added_in_place})


def observed(
    model: Any, groups: Sequence[TokenGroup], layout: Any, *, grad: bool = True
) -> tuple[dict[str, Work], int]:
    """The work of an iteration of one pass, and torch's count of everything that was run in it."""
    batch = collate(groups, layout=layout, pad_id=PAD_ID)
    observer = Observer()
    counter = torchs_count()
    with observer.watching():
        for _ in range(2):  # in the first the models are found
            with phase(ITERATION), torchs_count() as counter, torch.set_grad_enabled(grad):
                with phase("forward"):
                    loss = score_tokens(model, batch, mask="loss").logprobs.sum()
                if grad:
                    with phase("backward"):
                        loss.backward()
    return observer.iterations[1], counter.get_total_flops()


def whole(model: Any) -> None:
    pass


def top(model: Any) -> None:
    train_top_blocks(model, 1)


@pytest.mark.parametrize("prepared", [whole, top])
@pytest.mark.parametrize("grad", [True, False])
def test_what_is_counted_as_run_is_what_torch_ran(prepared: Any, grad: bool) -> None:
    """In the shared layout a written-out mask makes attention run in full, so that both count the same. GPT-2 has no
    rotary embedding, which torch counts as a product."""
    model = tiny_model("gpt2", attn_implementation="eager")
    model.config._attn_implementation = "eager"
    prepared(model)
    work, run = observed(model, GROUPS, "shared", grad=grad)
    assert sum(w.useful + w.overhead for w in work.values()) == run
    assert work["forward"].tokens == 3 + 3 + 2 + 2 + 1 + 2
    assert work["forward"].padding == 2 * 8 - 13
    assert all(w.overhead > 0 for w in work.values())
    assert grad == ("backward" in work)


def test_blocks_that_run_again_in_the_backward_pass_are_overhead() -> None:
    """Torch stops a block's second run at the last activation that the gradient needs: its last product is left out."""
    model = tiny_model("gpt2", attn_implementation="eager")
    model.config._attn_implementation = "eager"
    plain, run = observed(model, GROUPS, "shared")
    recompute_activations(model)
    again, run_again = observed(model, GROUPS, "shared")
    assert again["forward"] == plain["forward"] and again["backward"].useful == plain["backward"].useful
    second = again["backward"].overhead - plain["backward"].overhead
    last_products = 2 * 2 * (2 * 8) * 4 * 32 * 32
    assert second - last_products == run_again - run > 0


def test_useful_is_what_the_tokens_need_by_themselves() -> None:
    """The shared layout, padding and hidden pairs included, needs no more than its tokens and the pairs that they see:
    of the first group 6 in the prompt, 3 + 3 + 3 + (1 + 2 + 3) and 3 + 3 + (1 + 2) in its completions.

    Of two blocks the last one makes keys and values of all 13 tokens, and the rest only of the 5 that predict one: the
    prompts' last ones, which see 3 and 2 tokens, two and one in the answers of the first group, (3 + 1) + (3 + 2) and
    3 + 1, and none in the second's, whose last token is not in the loss."""
    model = tiny_model("llama")
    work, _ = observed(model, GROUPS, "shared")
    pairs = (6 + 15 + 9) + (3 + 3 + (2 + 2 + 1 + 2))
    read, pairs_read = 5, 3 + 2 + (4 + 5) + 4
    hidden, inner = 32, 48
    shared = 2 * 2 * hidden * 16  # k, v of two heads
    rest = 2 * (2 * hidden * hidden + 3 * hidden * inner)  # q, o; the MLP
    projection = 2 * hidden * 53 * (5 + 2)
    first, last = 13 * rest + 4 * pairs * hidden, read * rest + 4 * pairs_read * hidden
    expected = 2 * 13 * shared + first + last + projection
    assert work["forward"].useful == expected
    assert work["backward"].useful == 2 * expected


def test_packed_rows_need_the_same_and_pad_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The masked kernel computes 8 x 8 and 5 x 5 pairs of the two rows, of which 30 and 14 are seen; in the last block,
    where the read places are few, as many, of which 3 + 2 + (4 + 5) + 4 are of use."""
    monkeypatch.setattr(layouts, "ROW_TOKENS", 0)
    model, hidden = tiny_model("llama"), 32
    monkeypatch.setattr(shared_attention, "_WORTH_IT", 0.0)
    work, _ = observed(model, GROUPS, "shared_packed")
    padded, _ = observed(model, GROUPS, "shared")
    assert work["forward"].useful == padded["forward"].useful
    assert (work["forward"].tokens, work["forward"].padding) == (13, 0)
    pairs = (6 + 15 + 9) + (3 + 3 + (2 + 2 + 1 + 2))
    assert work["forward"].overhead == 4 * hidden * ((8**2 + 5**2 - pairs) + (8**2 + 5**2 - 18))


def test_plain_rows_run_the_prompt_again_which_is_no_padding() -> None:
    work, _ = observed(tiny_model("llama"), GROUPS, "plain")
    assert work["forward"].tokens == 6 + 5 + 3 + 4
    assert work["forward"].padding == 4 * 6 - 18


def test_an_adapter_counts_where_it_is_on() -> None:
    """Of rank 2 on a (32, 32) layer: 2 * (32 * 2 + 2 * 32) operations a token more. The layer's own matrix is frozen,
    so that backward it costs once what the adapter's cost twice. Of the two blocks the last one runs it only at the 7
    tokens that predict one."""
    model = tiny_model("llama")
    plain, _ = observed(model, GROUPS, "plain", grad=False)
    add_adapter(model, rank=2, alpha=2.0, targets=("o_proj",), seed=0)
    on, _ = observed(model, GROUPS, "plain", grad=False)
    with adapters_off(model):
        off, _ = observed(model, GROUPS, "plain", grad=False)
    assert on["forward"].useful - plain["forward"].useful == 2 * (18 + 7) * (32 * 2 + 2 * 32)
    assert off["forward"].useful == plain["forward"].useful
    trained, _ = observed(model, GROUPS, "plain")
    assert plain["forward"].useful < trained["backward"].useful < 2 * on["forward"].useful


def test_a_projection_that_is_done_again_is_overhead() -> None:
    """7 rows in chunks of 2, room for 5, so for 2 chunks: the last 3 are projected twice, 3 * 2 * 4 * 10 operations."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(7, 4, requires_grad=True), torch.randn(10, 4, requires_grad=True)
    observer = Observer()
    with observer.watching(), phase(ITERATION), torchs_count() as counter:
        with phase("forward"):
            logprobs, _ = token_logprobs(
                hidden, weight, None, torch.arange(7), LogitTransform(),
                with_entropy=False, chunk_rows=2, kept_elements=50,
            )  # fmt: skip
        with phase("backward"):
            logprobs.sum().backward()
    work = observer.iterations[0]
    assert (work["forward"].useful, work["forward"].overhead) == (7 * 80, 0)
    assert (work["backward"].useful, work["backward"].overhead) == (2 * 7 * 80, 3 * 80)
    assert counter.get_total_flops() == sum(w.useful + w.overhead for w in work.values())


def test_a_sampler_runs_each_prompt_once_and_then_token_by_token() -> None:
    """Prompts of 3 and 5 tokens, two samples of 4 tokens each: 8 tokens, 2 of padding, then 3 passes of 4 rows."""
    model = tiny_model("llama")
    sampler = NativeSampler(model, pad_id=PAD_ID)
    observer = Observer()
    prompts = [PromptTokens((5, 6, 7), 1), PromptTokens((8, 9, 10, 11, 12), 2)]
    with observer.watching():
        for _ in range(2):
            with phase(ITERATION), phase("sampling"):
                sampler.generate(prompts, 2, Sampling(4, 1.0, stop_ids=()), ("test",))
    work = observer.iterations[1]["sampling"]
    assert (work.tokens, work.padding, work.decoded) == (8 + 12, 2, 12)
    trunk, hidden = 2 * 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48), 32
    keys = 2 * sum(3 + k for k in (1, 2, 3)) + 2 * sum(5 + k for k in (1, 2, 3))
    assert work.decoded_flops == 12 * (trunk + 2 * hidden * 53) + 2 * 4 * keys * hidden
    prefill = 8 * trunk + 2 * 4 * (6 + 15) * hidden + 2 * 2 * hidden * 53  # the head at each prompt's last token
    assert work.useful == prefill + work.decoded_flops


def test_an_optimiser_step_moves_weights_gradients_and_moments_twice() -> None:
    """32 bytes a parameter of float32: each of four numbers read and written, the gradient read twice instead. AdamW's
    step counters, 4 bytes each tensor, are counted as well."""
    weights = [torch.ones(10, requires_grad=True), torch.ones(6, requires_grad=True)]
    optimiser = torch.optim.AdamW(weights, fused=True)
    observer = Observer()
    with observer.watching(), phase(ITERATION), phase("optimiser"):
        sum(w.sum() for w in weights).backward()
        optimiser.step()
    assert observer.iterations[0]["optimiser"].bytes == 32 * 16 + 2 * 4 * 2
