"""How many tokens each request over HTTP used, as the engine counted them."""

import asyncio
import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field

LONGEST_LAG_S = 0.25
"""The engine's statistics come with its answer, or a step later."""


@dataclass(slots=True)
class Usage:
    """The tokens of one request, over all its prompts and choices."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    counted: asyncio.Event = field(default_factory=asyncio.Event)

    async def settled(self) -> bool:
        """Wait for the engine's count of an answered request; False when it has none."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.counted.wait(), LONGEST_LAG_S)
        return self.counted.is_set()


class Meter:
    """Brings the engine's statistics to the requests that they are of. For one event loop."""

    def __init__(self) -> None:
        self._open: dict[str, Usage] = {}

    @contextlib.contextmanager
    def request(self, request_id: str) -> Iterator[Usage]:
        """Count what the request with this `X-Request-Id` uses inside the block."""
        usage = self._open[request_id] = Usage()
        try:
            yield usage
        finally:
            if self._open.get(request_id) is usage:
                del self._open[request_id]

    def finished(self, engine_id: str, prompt_tokens: int, completion_tokens: int) -> None:
        """Take note of one sequence that the engine finished.

        vLLM calls a request `chatcmpl-ID`, and each prompt of a completion `cmpl-ID-0`, `-1`, …
        """
        request_id = engine_id.partition("-")[2]
        usage = self._open.get(request_id) or self._open.get(request_id.rpartition("-")[0])
        if usage is not None:
            usage.prompt_tokens += prompt_tokens
            usage.completion_tokens += completion_tokens
            usage.counted.set()
