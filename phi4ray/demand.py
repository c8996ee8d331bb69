"""How many tokens of KV cache a request will hold: what is known, and what finished ones taught.

Batch pacing, online admission and per-key limits speak these tokens.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from pydantic import TypeAdapter, ValidationError

from phi4ray.protocol import Json

FORGET_ROWS = 4096.0
"""Requests after which what was learned counts half, so that a change of traffic is noticed."""

TOKENS_PER_CHAR = (1 / 16, 1.5)
"""What text has at least and at most: blanks and long words, and Chinese.

One client's requests are not to change what is expected of all others' beyond that.
"""

LONGEST_TOKEN_CHARS = 128
"""The longest tokens of the family's vocabularies: so many blanks."""

MOST_CHOICES = 16_384
"""vLLM refuses more."""

MOST_TOKENS = 1 << 31
"""No answer is longer: a limit above it, of however many digits, says no more."""

ANSWERED: Final = ("messages", "prompt", "input", "token_ids")
SCORED: Final = ("documents", "items", "text_2", "data_2", "texts", "inputs")
"""Fields with the prompts of a body, in vLLM's words: what is answered, and what is only embedded
or scored."""


class Reads(NamedTuple):
    """The fields in which a path of vLLM's takes its prompts, and its answers' limit."""

    prompts: str
    limits: tuple[str, ...]


READS: Final[Mapping[str, Reads]] = {
    "/v1/chat/completions": Reads("messages", ("max_completion_tokens", "max_tokens")),
    "/v1/chat/completions/batch": Reads("messages", ("max_completion_tokens", "max_tokens")),
    "/v1/completions": Reads("prompt", ("max_tokens",)),
    "/v1/responses": Reads("input", ("max_output_tokens",)),
    "/v1/messages": Reads("messages", ("max_tokens",)),
    "/inference/v1/generate": Reads("token_ids", ("max_tokens",)),
    "/cohere/v2/chat": Reads("messages", ("max_tokens",)),
}
"""Paths that refuse prompts longer than the model's context unless they are asked to cut them. What
else a body has they pass over, and so it must not tell how much it asks for."""

_ANY = Reads("", ("max_completion_tokens", "max_tokens", "max_output_tokens"))
"""Of another path, or where it is not known: all fields are looked at, and the most counts."""

BESIDE: Final = (
    *("system", "instructions", "tools"),
    *("query", "queries", "text_1", "data_1", "instruction"),
)
"""Fields of a body that the engine reads as well."""

MESSAGE: Final = ("content", "tool_calls", "reasoning")
"""Fields of a message that it reads."""

_INTEGER = TypeAdapter(int)


@dataclass(slots=True)
class Lengths:
    """Learns token counts from finished requests: the best guess for what they do not state."""

    # A prior worth a few rows: about four characters a token, answers of a few hundred tokens.
    prompt_chars: float = 256.0
    prompt_tokens: float = 64.0
    completion_tokens: float = 8 * 256.0
    rows: float = 8.0

    def observe(
        self, prompt_chars: int, prompt_tokens: int, completion_tokens: int, sequences: int = 1
    ) -> None:
        """Count one finished request; of all its sequences' answers the mean.

        Tokens that its text cannot have are not: they are a template's, or of what was not read.
        """
        least, most = TOKENS_PER_CHAR
        prompt_tokens = min(max(prompt_tokens, int(least * prompt_chars)), int(most * prompt_chars))
        self.prompt_chars += prompt_chars
        self.prompt_tokens += prompt_tokens
        self.completion_tokens += completion_tokens / sequences
        self.rows += 1
        if self.rows > FORGET_ROWS:
            self.prompt_chars /= 2
            self.prompt_tokens /= 2
            self.completion_tokens /= 2
            self.rows /= 2

    def demand(
        self,
        prompt_chars: int,
        max_tokens: int | None,
        prompt_tokens: int = 0,
        sequences: int = 1,
    ) -> float:
        """Tokens of KV cache that a request will hold in the end: its prompts and its answers.

        `max_tokens` is over all its sequences. It counts no more than twice the mean answer: most
        requests end long before it, and a cache kept free for what never comes is wasted. The
        engine preempts if not. Choices share the blocks of their prompt.
        """
        prompt = prompt_tokens + prompt_chars * self.prompt_tokens / self.prompt_chars
        mean = sequences * self.completion_tokens / self.rows
        return prompt + (mean if max_tokens is None else min(max_tokens, 2 * mean))


def max_tokens_of(body: Json, path: str = "") -> int | None:
    """The limit that a request sets to its answers, over all its sequences; None for a bad one."""
    if path not in READS and _is_scored(body):
        return 0
    stated = _sampling(body, path)
    found = [stated.get(name) for name in READS.get(path, _ANY).limits]
    limit = max((one for one in found if isinstance(one, int) and one > 0), default=None)
    choices = _choices(body, path)
    if limit is None or choices is None:
        return None
    return min(limit, MOST_TOKENS) * choices * _prompts(body, path)


