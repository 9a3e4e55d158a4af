"""Messages to token ids, for any chat template, with one rule for generation and for training.

A rendered dialogue is cut where each assistant turn begins (what the template writes as its generation prompt) and
where it ends (just after its end-of-turn token), and the parts are tokenised one by one. So the ids a sampler is given
are, by construction, the ids in front of the same answer in training, and a token never straddles the boundary.

Left out: tools, images and documents; a message is a role and a text.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from accord.errors import ConfigError, DataError
from accord.records import Message, TokenCompletion

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["PLAIN_TEMPLATE", "RAW_TEMPLATE", "Template"]

# Readable by people and by any base model; the header is text, only the end of an assistant turn is a token.
PLAIN_TEMPLATE = (
    "{% for message in messages %}"
    "{{ message['role'] | capitalize + ': ' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{{ '\\n\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)

# No turns at all: the prompt's text, the completion's text, the end-of-text token.
RAW_TEMPLATE = (
    "{% for message in messages %}"
    "{{ message['content'] }}{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}"
)

OWN_TEMPLATES = {"plain": PLAIN_TEMPLATE, "raw": RAW_TEMPLATE}
PRIVATE_USE = range(0xE000, 0xF900)
PROBE = "an answer to find again"
RENDERED = 64  # texts kept


class _Chat(NamedTuple):
    """Messages as templates take them. `mark` breaks look-alikes of control tokens apart; "" when there are none."""

    messages: list[dict[str, str]]
    mark: str


class _Answer(NamedTuple):
    """Where one assistant turn lies in a rendered dialogue, as character offsets."""

    index: int
    start: int
    end: int


class Template:
    """A tokenizer together with the chat template all its prompts and answers go through.

    `stop_ids` are the tokens a sampler must stop at: the template's end of turn first, then the tokenizer's EOS if that
    is another one.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, source: str, name: str) -> None:
        """`Template.of` is the usual way in; this one takes the jinja `source` and the `name` for messages."""
        self.tokenizer = tokenizer
        self._backend = _backend(tokenizer)
        self.name = name
        self.source = source
        self._special_tokens: dict[str, Any] = tokenizer.special_tokens_map
        # The same turns are rendered for the prompt, for each answer, and to find where an answer stands.
        self._rendered = lru_cache(maxsize=RENDERED)(self._render_turns)
        self._anchors = self._anchors_needed()
        self._lead, tail = self._probe()
        self._tail_space = tail[len(tail.rstrip()) :]
        self._stops = self._stop_tokens(tail)
        self.stop_ids = tuple(_token_id(tokenizer, stop) for stop in self._stops)
        special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        self._assistant_controls = _look_alikes(special.union(self._stops))
        # Tokens such as <think> are not special, and a model writes them. A user's <think> stays text.
        self._other_controls = _look_alikes(special.union(self._stops, self._added_tokens_in(source)))

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, choice: str = "auto") -> Template:
        """The template a configuration names, installed in the tokenizer so that it is saved with the model.

        Args:
            choice: "auto" (the tokenizer's own, else plain), "plain", "raw", or the path of a jinja file.
        Raises: ConfigError for a file that cannot be read, and for a template that cannot render one question and one
            answer, or whose generation prompt is not how the answer begins.
        """
        if choice == "auto" and tokenizer.chat_template is not None:
            return cls(tokenizer, tokenizer.get_chat_template(), "tokenizer's own")
        name = "plain" if choice == "auto" else choice
        source = _with_bos(tokenizer, OWN_TEMPLATES[name]) if name in OWN_TEMPLATES else _read(Path(name))
        template = cls(tokenizer, source, name)
        tokenizer.chat_template = source
        return template

    @property
    def pad_id(self) -> int:
        """The token that fills rows; masked everywhere."""
        pad_id = self.tokenizer.pad_token_id
        assert isinstance(pad_id, int)
        return pad_id

    def prompt_ids(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """What the model is given before it writes its answer, generation prompt included.

        Never empty: where nothing is written before the answer, the start token is given (BOS, or EOS without one).
        Raises: DataError when the template refuses the messages.
        """
        chat = self._chat(messages)
        text = self._render(chat.messages, generation=True)
        ids: list[int] = []
        position = 0
        for answer in self._answers(chat.messages, text, first=0):
            ids += self._encode(text, position, answer.start, chat.mark)
            ids += self._encode(text, answer.start, answer.end, chat.mark)
            position = answer.end
        ids += self._encode(text, position, len(text), chat.mark)
        return tuple(ids) or (_token_id(self.tokenizer, self.tokenizer.bos_token or self._stops[-1]),)

    def completion(self, prompt: Sequence[Message], messages: Sequence[Message]) -> TokenCompletion:
        """The tokens after `prompt_ids(prompt)`, up to the end-of-turn token of the last assistant turn.

        The mask is True on what the assistant wrote, its end of turn included, in turns with `learn`; it is False on
        the turns of others and on all the template writes between turns. A template that ends answers with no token
        gets EOS after the last one.

        Raises: DataError when the template refuses the messages, when they do not begin with an assistant turn, or
            when an assistant turn is not found as it was written (see `keeps_turns`).
        """
        if not messages or messages[0].role != "assistant":
            raise DataError(
                f"a completion begins with {messages[0].role if messages else 'nothing'}: expected an assistant turn. "
                "Move the turns before the first answer into the prompt."
            )
        dialogue = (*prompt, *messages)
        chat = self._chat(dialogue)
        text = self._render(chat.messages, generation=False)
        answers = self._answers(chat.messages, text, first=len(prompt))
        if len(answers) < sum(message.role == "assistant" for message in messages):
            raise DataError(
                f"the {self.name} chat template renders an assistant turn differently later on (it rewrites or drops "
                "earlier text), so its tokens cannot be told. Use one answer per example, or template plain."
            )
        ids: list[int] = []
        mask: list[bool] = []
        position = answers[0].start
        for answer in answers:
            between = self._encode(text, position, answer.start, chat.mark)
            written = self._encode(text, answer.start, answer.end, chat.mark)
            if answer is answers[-1] and not text.endswith(self._stops, answer.start, answer.end):
                written.append(self.stop_ids[0])
            ids += between + written
            mask += [False] * len(between) + [dialogue[answer.index].learn] * len(written)
            position = answer.end
        return TokenCompletion(tuple(ids), tuple(mask))

    def between(self, prompt: Sequence[Message], messages: Sequence[Message]) -> tuple[int, ...]:
        """The tokens between the last answer of `messages`, which follow `prompt`, and the answer to come: the end of
        that turn, the turns behind it, and the generation prompt.

        They are those that `completion` puts there, so a conversation that is sampled turn by turn has the tokens it
        would be read with as an example.

        Raises: DataError when the template refuses the turns, or renders an earlier answer differently from now on.
        """
        chat = self._chat((*prompt, *messages))
        text = self._render(chat.messages, generation=True)
        answers = self._answers(chat.messages, text, first=len(prompt))
        if len(answers) < sum(message.role == "assistant" for message in messages):
            raise DataError(
                f"the {self.name} chat template renders an earlier answer differently once the conversation goes on, "
                "so it is no single sequence of tokens. Use template plain."
            )
        return tuple(self._encode(text, answers[-1].end, len(text), chat.mark))

    def keeps_turns(self, prompt: Sequence[Message], messages: Sequence[Message]) -> bool:
        """Whether every assistant turn of `messages` stays as it was written while the dialogue goes on.

        False for templates that, for example, drop the reasoning of earlier turns: such a dialogue is not one sequence
        of tokens, and each of its answers has to be learnt from a rendering of its own.
        """
        if len(messages) == 1:
            return True
        chat = self._chat((*prompt, *messages)).messages
        answers = self._answers(chat, self._render(chat, generation=False), first=len(prompt))
        return len(answers) == sum(message.role == "assistant" for message in messages)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of one sampled answer: up to its first stop token, without special tokens and the template's own
        lead-in (such as the space between "Assistant:" and the answer)."""
        end = next((i for i, token in enumerate(ids) if token in self.stop_ids), len(ids))
        front = self._anchors[0][1] if self._anchors else []
        text = self._decode_ids([*front, *ids[:end]])[len(self._decode_ids(front)) :]
        return text.removeprefix(self._lead)

    def token_texts(self, ids: Sequence[int]) -> tuple[str, ...]:
        """The text of each token by itself; special tokens, the end too, are the text that stands for them. A token
        that is only a part of a character is U+FFFD."""
        decode = self.tokenizer.decode
        return tuple(str(decode([token], clean_up_tokenization_spaces=False)) for token in ids)

    def _decode_ids(self, ids: list[int]) -> str:
        text = self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text

    def _probe(self) -> tuple[str, str]:
        """What the template writes in an assistant turn before and after its content, from one question and answer."""
        question = {"role": "user", "content": "a question"}
        try:
            head = self._render([question], generation=True)
            body = self._render([question, {"role": "assistant", "content": PROBE}], generation=False)
        except DataError as error:
            raise ConfigError(f"{error} It must render a user turn followed by an assistant turn.") from error
        if not body.startswith(head) or PROBE not in body[len(head) :]:
            raise ConfigError(
                f"The {self.name} chat template does not begin an answer with its generation prompt: it asks for one "
                f"with {head[-60:]!r} but renders it as {body[-120:]!r}, so the prompt of generation cannot be the "
                "prompt of training. Use template plain, or a jinja file where both agree."
            )
        lead, _, tail = body[len(head) :].partition(PROBE)
        return lead, tail

    def _added_tokens_in(self, text: str) -> list[str]:
        """Added tokens that `text` writes, in order. Runs of white space are text in any tokenizer, added or not."""
        added = [token.content for token in self.tokenizer.added_tokens_decoder.values()]
        return sorted((token for token in added if token in text and not token.isspace()), key=text.find)

    def _stop_tokens(self, tail: str) -> tuple[str, ...]:
        """The token that ends a turn in the text behind an answer, then EOS; without such a token, EOS alone."""
        eos = [str(self.tokenizer.eos_token)] if self.tokenizer.eos_token_id is not None else []
        stops = tuple(dict.fromkeys([*self._added_tokens_in(tail)[:1], *eos]))
        if not stops:
            raise ConfigError(
                f"With the {self.name} chat template an answer has no end: the tokenizer has no EOS token, and the "
                "template writes no token after an answer. Set the tokenizer's eos_token."
            )
        return stops

    def _chat(self, messages: Sequence[Message]) -> _Chat:
        """Break every look-alike of a control token after its first character, with a character found nowhere else.

        The parts are tokenised apart, so no control token can come of them, whatever the tokenizer does with added
        tokens; the rest of the content is untouched and stays visible to the template.
        """
        for message in messages:
            _require_characters(message)
        patterns = [
            self._assistant_controls if message.role == "assistant" else self._other_controls for message in messages
        ]
        mark = ""
        if any(pattern.search(message.content) for pattern, message in zip(patterns, messages, strict=True)):
            text = "".join(message.content for message in messages)
            mark = next((chr(code) for code in PRIVATE_USE if chr(code) not in text), "")
            if not mark:
                raise DataError("the text uses every private-use character, so none is left to protect it with.")
        return _Chat(
            [
                {"role": message.role, "content": pattern.sub(rf"\1{mark}", message.content)}
                for pattern, message in zip(patterns, messages, strict=True)
            ],
            mark,
        )

    def _render(self, messages: list[dict[str, str]], *, generation: bool) -> str:
        return self._rendered(tuple((message["role"], message["content"]) for message in messages), generation)

    def _render_turns(self, turns: tuple[tuple[str, str], ...], generation: bool) -> str:
        import jinja2
        from transformers.utils.chat_template_utils import render_jinja_template

        messages = [{"role": role, "content": content} for role, content in turns]
        try:
            # Not `apply_chat_template`: that one refuses an empty prompt, which raw text has.
            rendered, _ = render_jinja_template(
                [messages],
                chat_template=self.source,
                add_generation_prompt=generation,
                **self._special_tokens,
            )
        except (jinja2.TemplateError, TypeError) as error:
            roles = ", ".join(message["role"] for message in messages) or "no messages"
            raise DataError(f"The {self.name} chat template refuses the turns ({roles}): {error}.") from error
        return rendered[0]

    def _answers(self, messages: list[dict[str, str]], text: str, *, first: int) -> list[_Answer]:
        """The assistant turns from message `first` on that stand in `text` as they stood when they were written."""
        answers = []
        for index in range(first, len(messages)):
            if messages[index]["role"] == "assistant":
                head = self._render(messages[:index], generation=True)
                body = self._render(messages[: index + 1], generation=False)
                end = self._answer_end(body, len(head))
                if body.startswith(head) and text.startswith(body[:end]):
                    answers.append(_Answer(index, len(head), end))
        return answers

    def _answer_end(self, text: str, start: int) -> int:
        """Just after the first stop token behind `start`; without one, after the text, before the space behind it."""
        ends = [at + len(stop) for stop in self._stops if (at := text.find(stop, start)) >= 0]
        return min(ends, default=max(start, len(text.removesuffix(self._tail_space))))

    def _encode(self, text: str, start: int, end: int, mark: str) -> list[int]:
        if start == end:
            return []
        parts = text[start:end].split(mark) if mark else [text[start:end]]
        ids: list[int] = []
        for number, part in enumerate(parts):
            ids += self._encode_text(part) if start == 0 and number == 0 else self._encode_inner(part)
        return ids

    def _encode_inner(self, text: str) -> list[int]:
        """Ids of a text that stands behind other text: encoded behind an anchor, which is cut off again."""
        for anchor, anchor_ids in self._anchors if text else ():
            ids = self._encode_text(anchor + text)
            if ids[: len(anchor_ids)] == anchor_ids:
                return ids[len(anchor_ids) :]
        return self._encode_text(text)

    def _anchors_needed(self) -> list[tuple[str, list[int]]]:
        """Texts to stand in front of inner parts, and their ids, for tokenizers in the manner of SentencePiece: those
        put a space before whatever they are given. There are two because an anchor may merge with what follows it."""
        anchors = [(anchor, self._encode_text(anchor)) for anchor in ("\n", ".")]
        newline, newline_ids = anchors[0]
        adds_space = self._encode_text(newline + "a") != newline_ids + self._encode_text("a")
        return anchors if adds_space else []

    def _encode_text(self, text: str) -> list[int]:
        backend, tokenizer = self._backend, self.tokenizer
        if (
            backend is not None
            and backend.truncation is None
            and backend.padding is None
            and backend.encode_special_tokens == tokenizer.split_special_tokens
        ):
            return backend.encode(text, add_special_tokens=False).ids
        return tokenizer.encode(text, add_special_tokens=False, verbose=False)


def _backend(tokenizer: Any) -> Any:
    """What the tokenizer's `encode` comes down to where its settings are as `encode` would set them: asking it directly
    takes a third of the time of short texts. None for a tokenizer with an `encode` of its own."""
    from transformers import PreTrainedTokenizerFast

    usual: Any = PreTrainedTokenizerFast
    kind: Any = type(tokenizer)
    asks_backend = tokenizer.is_fast and kind.encode is usual.encode and kind._encode_plus is usual._encode_plus
    return tokenizer.backend_tokenizer if asks_backend else None


def _require_characters(message: Message) -> None:
    try:
        message.content.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"the {message.role} turn has half of a character (the lone surrogate {message.content[error.start]!a}) at "
            f"character {error.start}: no tokenizer can read it. Repair the text, or leave the row out."
        ) from error


def _token_id(tokenizer: PreTrainedTokenizerBase, token: object) -> int:
    token_id = tokenizer.convert_tokens_to_ids(str(token))
    assert isinstance(token_id, int)
    return token_id


def _look_alikes(controls: set[str]) -> re.Pattern[str]:
    """Matches the first character of every control token, also of tokens that overlap. Without tokens, nothing."""
    tokens = "|".join(re.escape(text) for text in sorted(controls))
    return re.compile(f"(?=(?:{tokens}))(.)" if tokens else "((?!))", re.DOTALL)


def _with_bos(tokenizer: PreTrainedTokenizerBase, source: str) -> str:
    """Chat templates write BOS themselves, so ours writes it where the tokenizer would put one before a plain text."""
    adds_bos = tokenizer.bos_token_id is not None and tokenizer.encode("a")[:1] == [tokenizer.bos_token_id]
    return "{{ bos_token }}" + source if adds_bos else source


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"model.template is {str(path)!r}, which is neither auto, plain or raw nor a readable jinja file: {error}."
        ) from error
