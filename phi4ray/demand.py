"""How many tokens of KV cache a request will hold: what is known, and what finished ones taught.

Batch pacing, online admission and per-key limits speak these tokens.
"""

from dataclasses import dataclass

from phi4ray.protocol import Json

FORGET_ROWS = 4096.0
"""Requests after which what was learned counts half, so that a change of traffic is noticed."""

TOKENS_PER_CHAR = (1 / 16, 1.5)
"""What text has at least and at most: blanks and long words, and Chinese.

One client's requests are not to change what is expected of all others' beyond that.
"""


@dataclass(slots=True)
class Lengths:
    """Learns token counts from finished requests: the best guess for what they do not state."""

    # A prior worth a few rows: about four characters a token, answers of a few hundred tokens.
    prompt_chars: float = 256.0
    prompt_tokens: float = 64.0
    completion_tokens: float = 8 * 256.0
    rows: float = 8.0

    def observe(self, prompt_chars: int, prompt_tokens: int, completion_tokens: int) -> None:
        """Count one finished request.

        Tokens that its text cannot have are not: they are a template's, or of what was not read.
        """
        least, most = TOKENS_PER_CHAR
        prompt_tokens = min(max(prompt_tokens, int(least * prompt_chars)), int(most * prompt_chars))
        self.prompt_chars += prompt_chars
        self.prompt_tokens += prompt_tokens
        self.completion_tokens += completion_tokens
        self.rows += 1
        if self.rows > FORGET_ROWS:
            self.prompt_chars /= 2
            self.prompt_tokens /= 2
            self.completion_tokens /= 2
            self.rows /= 2

    def demand(self, prompt_chars: int, max_tokens: int | None, prompt_tokens: int = 0) -> float:
        """Tokens of KV cache that a request will hold in the end: its prompt and its answer.

        A stated limit counts no more than twice the mean answer: most requests end long before
        it, and a cache kept free for what never comes is wasted. The engine preempts if not.
        """
        prompt = prompt_tokens + prompt_chars * self.prompt_tokens / self.prompt_chars
        mean = self.completion_tokens / self.rows
        return prompt + (mean if max_tokens is None else min(max_tokens, 2 * mean))


def max_tokens_of(body: Json) -> int | None:
    """The limit that a request sets to its answer, over all its choices; None for a bad one."""
    limit = (
        body.get("max_completion_tokens") or body.get("max_tokens") or body.get("max_output_tokens")
    )
    choices = body.get("n") or 1
    if isinstance(limit, int) and isinstance(choices, int) and limit > 0 and choices > 0:
        return limit * choices
    return None


def prompt_of(body: Json) -> str:
    """What the engine sees of a request, as one text: for lengths and for shared prefixes."""
    messages = body.get("messages")
    if isinstance(messages, list):
        return "\n".join(str(m.get("content")) if isinstance(m, dict) else "" for m in messages)
    return str(body.get("prompt") or body.get("input") or "")


def prompt_token_ids(body: Json) -> int:
    """How many token ids a request has for a prompt; 0 where it has text.

    Prompts are text, lists of texts, lists of ids or lists of lists of ids.
    """
    prompt = body.get("prompt") or body.get("input")
    if not isinstance(prompt, list) or not prompt:
        return 0
    if isinstance(prompt[0], int):
        return len(prompt)
    return sum(len(part) for part in prompt if isinstance(part, list))
