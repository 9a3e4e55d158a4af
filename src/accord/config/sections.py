"""What the sections of a recipe are made of: the base, the model, the data, and the optimiser's fields.

Sections are frozen pydantic models, each field with the sentence that explains it: the descriptions become `--help`,
the configuration reference and the error messages. Defaults are the vetted recipe. Nothing here imports torch.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

__all__ = [
    "AdapterConfig",
    "DataConfig",
    "ModelConfig",
    "OfflineFields",
    "OptimiserFields",
    "ScratchConfig",
    "Section",
    "Source",
]


class Section(BaseModel):
    """Base of all sections: immutable, and unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False)


class ScratchConfig(Section):
    """A model built from nothing; its tokenizer is trained on the recipe's own text."""

    kind: Literal["llama", "gpt2"] = Field("llama", description="Architecture family.")
    hidden_size: int = Field(128, ge=8, description="Width of the residual stream.")
    layers: int = Field(4, ge=1, description="Number of transformer blocks.")
    heads: int = Field(4, ge=1, description="Attention heads; must divide hidden_size.")
    vocab_size: int = Field(2048, ge=300, description="Size of the byte-level BPE vocabulary.")
    max_positions: int = Field(1024, ge=16, description="Longest sequence in tokens.")


class AdapterConfig(Section):
    """Low-rank adapters: the model's own weights stay as they are, and the reference is the model without adapters."""

    kind: Literal["lora", "dora"] = Field(
        "lora",
        description="`lora` adds a low-rank update to each weight; `dora` also learns the length of each of the "
        "weight's rows, apart from its direction.",
    )
    rank: int = Field(16, ge=1, description="Rank of each adapter's update.")
    ranks: dict[str, Annotated[int, Field(ge=1)]] = Field(
        default_factory=dict,
        description="Ranks other than `rank`, by endings of layers' names, such as `{q_proj: 32, mlp.down_proj: 8}`; "
        "the longest ending that fits counts.",
    )
    alpha: float = Field(32.0, gt=0, description="The update is scaled by alpha / rank, alike for all of `ranks`.")
    targets: tuple[str, ...] = Field(
        (), description="Endings of the names of the linear layers to adapt. Unset: all linear layers of the trunk."
    )


class ModelConfig(Section):
    """The model everything starts from."""

    path: str | None = Field(
        None, description="Folder (or hub id) of a causal language model; `quickstart` is the embedded tiny model."
    )
    scratch: ScratchConfig | None = Field(None, description="Build a model from nothing instead of loading one.")
    template: str = Field(
        "auto",
        description="Chat template: `auto` (the tokenizer's own, else `plain`), `plain`, `raw` (prompt + completion, "
        "no "
        "turns), or the path of a jinja file.",
    )
    layout: Literal["auto", "shared", "plain"] = Field(
        "auto",
        description="`shared` runs each prompt once for all its completions; `plain` is one row a completion; `auto` "
        "shares when it saves work and the start-up self-check proves both agree on this model, and, on a CPU, puts "
        "rows of different lengths one behind another where that costs less than padding them.",
    )
    device: str = Field(
        "auto",
        pattern=r"^(auto|cpu|cuda(:[0-9]+)?)$",
        description="Where models run: `cpu`, `cuda`, `cuda:1`; `auto` is the first GPU where there is one, else the "
        "CPU.",
    )
    precision: Literal["float32", "bfloat16", "float16"] = Field(
        "float32",
        description="Number format of the matrix products: weights, optimiser and losses stay float32. `bfloat16` and "
        "`float16` (with a loss scale) are for GPUs; CPUs are slower with them.",
    )
    attention: Literal["auto", "sdpa", "eager", "flex", "flash"] = Field(
        "auto",
        description="What computes attention: `sdpa` is torch's scaled-dot-product attention, `eager` writes it out, "
        "slowly; on GPUs `flex` (FlexAttention) leaves out what the shared layout's mask hides, and `flash` is the "
        "package flash-attn, for the plain layout. `auto` is `sdpa` on every device, where the architecture has it.",
    )
    activation_checkpointing: bool = Field(
        False,
        description="Keep no activations of the blocks for the backward pass, compute them again: less memory, a third "
        "more arithmetic.",
    )
    offload: bool = Field(
        False,
        description="Reference and reward models wait on the CPU and are on the GPU only while they are asked: less "
        "memory there, and a copy each step.",
    )
    compile: bool = Field(
        False,
        description="Compile the trunk for the passes that train it, with `torch.compile`: minutes at the start, then "
        "faster passes where there are many.",
    )
    compile_sampling: bool = Field(
        False,
        description="Compile the decoding step of stages that learn or choose from their own samples (online methods, "
        "RFT, best-of-n), with `torch.compile`: half a minute at the start, then faster single sequences. Plain Llama, "
        "Qwen2 and Mistral models; others keep their own step, which is said.",
    )
    adapter: AdapterConfig | None = Field(None, description="Train low-rank adapters. Unset: all weights.")
    quantise: Literal["nf4"] | None = Field(
        None,
        description="`nf4` keeps the frozen weights under an adapter in 4 bits (QLoRA); needs `adapter`, and the "
        "package bitsandbytes. Unset: as they are.",
    )
    trainable_blocks: int | None = Field(
        None,
        ge=1,
        description="Train the last k transformer blocks and the final norm; what is below them, and the embeddings, "
        "stay as they are and are shared by policy, reference and value model. Unset: all weights.",
    )


