"""Tiny random models of each architecture, tiny token groups, and a tiny tokenizer: all built on the spot."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from accord.records import TokenCompletion, TokenGroup

VOCABULARY = 53
PAD_ID = 0
EOS_ID = 1
ARCHITECTURES = (
    "llama",
    "qwen2",
    "qwen3",
    "mistral",
    "gemma2",
    "gemma3_text",
    "gpt2",
    "gpt_neox",
    "phi3",
    "gptj",
    "olmo2",
    "opt",
    "cohere",
    "granite",
)

_COMMON = {"vocab_size": VOCABULARY, "pad_token_id": PAD_ID, "eos_token_id": EOS_ID, "bos_token_id": None}
_TRUNK = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
_GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
_CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: hf.LlamaConfig(**_COMMON, **_TRUNK),
    "qwen2": lambda: hf.Qwen2Config(**_COMMON, **_TRUNK),
    "qwen3": lambda: hf.Qwen3Config(**_COMMON, **_TRUNK, head_dim=8),
    "mistral": lambda: hf.MistralConfig(**_COMMON, **_TRUNK, sliding_window=None),
    "gemma2": lambda: hf.Gemma2Config(**_COMMON, **_TRUNK, head_dim=8, final_logit_softcapping=0.5),
    "gemma3_text": lambda: hf.Gemma3TextConfig(**_COMMON, **_TRUNK, head_dim=8, sliding_window=64),
    "gpt2": lambda: hf.GPT2Config(**_COMMON, **_GPT),
    "gpt_neox": lambda: hf.GPTNeoXConfig(
        **_COMMON, **{name: size for name, size in _TRUNK.items() if name != "num_key_value_heads"}
    ),
    "phi3": lambda: hf.Phi3Config(**_COMMON, **_TRUNK),
    "gptj": lambda: hf.GPTJConfig(**_COMMON, **_GPT, rotary_dim=4),
    "olmo2": lambda: hf.Olmo2Config(**_COMMON, **_TRUNK),
    "opt": lambda: hf.OPTConfig(
        **_COMMON,
        hidden_size=32,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        word_embed_proj_dim=24,
    ),
    "cohere": lambda: hf.CohereConfig(**_COMMON, **_TRUNK, logit_scale=0.3),
    "granite": lambda: hf.GraniteConfig(**_COMMON, **_TRUNK, logits_scaling=3.0),
    "bloom": lambda: hf.BloomConfig(**_COMMON, hidden_size=32, n_layer=2, n_head=4),
    "gpt_neo": lambda: hf.GPTNeoConfig(
        **_COMMON,
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        attention_types=[[["global", "local"], 1]],
        max_position_embeddings=64,
    ),
    "mixtral": lambda: hf.MixtralConfig(**_COMMON, **_TRUNK, num_local_experts=4, num_experts_per_tok=2),
    "rwkv": lambda: hf.RwkvConfig(**_COMMON, hidden_size=32, num_hidden_layers=2),
    "mamba": lambda: hf.MambaConfig(**_COMMON, hidden_size=32, num_hidden_layers=2, state_size=4),
}


def tiny_model(architecture: str, *, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any) -> Any:
    """A random causal language model whose weights are large enough for logits to differ by whole nats."""
    config = _CONFIGS[architecture]()
    for name, value in changes.items():
        setattr(config, name, value)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = hf.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.2)
    return model


def uneven_model(architecture: str, *, dtype: torch.dtype = torch.float64, **changes: Any) -> Any:
    """A tiny model with biases that are not zero where there are any, and norms that are not one."""
    made = tiny_model(architecture, dtype=dtype, **changes)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.ndim == 1:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator, dtype=dtype)
    return made


def groups_of(*lengths: tuple[int, tuple[int, ...]]) -> list[TokenGroup]:
    """A group of random tokens for each (tokens of the prompt, tokens of its completions); all of them count."""
    numbers = torch.Generator().manual_seed(1)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, VOCABULARY, (count,), generator=numbers).tolist())

    return [
        TokenGroup(ids(prompt), tuple(TokenCompletion(ids(n), (True,) * n) for n in completions))
        for prompt, completions in lengths
    ]


def first_counts(group: TokenGroup) -> tuple[TokenGroup, set[int]]:
    """The group with nothing but its first completion in a loss, and the tokens that its gradient reaches; the other
    completions are of the last token of the vocabulary."""
    first, *others = group.completions
    last = [TokenCompletion((VOCABULARY - 1,) * len(c.ids), (False,) * len(c.ids)) for c in others]
    return TokenGroup(group.prompt_ids, (first, *last)), {*group.prompt_ids, *first.ids[:-1]}


def reached_tokens(model: Any) -> set[int]:
    """The tokens whose embeddings have a gradient."""
    gradient = model.get_input_embeddings().weight.grad
    return {i for i in range(VOCABULARY) if gradient[i].any()}


def token_group(prompt: str, *completions: str) -> TokenGroup:
    """A group from letters, one token each (a = 2); a capital letter's token does not count in the loss."""
    return TokenGroup(
        tuple(_token(letter) for letter in prompt),
        tuple(TokenCompletion(tuple(map(_token, text)), tuple(map(str.islower, text))) for text in completions),
    )


def _token(letter: str) -> int:
    return ord(letter.lower()) - ord("a") + 2


def word_tokenizer() -> Any:
    """A word-level tokenizer of `VOCABULARY` tokens w2 ... w51, with a chat template."""
    words = {"<pad>": PAD_ID, "<eos>": EOS_ID, "<unk>": VOCABULARY - 1} | {f"w{i}": i for i in range(2, VOCABULARY - 1)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    fast = hf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="right"
    )
    fast.chat_template = "{% for message in messages %}{{ message.content }} {% endfor %}"
    return fast
