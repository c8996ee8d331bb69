"""The ASGI layer before vLLM's application that lets requests in by `phi4ray.serve.admission`."""

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from phi4ray.demand import READS, Lengths, Size, as_vllm_reads, surely_longer
from phi4ray.protocol import Json
from phi4ray.serve import metrics
from phi4ray.serve.admission import Admission, OverloadedError
from phi4ray.serve.headers import priorities_of
from phi4ray.serve.meter import Meter, Usage
from phi4ray.serve.paths import GENERATING
from phi4ray.serve.responses import send_error
from phi4ray.serve.state import State


class Admit:
    """Holds room in the KV cache around each generating request, or answers 429."""

    def __init__(
        self,
        app: ASGIApp,
        admission: Admission,
        meter: Meter,
        abort: Callable[[Iterable[str]], Awaitable[None]],
        max_model_len: int,
    ) -> None:
        """`abort` is the replica's; see `phi4ray.protocol.OnlineReplica.abort`."""
        self.app = app
        self._abort = abort
        self._max_model_len = max_model_len
        self.admission = admission
        self._meter = meter
        self._lengths = Lengths()

    def demand(self, path: str, body: Json | None) -> float:
        """Tokens that a request is expected to hold; 0 for what needs no KV cache."""
        if path not in GENERATING or body is None:
            return 0
        return self._demand(Size.of(body, path))

    def _demand(self, size: Size) -> float:
        # No sequence has more: the engine refuses those that would.
        return min(self._lengths.demand(*size), float(size.sequences * self._max_model_len))

    def _refused(self, path: str, body: Json, size: Size) -> bool:
        """Whether vLLM surely refuses a prompt for its length: for that it needs no room."""
        if path not in READS or size.chars + size.ids <= self._max_model_len:
            return False
        cut = (
            body.get("truncate_prompt_tokens") is not None
            or body.get("truncation", "disabled") != "disabled"
            or body.get("chat_template") is not None  # which may leave out what it likes
        )
        return not cut and surely_longer(body.get(READS[path].prompts), self._max_model_len)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection; see the ASGI specification."""
        state = State.of(scope) if scope["type"] == "http" else None
        if state is None or state.body is None or state.path not in GENERATING:
            await self.app(scope, receive, send)
            return
        wished = [as_vllm_reads(state.body.get("priority")) or 0, *priorities_of(scope)]
        least = min(0, state.priority)
        if min(wished) < least:
            # The engine would put it before others that have the same right.
            await send_error(
                send, 403, "priority_not_allowed",
                f"'priority' must not be below {least}",
            )  # fmt: skip
            return
        size = Size.of(state.body, state.path)
        if self._refused(state.path, state.body, size):
            await self.app(scope, receive, send)
            return
        tokens = self._demand(size)
        waiting = _Waiting(receive)
        try:
            with self._meter.request(state.engine_request_id) as usage:
                # Watching costs a task, which most requests need not pay for.
                room = self.admission.has_room(tokens, size.sequences)
                begun = ended = False
                try:
                    async with (
                        contextlib.nullcontext() if room else waiting.or_gone(),
                        self.admission.admit(
                            tokens, state.priority, size.sequences
                        ) as state.queued_s,
                    ):
                        waiting.over()
                        begun = True
                        metrics.QUEUE_TIME.observe(state.queued_s)
                        await self.app(scope, waiting.receive, send)
                    ended = not waiting.gone
                finally:
                    if not ended and usage.running:
                        # vLLM notices some who hang up only when Python collects their answer.
                        await self._abort(list(usage.prompts or ()))
                    # They pay as well, but for what nobody has begun. This holds no room any more
                    # while it waits for the count.
                    if not begun or (state.status in (0, 200) and await usage.settled()):
                        state.usage = usage
                if ended and state.usage is not None and not usage.aborted:
                    self._learn(size, usage)
        except OverloadedError as error:
            metrics.REJECTED.labels("engine_overloaded").inc()
            await send_error(
                send,
                429,
                "engine_overloaded",
                str(error),
                kind="rate_limit_error",
                headers={"retry-after": str(error.retry_after_s)},
            )

    def _learn(self, size: Size, usage: Usage) -> None:
        prompt_tokens = max(0, usage.prompt_tokens - size.ids)
        # Of so many sequences as there were: a body may tell of others.
        self._lengths.observe(size.chars, prompt_tokens, usage.completion_tokens, usage.sequences)


class _Waiting:
    """Notices that the client hangs up while its request waits."""

    def __init__(self, receive: Receive) -> None:
        self.gone = False
        """Whether the application was told that the client hung up."""
        self._receive = receive
        self._kept: deque[Message] = deque()
        self._watch: asyncio.Task[None] | None = None

    @contextlib.asynccontextmanager
    async def or_gone(self) -> AsyncIterator[None]:
        """End the block quietly when the client is gone before `over` was called."""
        task = asyncio.current_task()
        gone = False

        async def watch() -> None:
            nonlocal gone
            while True:
                message = await self._receive()
                self._kept.append(message)
                if message["type"] == "http.disconnect":
                    gone = True
                    assert task is not None
                    task.cancel()
                    return

        self._watch = asyncio.create_task(watch())
        try:
            yield
        except asyncio.CancelledError:
            if not gone or task is None or task.uncancel():
                raise
        finally:
            self.over()

    def over(self) -> None:
        """Stop watching: what comes now is for the application."""
        if self._watch is not None:
            self._watch.cancel()
            self._watch = None

    async def receive(self) -> Message:
        """The application's `receive`: what came while waiting, then what comes."""
        message = self._kept.popleft() if self._kept else await self._receive()
        self.gone = self.gone or message["type"] == "http.disconnect"
        return message
