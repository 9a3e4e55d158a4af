"""Watches a stage while it trains: seconds of each phase, and what each computed, from the passes of the models.

Where a model is about to run, code says so by `accord.phases.passing` and `projecting`; optimisers are seen by a hook
of torch's. Counting stops the clock.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from accord.models.flex import BlockMask, computed_pairs, seen_pairs
from accord.models.shared_attention import PackedRows, rows_of, runs_of
from accord.phases import Clock
from accord.profiling.flops import Attention, Flops, Matrix, Trunk, causal_pairs, matrix_flops, trunk_flops

__all__ = ["Observer", "Work", "trunk_of"]

BACKWARD = "backward"


@dataclass(slots=True)
class Work:
    """What a phase computed in an iteration.

    tokens    through a trunk, padding left out; of these `decoded` one by one, behind a cache
    padding   tokens that were run for nothing
    useful, overhead   floating-point operations: for the tokens; for padding, hidden pairs and what was done twice
    bytes     of the optimiser's state, gradients and weights, moved by its step
    """

    tokens: int = 0
    decoded: int = 0
    padding: int = 0
    useful: float = 0.0
    overhead: float = 0.0
    decoded_flops: float = 0.0
    bytes: float = 0.0


@dataclass(slots=True)
class Observer:
    """Use as `with observer.watching():` around a stage.

    clock    its seconds; `iterations[i]` is the work of its iteration i, `outside` that of all else
    shapes   (inputs, outputs) of the matrices that were seen -> the most tokens of a pass
    parameters, trained   of all models that ran, what they share once
    device, dtype         of the products of an update
    """

    clock: Clock = field(init=False)
    iterations: list[dict[str, Work]] = field(default_factory=list)
    outside: dict[str, Work] = field(default_factory=dict)
    shapes: dict[tuple[int, int], int] = field(default_factory=dict)
    parameters: int = 0
    trained: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32
    _trunks: dict[tuple[int, bool], tuple[Trunk, Trunk]] = field(default_factory=dict)
    _models: dict[int, Any] = field(default_factory=dict)  # by their trunk's id, which stays theirs while they live

    def __post_init__(self) -> None:
        settle = torch.cuda.synchronize if torch.cuda.is_available() else None
        self.clock = Clock(settle=settle, watcher=self)

    @contextmanager
    def watching(self) -> Iterator[None]:
        hook = register_optimizer_step_post_hook(self._stepped)
        try:
            with self.clock.running():
                yield
        finally:
            hook.remove()
            weights = {id(p): p for model in self._models.values() for p in model.parameters()}.values()
            self.parameters = sum(p.numel() for p in weights)
            self.trained = sum(p.numel() for p in weights if p.requires_grad)
            self._models.clear()

    @property
    def _work(self) -> dict[str, Work]:
        index = self.clock.iteration
        if index is None:
            return self.outside
        while len(self.iterations) <= index:
            self.iterations.append({})
        return self.iterations[index]

    def _of(self, phase: str) -> Work:
        return self._work.setdefault(phase, Work())

    # --- what is seen ------------------------------------------------------------------------------------------------

    def passing(self, model: Any, ids: Tensor, mask: Any, cached: int, logits: bool, read: Any) -> None:
        with self.clock.stopped():
            trunk = getattr(model, "base_model", None)
            if trunk is None:
                return  # a policy shaped by heads, which only evaluations sample from
            if id(trunk) not in self._models:
                self._models[id(trunk)] = model
            adapted = not _adapters_off(trunk)
            if (id(trunk), adapted) not in self._trunks:
                self._trunks[id(trunk), adapted] = trunk_of(trunk, adapted=adapted)
            body, top = self._trunks[id(trunk), adapted]
            seen = _pass_size(ids, mask, trunk.config, cached)
            narrow = seen if read is None else _pass_size(ids, mask, trunk.config, cached, read)
            self._note(body, seen.tokens_run, trunk)
            useful = trunk_flops(seen.tokens, seen.pairs, body) + trunk_flops(narrow.tokens, narrow.pairs, top)
            run = trunk_flops(seen.tokens_run, seen.pairs_run, body)
            run += trunk_flops(narrow.tokens_run, narrow.pairs_run, top)
            if logits:
                outputs, inputs = model.get_output_embeddings().weight.shape
                head = Flops(matrix_flops(len(ids), Matrix(inputs, outputs)).forward, 0.0)
                useful, run = useful + head, run + head
            work = self._add(useful, run, again=_checkpointed(trunk))
            work.tokens += seen.tokens
            work.padding += seen.tokens_run - seen.tokens
            if cached:
                work.decoded += seen.tokens
                work.decoded_flops += useful.forward

    def projecting(self, states: Tensor, embedding: Tensor, again: int) -> None:
        with self.clock.stopped():
            (outputs, inputs), tokens = embedding.shape, states.shape[0]
            self.shapes[inputs, outputs] = max(tokens, self.shapes.get((inputs, outputs), 0))
            matrix = Matrix(inputs, outputs, embedding.requires_grad, states.requires_grad)
            flops = matrix_flops(tokens, matrix)
            self._add(flops, flops, again=matrix_flops(again, matrix).forward if torch.is_grad_enabled() else 0.0)

    def _stepped(self, optimiser: torch.optim.Optimizer, *_: Any) -> None:
        """A step reads and writes weights and state; gradients are read twice, for their norm and to be applied."""
        with self.clock.stopped():
            moved = 0
            for group in optimiser.param_groups:
                for p in (p for p in group["params"] if p.grad is not None):
                    state = sum(x.nbytes for x in optimiser.state[p].values() if isinstance(x, Tensor))
                    moved += 2 * (p.nbytes + p.grad.nbytes + state)
            self._of(self.clock.name).bytes += moved

    # --- what is counted ---------------------------------------------------------------------------------------------

    def _add(self, useful: Flops, run: Flops, again: float | bool = 0.0) -> Work:
        """Charge a pass to the phase it runs in and, if a gradient is wanted, what follows to the backward pass.
        `again` is what that repeats: so many operations, or True for the whole forward pass."""
        work = self._of(self.clock.name)
        work.useful += useful.forward
        work.overhead += run.forward - useful.forward
        if torch.is_grad_enabled() and run.backward:
            behind = self._of(BACKWARD)
            behind.useful += useful.backward
            behind.overhead += run.backward - useful.backward + (run.forward if again is True else again)
        return work

    def _note(self, trunk: Trunk, tokens: int, module: Any) -> None:
        if torch.is_grad_enabled():
            kind = module.device.type
            mixed = torch.is_autocast_enabled(kind)
            self.device, self.dtype = module.device, torch.get_autocast_dtype(kind) if mixed else module.dtype
        for matrix in trunk.matrices:
            key = matrix.inputs, matrix.outputs
            self.shapes[key] = max(tokens, self.shapes.get(key, 0))


@dataclass(frozen=True, slots=True)
class _Size:
    """Of one pass: tokens and pairs of a query and a key that count, and those that are run."""

    tokens: int
    tokens_run: int
    pairs: float
    pairs_run: float


def _pass_size(ids: Tensor, mask: Any, config: Any, cached: int, read: Tensor | None = None) -> _Size:
    """Padding is known by its id, for some passes take it for real on purpose; behind a cache there is none. A mask
    written out is run in full, pairs it hides included, unless attention is split; of one in blocks those that show
    anything are run; under a causal one only what it shows is run. With `read`, of a pass whose queries are these
    places alone, in every row as many as in the row with most, under a mask."""
    rows, length = ids.shape
    runs = runs_of(mask)
    if runs is not None:
        return _packed_size(ids, runs, config, read)
    if cached:  # finished rows cannot be told here
        return _Size(rows * length, rows * length, float(mask.sum()), float(mask.numel()))
    pad_id = config.get_text_config().pad_token_id
    real = torch.ones_like(ids, dtype=torch.bool) if pad_id is None else ids != pad_id
    queries = real if read is None else real & read
    blocks, split = mask if isinstance(mask, BlockMask) else None, rows_of(mask)
    if blocks is not None:
        mask = seen_pairs(blocks)
    written_out = mask if isinstance(mask, Tensor) and mask.dim() == 4 else None
    if written_out is not None:
        visible = (written_out if written_out.dtype == torch.bool else written_out.eq(0))[:, 0]
        pairs = float((visible & queries[:, :, None] & real[:, None, :]).sum())
    else:
        pairs = float((real.cumsum(1) * queries).sum())
    run = length if read is None else max(1, int(read.sum(1).max()))
    if blocks is not None:
        pairs_run = float(computed_pairs(blocks))
    elif split is not None and read is None:
        pairs_run = float(split.pairs)
    else:
        pairs_run = float(
            rows * (run * length if written_out is not None or read is not None else causal_pairs(length))
        )
    return _Size(int(queries.sum()), rows * run, pairs, pairs_run)


def _packed_size(ids: Tensor, runs: tuple[PackedRows, ...], config: Any, read: Tensor | None) -> _Size:
    """Of a row (1, L) without padding, whose rows attend by themselves, at all of their places."""
    sizes, begin = [], 0
    for run in runs:
        places = slice(begin, begin := begin + run.rows * run.length)
        shape = run.rows, run.length
        of_run, read_of_run = ids[0, places].view(shape), None if read is None else read[0, places].view(shape)
        pairs_run = _pass_size(of_run, run.mask, config, 0).pairs_run
        sizes.append(replace(_pass_size(of_run, run.mask, config, 0, read_of_run), pairs_run=pairs_run))
    count = ids.numel() if read is None else int(read.sum())
    return _Size(count, count, sum(size.pairs for size in sizes), sum(size.pairs_run for size in sizes))


def trunk_of(trunk: Any, *, adapted: bool = True) -> tuple[Trunk, Trunk]:
    """What a trunk computes, from its modules, and apart from the rest what of its last block runs only where its
    result is read: all but keys and values. `adapted` False leaves out adapters that are switched off.

    A gradient reaches everything above the lowest thing that is trained, and within the lowest block that trains
    anything all of it is taken to be reached, though not every matrix there need be.
    """
    config = trunk.config.get_text_config()
    heads = config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    trained_at = [_depth(name) for name, p in trunk.named_parameters() if p.requires_grad]
    lowest = min(trained_at, default=None)

    def reached(name: str) -> bool:
        return lowest is not None and _depth(name) >= lowest

    body, top = [], []
    for name, module in trunk.named_modules():
        weight = dict(module.named_parameters(recurse=False)).get("weight")  # an adapted layer shows its base's, too
        if weight is None or isinstance(module, nn.Embedding) or (not adapted and ".lora_" in name):
            continue
        # Quantised weights are packed: their own shape says nothing.
        if weight.dim() != 2 and not hasattr(module, "in_features"):
            continue
        shape = getattr(module, "in_features", weight.shape[0]), getattr(module, "out_features", weight.shape[1])
        narrow = _depth(name) == config.num_hidden_layers - 1 and ".k_proj" not in name and ".v_proj" not in name
        (top if narrow else body).append(Matrix(*shape, weight.requires_grad, reached(name)))
    *below, last = (Attention(width, lowest is not None and i >= lowest) for i in range(config.num_hidden_layers))
    return Trunk(tuple(body), tuple(below)), Trunk(tuple(top), (last,))


def _depth(name: str) -> int:
    """The block a module or parameter is in, by the first number in its name; -1 for what comes before all blocks, and
    for what comes after them if it is a norm, which then counts as if it were the last block's."""
    number = next((int(part) for part in name.split(".") if part.isdigit()), None)
    if number is not None:
        return number
    return -1 if "emb" in name or "wte" in name or "wpe" in name else 1 << 30


def _adapters_off(module: nn.Module) -> bool:
    layers = [m for m in module.modules() if hasattr(m, "disable_adapters")]
    return bool(layers) and all(bool(m.disable_adapters) for m in layers)


def _checkpointed(trunk: Any) -> bool:
    """Whether a backward pass runs the forward pass of the blocks again."""
    return any(getattr(m, "gradient_checkpointing", False) and m.training for m in trunk.modules())
