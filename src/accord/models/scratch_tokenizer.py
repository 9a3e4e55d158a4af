"""A tokenizer trained on the spot, for models that start from nothing.

Byte-level BPE: any text, in any script, comes back byte for byte, and there is no unknown token.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from accord.errors import ConfigError
from accord.records import ROLES

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = ["SCRATCH_TEMPLATE", "SPECIAL_TOKENS", "train_tokenizer"]

PAD = "<pad>"
EOS = "<eos>"
SPECIAL_TOKENS = (PAD, EOS, *(f"<|{role}|>" for role in ROLES))
NUM_BYTES = 256

# A turn is its role's marker, its content and <eos>, so the end of a turn and the end of a text are one token: what a
# model learns from plain texts about stopping carries over to dialogues.
SCRATCH_TEMPLATE = (
    "{% for message in messages %}"
    f"{{% if message['role'] not in {list(ROLES)} %}}"
    f"{{{{ raise_exception('roles are {', '.join(ROLES)}, not ' + message['role']) }}}}"
    "{% endif %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + eos_token }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def train_tokenizer(texts: Iterable[str], *, vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE tokenizer with a turn template, the same for the same texts in any order.

    `pad_token` and `eos_token` differ on purpose: with one token for both, masking the padding masks the end of
    every answer, and the model never learns to stop.

    Args:
        texts: what the merges are learnt from.
        vocab_size: all tokens: the 256 bytes, the special tokens and the merges. Texts with little repetition give
            fewer merges, hence a smaller vocabulary: read it from `len(tokenizer)`.
    Raises: ConfigError when `vocab_size` has no room for the bytes and the special tokens.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    smallest = NUM_BYTES + len(SPECIAL_TOKENS)
    if vocab_size < smallest:
        raise ConfigError(
            f"vocab_size is {vocab_size}, but the {NUM_BYTES} bytes and {len(SPECIAL_TOKENS)} special tokens already "
            f"take {smallest}. Set it to {smallest} or more."
        )
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        eos_token=EOS,
        extra_special_tokens=[token for token in SPECIAL_TOKENS if token not in (PAD, EOS)],
        chat_template=SCRATCH_TEMPLATE,
    )
