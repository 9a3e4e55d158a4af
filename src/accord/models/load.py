"""Loading, building and saving models: the policy, the reward model made from it, the value model made from that.

Weights are read and written as safetensors alone: other weight files can run code when opened. Dropout is off in every
model: importance ratios compare two passes over the same tokens, which dropout would make differ.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPT2Config,
    LlamaConfig,
)
from transformers.utils import logging as transformers_logging

from accord.atomic import new_folder
from accord.errors import ConfigError
from accord.models.adapters import bare_trunk
from accord.models.attention import set_attention
from accord.models.heads import average_heads, fill_head, scalar_head, score_head
from accord.models.paths import check_model_path
from accord.models.sharing import sharing_copy

__all__ = [
    "ModelShape",
    "build_model",
    "fresh_value_model",
    "load_policy",
    "load_reward_model",
    "load_tokenizer",
    "reward_model_from",
    "save_model",
    "unread_tensors",
    "value_head",
    "value_model_from",
]

# Accord shows the progress of a stage; bars for reading and writing files would tear it apart.
transformers_logging.disable_progress_bar()


@dataclass(frozen=True, slots=True)
class ModelShape:
    """The shape of a model built from nothing. `intermediate_size` None = 4 (gpt2) or 8/3 (llama) times the hidden."""

    hidden_size: int
    layers: int
    heads: int
    max_positions: int
    kind: Literal["llama", "gpt2"] = "llama"
    intermediate_size: int | None = None

    def __post_init__(self) -> None:
        if self.hidden_size % (2 * self.heads):
            raise ConfigError(
                f"hidden_size {self.hidden_size} does not divide into {self.heads} heads of an even size; "
                f"choose a multiple of {2 * self.heads}"
            )


def build_model(shape: ModelShape, *, vocab_size: int, pad_id: int, eos_id: int, seed: int) -> Any:
    """A causal language model with random weights that depend on the arguments alone; embeddings are tied."""
    common: dict[str, Any] = {
        "vocab_size": vocab_size,
        "pad_token_id": pad_id,
        "eos_token_id": eos_id,
        "bos_token_id": None,
        "tie_word_embeddings": True,
    }
    if shape.kind == "gpt2":
        config = GPT2Config(
            n_embd=shape.hidden_size,
            n_layer=shape.layers,
            n_head=shape.heads,
            n_positions=shape.max_positions,
            n_inner=shape.intermediate_size,
            **common,
        )
    else:
        config = LlamaConfig(
            hidden_size=shape.hidden_size,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            max_position_embeddings=shape.max_positions,
            intermediate_size=shape.intermediate_size or _round_up(shape.hidden_size * 8 // 3, 16),
            **common,
        )
    _without_dropout(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def load_policy(
    path: str | Path, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> tuple[Any, Any]:
    """(causal language model on `device`, tokenizer) from a folder or a hub name, without dropout, in evaluation mode.

    The tokenizer comes with a padding token other than its end token: were they one, plain transformers would score a
    finished answer as if its end were missing.
    """
    return _load(AutoModelForCausalLM, path, dtype, device)


def load_reward_model(
    path: str | Path, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> tuple[Any, Any]:
    """(sequence classification model with one output or an ensemble's K, tokenizer), as `load_policy`.

    Transformers' classifiers have a head without bias; a bias in the folder's files (see `value_head`) gets its place.
    """
    bias = _stored(Path(path), "score.bias")
    with nullcontext() if bias is None else unread_tensors():
        model, tokenizer = _load(AutoModelForSequenceClassification, path, dtype, device)
    head = score_head(model)
    if bias is not None and head.bias is None:
        head.bias = nn.Parameter(bias.to(head.weight))
    return model, tokenizer


def load_tokenizer(path: str | Path) -> Any:
    """A model's tokenizer, with a padding token as in `load_policy`."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    _choose_padding(tokenizer)
    return tokenizer


def reward_model_from(policy: Any, seed: int, *, heads: int = 1) -> Any:
    """A reward model: a copy of the policy's trunk under fresh heads, a random start for each (see `fill_head`).

    What the policy does not train is shared instead of copied. Of one with an adapter it is the trunk without it.
    """
    config = copy.deepcopy(policy.config)
    config.num_labels = heads
    config.problem_type = "regression"
    config.architectures = None
    with torch.device("meta"):  # no memory: the trunk is the policy's
        try:
            model = AutoModelForSequenceClassification.from_config(config, dtype=policy.dtype)
        except ValueError as error:
            raise ConfigError(
                f"{type(policy).__name__} has no sequence-classification kind in transformers, so no reward model can "
                "be made from it; use another architecture (llama, qwen, mistral, gemma, phi, olmo, gpt2, ...)"
            ) from error
    setattr(model, model.base_model_prefix, bare_trunk(policy))
    score_head(model).to_empty(device=policy.device)
    fill_head(model, seed)
    return model.eval()


def fresh_value_model(policy: Any) -> Any:
    """A value model that knows nothing yet: a copy of the policy's trunk under a head of zeros.

    It predicts 0 everywhere. A random head's predictions would enter the advantages, and the policy would follow that
    noise until the value model has unlearned it.
    Source: the code of Ziegler et al. 2019, arXiv:1909.08593. Departures: a trunk of its own.
    """
    model = reward_model_from(policy, seed=0)
    with torch.no_grad():
        scalar_head(model).weight.zero_()
    return model


def value_head(policy: Any) -> nn.Linear:
    """A head for values on the policy's own trunk, of zeros for the reason given at `fresh_value_model`."""
    width = policy.config.get_text_config().hidden_size
    head = nn.Linear(width, 1, bias=False, device=policy.device, dtype=policy.dtype)
    nn.init.zeros_(head.weight)
    return head


def value_model_from(reward_model: Any, *, sharing: bool = False) -> Any:
    """A value model that starts as the reward model (as the mean of its heads): an independent copy, all trainable; or,
    `sharing`, one that has the reward model's own frozen parameters and trains copies of the others."""
    model = sharing_copy(reward_model) if sharing else copy.deepcopy(reward_model).requires_grad_(True)
    average_heads(model)
    model.zero_grad(set_to_none=True)
    return model


def save_model(
    model: Any, tokenizer: Any, folder: str | Path, *, stop_ids: Sequence[int] = (), card: str | None = None
) -> Path:
    """Writes model and tokenizer as a Hugging Face folder, whole or not at all; replaces `folder` if it exists.

    Everything is written beside the folder, flushed to the disk, and renamed into place. `stop_ids` are the tokens
    plain transformers shall stop at when it generates (a chat's end of turn may be another token than the tokenizer's
    EOS); `card` is the text of the model card, README.md.
    """
    folder = Path(folder).absolute()
    model.config.pad_token_id = tokenizer.pad_token_id
    if stop_ids:
        model.generation_config.eos_token_id = list(stop_ids)
        model.generation_config.pad_token_id = tokenizer.pad_token_id
    with new_folder(folder) as partial:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        if card is not None:
            (partial / "README.md").write_text(card, encoding="utf-8")
    return folder


def _load(kind: Any, path: str | Path, dtype: torch.dtype, device: torch.device | str) -> tuple[Any, Any]:
    check_model_path(path)
    try:
        config = AutoConfig.from_pretrained(path)
        tokenizer = load_tokenizer(path)
        _without_dropout(config)
        config.pad_token_id = tokenizer.pad_token_id
        model, report = kind.from_pretrained(
            path, config=config, dtype=dtype, use_safetensors=True, output_loading_info=True
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise ConfigError(
            f"cannot load a model from {str(path)!r}: {_first_sentence(error)} Expected a folder with config.json, "
            "*.safetensors and a tokenizer, or the name of a model on the Hugging Face hub that is already downloaded "
            "or can be reached"
        ) from error
    set_attention(model)
    missing = sorted(report["missing_keys"])
    if missing:
        raise ConfigError(
            f"{path} lacks {len(missing)} of the weights of {type(model).__name__}, such as {missing[0]!r}: "
            f"it holds {config.architectures}; name a model of the kind this setting expects"
        )
    if "score.weight" in report["unexpected_keys"]:
        raise ConfigError(f"{path} holds a reward model, {config.architectures}; expected a language model")
    rows = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > rows:
        raise ConfigError(
            f"{path}: the tokenizer has {len(tokenizer)} tokens but the model's vocabulary {rows}: they do not belong "
            "together; save model and tokenizer to one folder"
        )
    return model.eval().to(device), tokenizer


@contextmanager
def unread_tensors() -> Iterator[None]:
    """Files hold tensors that transformers has no place for, and that is known: it need not warn of them."""
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)


def _stored(folder: Path, name: str) -> Tensor | None:
    """A tensor of a model folder's files, by name; None where there is none."""
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            if name in tensors.keys():
                return tensors.get_tensor(name)
    return None


def _first_sentence(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text.split(". ")[0].rstrip(".") + "."


def _without_dropout(config: Any) -> None:
    """Sets every dropout rate of a configuration to 0; their names differ, but `drop` is in all of them."""
    for name, value in vars(config).items():
        if "drop" in name and isinstance(value, float):
            setattr(config, name, 0.0)


def _choose_padding(tokenizer: Any) -> None:
    """Gives the tokenizer a padding token other than its end token: one meant for padding, else the unknown token, else
    the last of the vocabulary. Any token will do: padding is masked everywhere."""
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id != tokenizer.eos_token_id:
        return
    named = [t.content for _, t in sorted(tokenizer.added_tokens_decoder.items()) if "pad" in t.content.lower()]
    by_id = sorted(tokenizer.get_vocab().items(), key=lambda item: -item[1])
    candidates = [*named, tokenizer.unk_token, *(token for token, _ in by_id[:2])]
    tokenizer.pad_token = next(token for token in candidates if token is not None and token != tokenizer.eos_token)


def _round_up(value: int, step: int) -> int:
    return -(-value // step) * step
