"""How fast this machine multiplies matrices and moves memory, measured at the threads torch uses now."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["Machine", "Product", "measure_machine"]

SQUARES = (512, 1024, 2048)
MODEL_SHAPES = 6  # the model's own products that are measured: those that it spends most on
MOST_TOKENS = 8192
DECODED = 64  # rows of a product in the middle of sampling
MEMORY_BYTES = 1 << 28
LEAST_RUNS, MOST_RUNS, SECONDS = 3, 20, 0.25  # of each measurement


@dataclass(frozen=True, slots=True)
class Product:
    """A product of (rows, inputs) and (inputs, outputs), and its operations a second: the median and the best run."""

    rows: int
    inputs: int
    outputs: int
    median: float
    best: float
    of_model: bool


@dataclass(frozen=True, slots=True)
class Machine:
    """What the machine reached.

    peak    operations a second: the median run of the fastest product
    moved   bytes a second, read and written together, of the fastest addition in place: what an optimiser does, too
    """

    device: str
    threads: int
    dtype: str
    products: tuple[Product, ...]
    moved: float

    @property
    def peak(self) -> float:
        return max(product.median for product in self.products)

    @property
    def model_products(self) -> tuple[Product, ...]:
        return tuple(product for product in self.products if product.of_model)


def measure_machine(
    shapes: Mapping[tuple[int, int], int], *, device: torch.device, dtype: torch.dtype = torch.float32
) -> Machine:
    """Square products, products of the model's own `shapes` ((inputs, outputs) -> tokens), also with as few rows as a
    sampler has, and memory."""
    by_work = sorted(shapes.items(), key=lambda shape: -shape[0][0] * shape[0][1] * shape[1])[:MODEL_SHAPES]
    wanted = [(n, n, n, False) for n in SQUARES]
    wanted += [(min(tokens, MOST_TOKENS), *matrix, True) for matrix, tokens in by_work]
    wanted += [(DECODED, *matrix, True) for matrix, _ in by_work[:1]]
    products = tuple(_product(*shape, device=device, dtype=dtype) for shape in wanted)
    source = torch.ones(MEMORY_BYTES // 4, device=device)
    target = torch.zeros_like(source)  # written: the system gives memory at the first touch
    seconds = _timed(lambda: target.add_(source), device)
    return Machine(
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        threads=torch.get_num_threads(),
        dtype=str(dtype).removeprefix("torch."),
        products=products,
        moved=3 * source.nbytes / min(seconds),
    )


def _product(
    rows: int, inputs: int, outputs: int, of_model: bool, *, device: torch.device, dtype: torch.dtype
) -> Product:
    a = torch.ones(rows, inputs, device=device, dtype=dtype)
    b = torch.ones(outputs, inputs, device=device, dtype=dtype)
    result = torch.empty(rows, outputs, device=device, dtype=dtype)
    seconds = _timed(lambda: torch.mm(a, b.t(), out=result), device)
    flops = 2.0 * rows * inputs * outputs
    return Product(rows, inputs, outputs, flops / statistics.median(seconds), flops / min(seconds), of_model)


def _timed(action: Callable[[], Any], device: torch.device) -> list[float]:
    """Seconds of each run, after one that is not counted."""

    def settled() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    action()
    seconds: list[float] = []
    while len(seconds) < LEAST_RUNS or (sum(seconds) < SECONDS and len(seconds) < MOST_RUNS):
        started = settled()
        action()
        seconds.append(settled() - started)
    return seconds