def _source(value: object) -> object:
    return {"path": value} if isinstance(value, str) else value


class Source(Section):
    """One file (or folder of parts) of data; a plain string means its path."""

    path: str = Field(description="File or folder.")
    format: str | None = Field(None, description="Format name; unset = detected and said aloud (`accord data check`).")
    map: dict[str, str] = Field(default_factory=dict, description="Which column holds which field: `field: path`.")
    limit: int | None = Field(None, ge=1, description="Use only the first rows.")


def _sources(value: object) -> object:
    return [value] if isinstance(value, str | dict) else value


Sources = Annotated[tuple[Annotated[Source, BeforeValidator(_source)], ...], BeforeValidator(_sources)]


class DataConfig(Section):
    """Where the text comes from. What a stage lacks is derived from what is there, and said aloud."""

    sft: Sources = Field((), description="Demonstrations for SFT. Unset: the chosen answers of `preferences`.")
    preferences: Sources = Field(
        (),
        description="Pairs, rankings or ratings: for the reward model, DPO, ORPO, KTO and ILQL.",
    )
    prompts: Sources = Field(
        (), description="Prompts for PPO and evaluation. Unset: those of `preferences`, else `sft`."
    )
    ptx: Sources = Field(
        (),
        description="Text that PPO keeps imitating (`ppo.ptx_coef`), as demonstrations or as prompts with completions. "
        "Unset: the demonstrations of `sft`, else of `preferences`.",
    )
    evaluation: Sources = Field((), description="Prompts for evaluation only. Unset: the held-out part of `prompts`.")
    holdout: float = Field(
        0.05,
        ge=0,
        lt=1,
        description="Share of prompts (by a hash of their text, so alike in all files) kept from training.",
    )
    lenient: bool = Field(False, description="Keep the good rows of a file with bad ones, and count the rest.")
    max_tokens: int = Field(1024, ge=8, description="Longest prompt + completion in tokens.")
    max_prompt_tokens: int | None = Field(
        None,
        ge=1,
        description="Longest prompt in tokens; longer ones lose their oldest part, TL;DR prompts the end of their "
        "post. Unset: no limit of its own.",
    )


class OptimiserFields(Section):
    """What every training stage has: optimiser, schedule, batches, checkpoints."""

    optimiser: Literal["adamw", "adamw_8bit"] = Field(
        "adamw",
        description="`adamw`, or `adamw_8bit`: AdamW with moments of 8 bits, which needs the package bitsandbytes.",
    )
    learning_rate: float = Field(2e-5, ge=0, description="Peak learning rate of AdamW.")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "cosine", description="How the learning rate falls after warm-up; linear and cosine end at 0."
    )
    warmup_fraction: float = Field(0.03, ge=0, le=1, description="Share of the steps during which the rate rises.")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's decoupled weight decay, on matrices only.")
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="AdamW's beta1.")
    adam_beta2: float = Field(0.95, ge=0, lt=1, description="AdamW's beta2.")
    adam_epsilon: float = Field(1e-8, gt=0, description="AdamW's epsilon.")
    max_grad_norm: float = Field(
        1.0, gt=0, description="Gradients are scaled down to this global norm; the norm before clipping is logged."
    )
    micro_batch_tokens: int = Field(
        2048,
        ge=16,
        description="Tokens (padding included) per forward pass. Changes memory and speed, not the result; a large GPU "
        "wants 16384.",
    )
    checkpoint_every: int = Field(50, ge=1, description="Steps between checkpoints.")
    keep_checkpoints: int = Field(2, ge=2, description="Newest checkpoints kept; at least 2, one may be damaged.")


class OfflineFields(OptimiserFields):
    """What training on fixed data has besides: how often it goes through the data, and in what batches."""

    epochs: int = Field(1, ge=1, description="Passes over the data.")
    max_steps: int | None = Field(None, ge=1, description="Stop after this many steps, before `epochs` are over.")
    batch_size: int = Field(32, ge=1, description="Prompts per optimiser step.")
    eval_every: int = Field(50, ge=1, description="Steps between evaluations on the held-out part.")
