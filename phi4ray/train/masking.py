"""From a chat to token ids, and to labels that leave only the assistant's answers to be learned.

An answer is what the chat template puts after the prompt that a served model would be given, up
to and including the token that ends the turn: exactly what the model has to produce.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from jinja2 import TemplateError

from phi4ray.train.chats import Chat, Messages, Refused

IGNORED = -100
"""The label of a token that is not learned; torch's `cross_entropy` leaves it out."""


class ChatTokenizer(Protocol):
    """The part of a transformers tokenizer that is used here."""

    all_special_ids: list[int]
    added_tokens_decoder: Mapping[int, Any]

    def apply_chat_template(self, conversation: Any, **options: Any) -> Any:
        """Render a chat as text."""
        ...

    def __call__(self, text: str, **options: Any) -> Mapping[str, Any]:
        """Tokenize text; `return_offsets_mapping` gives each token's first character and end."""
        ...


@dataclass(frozen=True, slots=True)
class Example:
    """One chat to train on: `labels[i]` is `input_ids[i]` in answers, and `IGNORED` elsewhere."""

    input_ids: list[int]
    labels: list[int]


@dataclass(frozen=True, slots=True)
class Span:
    """Characters of a rendered chat: an answer's text is `[start, end)`, its end token follows."""

    start: int
    end: int


def to_example(chat: Chat, tokenizer: ChatTokenizer, max_length_tokens: int) -> Example | Refused:
    """Tokenize a chat and mask all but its answers; one that would have to be cut is refused."""
    try:
        text = _render(tokenizer, chat.messages)
        spans = answer_spans(chat, text, tokenizer)
        tokens = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids = list(tokens["input_ids"])
        # Phi-4-mini's end of a turn has no role of its own, as an eos has, and is special as well.
        added = (number for number, t in tokenizer.added_tokens_decoder.items() if t.special)
        ends = frozenset([*tokenizer.all_special_ids, *added])
        labels = mask(ids, tokens["offset_mapping"], spans, ends)
    except ValueError as error:
        return Refused(chat.place, "messages", "unlearnable", str(error))
    if len(ids) > max_length_tokens:
        what = f"has {len(ids):,} tokens, max_length_tokens is {max_length_tokens:,}"
        return Refused(chat.place, "messages", "too_long", what)
    return Example(ids, labels)


def answer_spans(chat: Chat, text: str, tokenizer: ChatTokenizer) -> list[Span]:
    """Where each answer to learn is in the rendered chat.

    Raises:
        ValueError: the template refuses the chat, or does not write out a turn as the served model
            will be asked it.
    """
    spans, messages = [], chat.messages
    for at, message in enumerate(messages):
        if message["role"] != "assistant" or at in chat.unlearned:
            continue
        prompt = _render(tokenizer, messages[:at], add_generation_prompt=True)
        content = message["content"].strip()
        if not text.startswith(prompt):
            raise ValueError(
                f"the chat template writes what comes before messages[{at}] in another way when "
                "an answer follows"
            )
        found = text.find(content, len(prompt))
        # Templates may trim an answer; what else they put before it is theirs to answer for.
        if found < 0 or text[len(prompt) : found].strip():
            raise ValueError(f"the chat template does not write messages[{at}] out as it is")
        whole = message["content"].lstrip()
        end = found + len(whole if text.startswith(whole, found) else content)
        spans.append(Span(len(prompt), end))
    return spans


def mask(
    ids: Sequence[int],
    offsets: Sequence[tuple[int, int]],
    spans: Sequence[Span],
    ends: Collection[int],
) -> list[int]:
    """Labels: the ids of the answers' tokens, each with its end token, and `IGNORED` elsewhere.

    Args:
        ids: one chat's tokens.
        offsets: first character and end of each token.
        spans: the answers, in order.
        ends: tokens that may end a turn.

    Raises:
        ValueError: a token straddles the begin of an answer, or no end token follows one.
    """
    labels = [IGNORED] * len(ids)
    at = 0
    for span in spans:
        while at < len(ids) and offsets[at][1] <= span.start:
            at += 1
        if at < len(ids) and offsets[at][0] < span.start:
            raise ValueError("a token reaches from the prompt into the answer")
        while at < len(ids) and offsets[at][0] < span.end:
            labels[at] = ids[at]
            at += 1
        if at == len(ids) or ids[at] not in ends:
            raise ValueError("the chat template puts no end token behind the answer")
        labels[at] = ids[at]
        at += 1
    return labels


def _render(tokenizer: ChatTokenizer, messages: Messages, **options: Any) -> str:
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, **options))
    except TemplateError as error:  # what templates raise of chats that are not as they want them
        raise ValueError(f"the chat template refuses the chat: {error}") from error
