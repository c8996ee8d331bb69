"""How many tokens each request over HTTP used, as the engine counted them."""

import asyncio
import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field

LONGEST_LAG_S = 0.25
"""The engine's statistics come with its answer, or a step later."""


@dataclass(slots=True)
class Usage:
    """The tokens of one request, over all its prompts and choices; each prompt counts once."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    counted: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when all sequences that were begun have ended."""
    sequences: int = 0
    """Sequences that the engine was given."""
    running: int = 0
    """Those that it still has."""
    aborted: bool = False
    """Whether one of them was not waited for: nothing is to be learned from how long it got."""
    prompts: dict[str, bool] | None = field(default_factory=dict)
    """By their ids in the engine: whether they are counted. None: nobody counts any more."""
    request_id: str = ""

    async def settled(self) -> bool:
        """Wait for the engine's count of an answered request; False when it has none."""
        if self.running:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.counted.wait(), LONGEST_LAG_S)
        return self.counted.is_set()


_asking: ContextVar[Usage | None] = ContextVar("asking", default=None)


class Meter:
    """Brings the engine's statistics to the requests that they are of. For one event loop.

    Whose a sequence is tells the context in which the engine is given it: vLLM makes its id in one
    way for each path, and for `/v1/responses` not from ours. Beams of a search are not counted: at
    each of its steps they are new sequences to the engine.
    """

    def __init__(self) -> None:
        self._open: dict[str, Usage] = {}

    @contextlib.contextmanager
    def request(self, request_id: str) -> Iterator[Usage]:
        """Count what is asked of the engine inside the block, by this task and those it starts.

        `request_id` is its `X-Request-Id`.
        """
        usage = Usage(request_id=request_id)
        token = _asking.set(usage)
        try:
            yield usage
        finally:
            _asking.reset(token)
            prompts, usage.prompts = usage.prompts or {}, None
            for engine_id in prompts:
                if self._open.get(engine_id) is usage:
                    del self._open[engine_id]

    def begun(self, engine_id: str) -> None:
        """Take note of one sequence that the engine is given; choices of a prompt share an id."""
        usage = _asking.get()
        if usage is None or usage.prompts is None or _is_beam(engine_id, usage.request_id):
            return
        self._open[engine_id] = usage
        usage.prompts.setdefault(engine_id, False)
        usage.sequences += 1
        usage.running += 1
        usage.counted.clear()

    def finished(self, engine_id: str, prompt_tokens: int, completion_tokens: int) -> None:
        """Take note of one sequence that the engine finished."""
        usage = self._open.get(engine_id)
        if usage is None or usage.prompts is None:
            return
        if not usage.prompts[engine_id]:
            usage.prompts[engine_id] = True
            usage.prompt_tokens += prompt_tokens
        usage.completion_tokens += completion_tokens
        usage.running -= 1
        if not usage.running:
            usage.counted.set()

    def aborted(self, engine_id: str, prompt_tokens: int, completion_tokens: int) -> None:
        """Take note of one sequence that was given up: whoever asked pays what it had come to."""
        if usage := self._open.get(engine_id):
            usage.aborted = True
        self.finished(engine_id, prompt_tokens, completion_tokens)


def _is_beam(engine_id: str, request_id: str) -> bool:
    """By what vLLM puts behind a request's id, and not by what a client put into it."""
    return "-beam-" in engine_id and "-beam-" in engine_id.rpartition(request_id or "-")[2]