def sequences_of(body: Json, path: str = "") -> int:
    """Sequences that the engine holds for a request: so many choices for each of its prompts."""
    return (_choices(body, path) or 1) * _prompts(body, path)


def as_vllm_reads(number: object) -> int | None:
    """An integer of a body: "-5" and -5.0 are -5. None: there is none, or vLLM refuses it."""
    try:
        return _INTEGER.validate_python(number)
    except ValidationError:
        return None


def _choices(body: Json, path: str) -> int | None:
    """Answers to each prompt; None for a bad number of them."""
    stated = _sampling(body, path).get("n")
    choices = 1 if stated is None else as_vllm_reads(stated)
    return choices if choices is not None and 0 < choices <= MOST_CHOICES else None


def _is_scored(body: Json) -> bool:
    return not body.keys().isdisjoint(SCORED) and body.keys().isdisjoint(ANSWERED)


def _sampling(body: Json, path: str) -> Json:
    """Where a body states its limits: one of token ids, of `/inference/v1/generate`, further in."""
    if path in READS:
        is_inside = READS[path].prompts == "token_ids"
    else:
        is_inside = body.keys().isdisjoint(ANSWERED[:-1])
    inner = body.get("sampling_params")
    return inner if is_inside and isinstance(inner, dict) else body


def _prompts(body: Json, path: str) -> int:
    """Prompts and, where the messages are of several, conversations."""
    names = (READS[path].prompts,) if path in READS else (*ANSWERED, *SCORED)
    # A list of messages or of ids is one prompt; documents may be objects.
    many = ((name, value) for name in names if isinstance(value := body.get(name), list) and value)
    counts = (
        len(value)
        for name, value in many
        if isinstance(value[0], str | list) or (name in SCORED and _is_scored(body))
    )
    return max(counts, default=1)


def prompt_of(body: Json) -> str:
    """What the engine sees of a request, as one text: for lengths and for shared prefixes."""
    if isinstance(body.get("messages"), list):
        return "\n".join(
            str(m.get("content")) if isinstance(m, dict) else "" for m in _messages(body)
        )
    return str(body.get("prompt") or body.get("input") or "")


class Size(NamedTuple):
    """What a body says of its demand: the arguments of `Lengths.demand`."""

    chars: int
    limit: int | None
    ids: int
    sequences: int

    @classmethod
    def of(cls, body: Json, path: str = "") -> "Size":
        """Read a body that is sent to a path; prompts of ids have no text.

        Text counts in the fields of all paths: at worst a request counts for more than it is.
        """
        found = [_size(body.get(name)) for name in (*ANSWERED[1:], *SCORED, *BESIDE)]
        found += [
            _size(message.get(name))
            for message in _messages(body)
            if isinstance(message, dict)
            for name in MESSAGE
        ]
        chars, ids = (sum(counts) for counts in zip(*found, strict=True))
        return cls(chars, max_tokens_of(body, path), ids, sequences_of(body, path))


def surely_longer(prompts: Any, tokens: int) -> bool:
    """Whether one of a body's prompts surely has more than so many tokens.

    That is known of ids, of text without end, and of more words than that: no token is part of two.
    Of chats only what users say counts, as their templates may leave out anything else.
    """
    several = isinstance(prompts, list) and prompts and isinstance(prompts[0], str | list)
    each: list[Any] = prompts if several else [prompts]
    for prompt in each:
        if _is_ids(prompt):
            if len(prompt) > tokens:
                return True
            continue
        text = prompt if isinstance(prompt, str) else " ".join(_said(prompt))
        if len(text) > tokens * LONGEST_TOKEN_CHARS:
            return True
        if len(text) > 2 * tokens and len(text.split(None, tokens)) > tokens:
            return True
    return False


def _said(messages: object) -> Iterator[str]:
    """The texts of the users' messages; its parts may be put together without a blank."""
    for message in messages if isinstance(messages, list) else []:
        if isinstance(message, dict) and message.get("role") == "user":
            content = message.get("content")
            parts = content if isinstance(content, list) else [{"text": content}]
            texts = (part.get("text") for part in parts if isinstance(part, dict))
            yield "".join(text for text in texts if isinstance(text, str))


def _messages(body: Json) -> list[Any]:
    """The messages of all conversations."""
    messages = body.get("messages")
    if not isinstance(messages, list):
        return []
    if messages and isinstance(messages[0], list):
        return [message for one in messages if isinstance(one, list) for message in one]
    return messages


def _size(value: Any) -> tuple[int, int]:
    """Characters and token ids of a field: text, ids, a list of either, or JSON."""
    chars = ids = 0
    parts: list[Any] = value if isinstance(value, list) and not _is_ids(value) else [value]
    for part in parts:
        if _is_ids(part):
            ids += len(part)
        elif part is not None:
            chars += len(part if isinstance(part, str) else str(part))
    return chars, ids


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], int)
