"""Reference log-probabilities of fixed completions: computed once, kept on disk, and used by every run that needs them.

What is kept is one number for each completion: the sum of its counted tokens' log-probabilities, at temperature 1. Its
key is a hash of the prompt's tokens, the completion's tokens and their mask; reference weights, the model's settings,
its number format and the kind of device say which folder the numbers are in. So runs share what they have in common,
whatever their seed, their held-out share, their length limits, or the method: pairs that DPO has read are read by KTO
one by one, and a file that grew costs its new rows only.

    <folder>/<identity>/<sha256 of the content>.safetensors     keys (N, 32) bytes, logprobs (N,) float32

Files are never changed, only added, each named by its content: a damaged one is known by its name, and processes that
write at once do not disturb each other. Nothing is ever cleared; the cache may be deleted at any time.

A number's last bits depend on what was computed beside it, and so on what the cache held. A run must not: it keeps all
numbers that it uses in its own folder before its first step, and reads those when it continues. (So two runs of one
recipe agree to the bit when the cache held the same at their start.)
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from safetensors.torch import load, save
from torch import Tensor

from accord.atomic import cache_folder as cached
from accord.atomic import make_folder, write_bytes
from accord.errors import AccordError, TrainingError
from accord.methods.offline import sequence_logprobs
from accord.models.attention import chosen_attention
from accord.models.layout import Layout
from accord.models.memory import MicroBatches
from accord.models.precision import reading_dtype
from accord.models.quantise import is_quantised
from accord.phases import phase
from accord.records import TokenCompletion, TokenGroup
from accord.training.progress import StageProgress

__all__ = ["cache_folder", "reference_logprobs"]

FORMAT = 1
KEY_BYTES = 32
GROUPS_AT_ONCE = 512  # what a kill can cost
PATIENCE_SECONDS = 10.0  # work that takes longer gets a bar

Say = Callable[[str], None]
Values = dict[bytes, float]


def cache_folder() -> Path:
    """Where numbers are kept for other runs."""
    return cached("reference-logprobs")


def reference_logprobs(
    model: Any,
    groups: Sequence[TokenGroup],
    *,
    weights: str,
    layout: Layout,
    budget: int,
    pad_id: int,
    kept: Path,
    cache: Path,
    console: Console,
    say: Say,
) -> Tensor:
    """(C,) float32 log-probability of every completion's counted tokens, nats, summed, in the groups' order.

    Args:
        model: the reference: the policy before its training, or with its adapters off. Not run when all is known.
        weights: content hash of the reference's weights.
        layout, budget: how the passes are made; they change rounding alone, and no number that was kept.
        kept: a folder of this run; what is there comes first, and everything returned is there afterwards.
        cache: a folder shared by runs (`cache_folder`); that it cannot be written is said, and no error.
    Raises: TrainingError for a log-probability that is not finite; AccordError when `kept` cannot be written.
    """
    identity = _identity(model, weights)
    own, shared = kept / identity, cache / identity
    keys = [key for group in groups for key in _keys(group)]
    values = _read(own, set(keys), say)
    found = _read(shared, set(keys) - values.keys(), say)
    _write(own, found)
    values |= found
    known = len(values)
    missing = _missing(groups, values)
    chunks = [missing[i : i + GROUPS_AT_ONCE] for i in range(0, len(missing), GROUPS_AT_ONCE)]
    passes = MicroBatches(budget)
    with ExitStack() as stack:
        bar: StageProgress | None = None
        for index, chunk in enumerate(chunks):
            started = time.monotonic()
            new = _computed(model, chunk, layout, passes, pad_id)
            for note in passes.notes():
                say(note)
            _write(own, new)
            _share(shared, new, say)
            values |= new
            if bar is not None:
                bar.advance()
            elif index == 0 and (time.monotonic() - started) * (len(chunks) - 1) > PATIENCE_SECONDS:
                bar = stack.enter_context(StageProgress(console, "reference", len(chunks), done=1))
    say(
        f"reference log-probabilities: {len(values) - known:,} computed, {len(found):,} from the cache {cache}"
        + (f", {known - len(found):,} kept by this run" if known > len(found) else "")
    )
    return torch.tensor([values[key] for key in keys], dtype=torch.float32)


def _identity(model: Any, weights: str) -> str:
    """What a number depends on besides its tokens. A configuration may change without the weights (say, a RoPE base), a
    hub id may come to mean another commit, and the kind of device stands for its arithmetic."""
    config = model.config.to_dict()
    for bookkeeping in ("transformers_version", "_name_or_path"):
        config.pop(bookkeeping, None)
    settings = json.dumps(config, sort_keys=True, default=str)
    commit = getattr(model.config, "_commit_hash", None)
    parts = [FORMAT, weights, commit, settings, str(reading_dtype() or model.dtype), model.device.type]
    if is_quantised(model):
        parts.append("nf4")
    if chosen_attention() != "auto":
        parts.append(chosen_attention())
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def _keys(group: TokenGroup) -> list[bytes]:
    """One key for each completion."""
    prompt = hashlib.sha256(_bytes(group.prompt_ids)).digest()
    return [hashlib.sha256(prompt + _bytes(c.ids) + bytes(c.mask)).digest() for c in group.completions]


def _bytes(ids: tuple[int, ...]) -> bytes:
    return np.array(ids, dtype="<i8").tobytes()


def _missing(groups: Sequence[TokenGroup], values: Mapping[bytes, float]) -> list[TokenGroup]:
    """The groups with their unknown completions alone, each once."""
    seen: set[bytes] = set()
    missing: list[TokenGroup] = []
    for group in groups:
        unknown: list[TokenCompletion] = []
        for key, completion in zip(_keys(group), group.completions, strict=True):
            if key not in values and key not in seen:
                unknown.append(completion)
                seen.add(key)
        if unknown:
            missing.append(replace(group, completions=tuple(unknown)))
    return missing


@phase("reference")
def _computed(model: Any, groups: Sequence[TokenGroup], layout: Layout, passes: MicroBatches, pad_id: int) -> Values:
    numbers = passes.attempt(
        lambda tokens: sequence_logprobs(model, groups, layout=layout, pad_id=pad_id, budget=tokens).tolist()
    )
    keys = [key for group in groups for key in _keys(group)]
    origins = [group.origin for group in groups for _ in group.completions]
    for number, origin in zip(numbers, origins, strict=True):
        if not math.isfinite(number):
            raise TrainingError(
                f"the reference gives a completion{f' of {origin}' if origin else ''} the log-probability {number}: "
                "its weights are damaged, or its number format is too narrow for them"
            )
    return dict(zip(keys, numbers, strict=True))


def _read(folder: Path, wanted: Collection[bytes], say: Say) -> Values:
    """The wanted values a folder has. A damaged file is removed, and said: what it held is computed again."""
    found: Values = {}
    for path in sorted(folder.glob("*.safetensors")) if wanted else ():
        try:
            content = path.read_bytes()
            if hashlib.sha256(content).hexdigest() != path.stem:
                say(f"{path} is damaged and is removed; what it held is computed again")
                path.unlink()
                continue
        except OSError as error:
            say(f"{path} cannot be used: {error.strerror}; what it holds is computed again")
            continue
        tensors = load(content)
        keys = tensors["keys"].numpy().tobytes()
        for index, number in enumerate(tensors["logprobs"].tolist()):
            key = keys[index * KEY_BYTES : (index + 1) * KEY_BYTES]
            if key in wanted:
                found.setdefault(key, number)
    return found


def _write(folder: Path, values: Values) -> None:
    """Adds a file with these values, whole or not at all. Raises AccordError when the disk refuses."""
    if not values:
        return
    keys = np.frombuffer(b"".join(values), dtype=np.uint8).reshape(-1, KEY_BYTES).copy()
    content = save({"keys": torch.from_numpy(keys), "logprobs": torch.tensor(list(values.values()))})
    try:
        make_folder(folder)
    except OSError as error:
        raise AccordError(f"cannot make the folder {folder}: {error.strerror}") from error
    write_bytes(folder / f"{hashlib.sha256(content).hexdigest()}.safetensors", content)


def _share(folder: Path, values: Values, say: Say) -> None:
    try:
        _write(folder, values)
    except AccordError as error:
        say(f"other runs will compute these reference log-probabilities again: {error}")
