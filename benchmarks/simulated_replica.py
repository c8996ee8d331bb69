"""A simulated replica: an engine with asynchronous scheduling and the thread in front of it.

It runs in virtual time, on an event loop of its own, so that the asyncio parts of a real replica
(admission, harvest) run beside it as they are. What a step and a request take is modelled by
measured figures of one H200 with Phi-4 in FP8 (benchmarks/RESULTS.md):

* Without prompts a step takes 5.8 ms and 55 us a sequence: 6.2 ms with 5 of them, 20 with 252.
* With prompts it takes 2 ms more, and 25.2 us a token of them and 53 us a sequence: with 224
  sequences 33 ms with one prompt of 512 tokens, 71 with four and 97 with six, measured 27.5, 69.9
  and 95.3; 132 with 816 sequences and 6.3 prompts, measured 137.5. So it is where a CUDA graph is
  of the whole step; with vLLM's own it is 11 ms more.
* A request takes the front end 1 ms, a batch row, which comes by no HTTP, half of that; a token
  60 us in a stream and 10 us in a row.
"""

import asyncio
import selectors
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

BLOCK = 16
"""Tokens, of the KV cache: of a prompt that is cached the last ones are computed all the same."""


@dataclass(frozen=True, slots=True)
class Speed:
    """One replica, in measured figures."""

    step_s: float = 5.8e-3
    decode_s: float = 55e-6
    prompts_s: float = 2e-3
    """More for a step with prompts, of which each token then takes `prompt_s`."""
    prompt_s: float = 25.2e-6
    mixed_s: float = 53e-6
    """Of a sequence, in a step with prompts."""
    most_tokens: int = 4096
    max_num_seqs: int = 1024
    capacity_tokens: int = 1_134_352
    request_s: float = 1e-3
    row_s: float = 0.5e-3
    chunk_s: float = 60e-6
    token_s: float = 10e-6

    def of(self, decodes: int, prompt_tokens: int) -> float:
        """Seconds of a step."""
        if not prompt_tokens:
            return self.step_s + self.decode_s * decodes
        prompts_s = self.prompts_s + self.prompt_s * prompt_tokens
        return self.step_s + prompts_s + self.mixed_s * decodes


