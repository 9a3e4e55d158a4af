"""Tokenizers and chat templates for tests, written here in the manner of the common model families."""

from __future__ import annotations

import json
from functools import cache

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from accord.models.scratch_tokenizer import train_tokenizer

TEXTS = [
    "the answer is a question of the right words, and the question is what the answer is\n\n",
    "one two three",
    "one\n\n\n\n",
    "user assistant system",
] * 30

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|header|>' + m.role + '<|end_header|>\n\n' + m.content | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|header|>assistant<|end_header|>\n\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role != ('user' if loop.index0 is even else 'assistant') %}"
    "{{ raise_exception('roles must alternate user and assistant') }}{% endif %}"
    "{{ '[INST] ' + m.content + ' [/INST]' if m.role == 'user' else ' ' + m.content + eos_token }}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{% set role = 'model' if m.role == 'assistant' else m.role %}"
    "{{ '<start_of_turn>' + role + '\n' + m.content | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
# With the generation blocks that say which text is the assistant's.
GENERATION = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Closes the whole dialogue with EOS when no answer is asked for.
PHI = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{{ '<|im_start|>assistant\n' if add_generation_prompt else eos_token }}"
)
# Writes an empty thought before the last answer, and drops the thoughts of earlier turns.
STRIPPING = (
    "{% for m in messages %}{% set text = m.content %}{% if m.role == 'assistant' %}"
    "{% if not loop.last %}{% set text = text.split('</think>')[-1] %}"
    "{% elif '<think>' not in text %}{% set text = '<think></think>' + text %}{% endif %}{% endif %}"
    "{{ '<|im_start|>' + m.role + '\n' + text + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Ends no turn with a token.
ENDLESS = (
    "{% for m in messages %}{{ '## ' + m.role + '\n' + m.content + '\n\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '## assistant\n' }}{% endif %}"
)
# Asks for an answer with an open thought that no answer has.
FORCED_THOUGHT = CHATML.replace("assistant\n' }}{% endif", "assistant\n<think>' }}{% endif")

SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|header|>", "<|end_header|>", "<|eot_id|>"]
SPECIAL += ["[INST]", "[/INST]", "<start_of_turn>", "<end_of_turn>"]


@cache
def _trained() -> PreTrainedTokenizerFast:
    return train_tokenizer(TEXTS, vocab_size=360)


def byte_tokenizer(template: str | None = None, *, add_bos: bool = False) -> PreTrainedTokenizerFast:
    """Byte-level BPE with the control tokens of all families; <think>, </think> and two newlines are not special."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_trained().backend_tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens=SPECIAL,
        chat_template=template,
        add_bos_token=add_bos,
    )
    tokenizer.add_tokens(["<think>", "</think>", "\n\n"])
    return tokenizer


@cache
def _trained_with_prefix() -> Tokenizer:
    before = pre_tokenizers.Metaspace(prepend_scheme="always")
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.pre_tokenizer = before
    trained.train_from_iterator(TEXTS, trainers.BpeTrainer(special_tokens=["<unk>"], show_progress=False))
    model = json.loads(trained.to_str())["model"]
    letters = [*model["vocab"], *(f"<0x{byte:02X}>" for byte in range(256))]
    vocab = {letter: number for number, letter in enumerate(letters)}
    merges = [tuple(merge) for merge in model["merges"]]
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True))
    backend.pre_tokenizer = before
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return backend


def prefix_tokenizer(template: str | None = None) -> PreTrainedTokenizerFast:
    """BPE in the manner of SentencePiece: a space is put in front of every text, BOS too, unknown letters are bytes."""
    return PreTrainedTokenizerFast(
        tokenizer_object=_trained_with_prefix(),
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens=SPECIAL,
        chat_template=template,
        add_bos_token=True,
    )