class _Instant(selectors.SelectSelector):
    """Waits for nothing: the clock goes on instead."""

    now_s = 0.0

    def select(self, timeout: float | None = None) -> list[Any]:
        assert timeout is not None, "all wait for each other"
        self.now_s += timeout
        return []


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop whose clock jumps to whatever comes next."""

    def __init__(self) -> None:
        self._instant = _Instant()
        super().__init__(self._instant)

    def time(self) -> float:
        return self._instant.now_s


@dataclass(eq=False, slots=True)
class Request:
    """An online request or a batch row, which may be computed more than once."""

    prompt_tokens: int
    answer_tokens: int
    online: bool = False
    computed_tokens: int = 0
    """Of the prompt; with what of it is cached."""
    answered: int = 0
    first_s: float = 0.0

    def make_way(self) -> None:
        """What it has answered is a part of its prompt when it comes again."""
        if self.computed_tokens == self.prompt_tokens:
            arrived = min(self.answered, self.answer_tokens - 1)  # the last one is on its way
            self.prompt_tokens += arrived
            self.answer_tokens -= arrived
            self.computed_tokens, self.answered = self.prompt_tokens, 0
        cached = min(self.computed_tokens, self.prompt_tokens - 1)
        self.computed_tokens = cached // BLOCK * BLOCK


@dataclass(slots=True)
class _Token:
    request: Request
    done: asyncio.Future[None]
    first: bool
    last: bool


class Replica:
    """For one event loop, a `VirtualLoop`."""

    def __init__(self, speed: Speed, on_step: Callable[[int, float | None, int], None]) -> None:
        self.online_tokens = 0
        """Of requests: prompts with their first tokens."""
        self._speed = speed
        self._on_step = on_step
        self._waiting: dict[Request, asyncio.Future[None]] = {}
        self._running: dict[Request, asyncio.Future[None]] = {}
        self._front: deque[tuple[float, Callable[[], None]]] = deque()
        self._front_wakes, self._engine_wakes = asyncio.Event(), asyncio.Event()
        self._step_at_s = 0.0
        self._loop = asyncio.get_running_loop()
        self._tasks = [asyncio.ensure_future(self._serve()), asyncio.ensure_future(self._compute())]

    async def answer(self, request: Request) -> None:
        """Compute an answer. One that was cancelled goes on, and what it had computed is cached."""
        done = self._loop.create_future()

        def come() -> None:
            if not done.done():
                self._waiting[request] = done
                self._engine_wakes.set()

        self._pass(self._speed.request_s if request.online else self._speed.row_s, come)
        try:
            await done
        except asyncio.CancelledError:
            self._waiting.pop(request, None)
            self._running.pop(request, None)
            request.make_way()
            raise

    def stop(self) -> None:
        for task in self._tasks:
            task.cancel()

    def _pass(self, seconds: float, then: Callable[[], None]) -> None:
        """Have the front end do something, which takes its time, after what it has to do."""
        self._front.append((seconds, then))
        self._front_wakes.set()

    async def _serve(self) -> None:
        while True:
            while self._front:
                seconds, then = self._front.popleft()
                await asyncio.sleep(seconds)
                then()
            self._front_wakes.clear()
            await self._front_wakes.wait()

    async def _compute(self) -> None:
        following: _Step | None = None
        while True:
            step = following or self._schedule()
            if step is None:
                self._engine_wakes.clear()
                await self._engine_wakes.wait()
                continue
            following = self._schedule()  # while this one is computed
            await asyncio.sleep(self._speed.of(step.decodes, step.prompt_tokens))
            self._deliver(step)

    def _schedule(self) -> "_Step | None":
        """As vLLM: those that run have their next tokens, and prompts fill the step."""
        step = _Step(self._speed.most_tokens)
        for request, done in list(self._running.items()):
            if step.take(request, done):
                del self._running[request]
        while self._waiting and step.room and len(self._running) < self._speed.max_num_seqs:
            request = next(iter(self._waiting))
            done = self._waiting.pop(request)
            if not step.take(request, done):
                self._running[request] = done
        step.running = len(self._running)
        return step if step.decodes or step.prompt_tokens else None

    def _deliver(self, step: "_Step") -> None:
        chunks = sum(token.request.online for token in step.tokens)

        def come() -> None:
            now = self._loop.time()
            for token in step.tokens:
                if token.first:
                    token.request.first_s = now
                if token.request.online:
                    self.online_tokens += 1 + token.first * token.request.prompt_tokens
                if token.last and not token.done.done():
                    token.done.set_result(None)
            begun = sum(token.first for token in step.tokens)
            self._on_step(step.running, now - self._step_at_s if step.decodes else None, begun)
            self._step_at_s = now

        rows = len(step.tokens) - chunks
        self._pass(self._speed.chunk_s * chunks + self._speed.token_s * rows, come)


@dataclass(slots=True)
class _Step:
    room: int
    """Tokens that it may still take."""
    running: int = 0
    decodes: int = 0
    prompt_tokens: int = 0
    tokens: list[_Token] = field(default_factory=list)

    def take(self, request: Request, done: asyncio.Future[None]) -> bool:
        """Have a request's next tokens in this step, if there is room; True with its last."""
        left = request.prompt_tokens - request.computed_tokens
        taken = min(self.room, left or 1)
        self.room -= taken
        request.computed_tokens += taken if left else 0
        self.prompt_tokens += taken if left else 0
        self.decodes += 0 if left else taken
        if not taken or taken < left:
            return False
        request.answered += 1
        last = request.answered == request.answer_tokens
        self.tokens.append(_Token(request, done, left > 0, last))
        return last
