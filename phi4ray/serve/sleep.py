"""Sleep before zero: an engine that nobody needs gives its device's memory back, and wakes fast.

vLLM's sleep mode (docs.vllm.ai, "Sleep Mode") keeps the weights in the host's memory and drops the
KV cache. Waking takes a second where starting takes a minute (benchmarks/RESULTS.md), so a replica
that has nothing to do sleeps long before autoscaling takes it away. Whoever comes wakes it, and is
held meanwhile like any request that waits for room.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator

from starlette.types import ASGIApp, Receive, Scope, Send

from phi4ray.config import Endpoint
from phi4ray.errors import EngineDeadError
from phi4ray.protocol import Answer, Json, KVState, OnlineReplica

logger = logging.getLogger(__name__)


class Sleeper:
    """One engine's sleep. For one event loop."""

    def __init__(self, replica: OnlineReplica, delay_s: float) -> None:
        self.asleep = False
        """Whether the engine sleeps, or is about to."""
        self._replica = replica
        self._delay_s = delay_s
        self._inside = 0
        self._left_s = time.monotonic()
        self._turn = asyncio.Lock()
        self._waking: asyncio.Task[None] | None = None

    @contextlib.asynccontextmanager
    async def awake(self) -> AsyncIterator[None]:
        """Have the engine awake inside the block.

        Raises:
            EngineDeadError: it cannot wake.
        """
        self._inside += 1
        try:
            if self.asleep:
                await self._wake()
            yield
        finally:
            self._inside -= 1
            self._left_s = time.monotonic()

    async def watch(self) -> None:
        """Put the engine to sleep whenever nobody has needed it for the delay, until it dies."""
        while True:
            await asyncio.sleep(max(0.01, self._left_s + self._delay_s - time.monotonic()))
            if not self._inside and time.monotonic() - self._left_s >= self._delay_s:
                try:
                    await self._fall_asleep()
                except EngineDeadError:
                    return
                self._left_s = time.monotonic()
            elif self._inside:
                self._left_s = time.monotonic()

    async def _fall_asleep(self) -> None:
        if self.asleep:
            return
        self.asleep = True  # before anything is awaited: whoever comes now waits for its turn
        async with self._turn:
            began = time.monotonic()
            await self._replica.sleep()
            logger.info("asleep after %.1f s: nobody asked for a while", time.monotonic() - began)

    async def _wake(self) -> None:
        # One task for all that wait: the engine goes on waking when their clients hang up.
        if self._waking is None:
            self._waking = asyncio.create_task(self._wake_once())
        await asyncio.shield(self._waking)

    async def _wake_once(self) -> None:
        try:
            async with self._turn:
                began = time.monotonic()
                await self._replica.wake()
                self.asleep = False
                logger.info("awake after %.1f s", time.monotonic() - began)
        finally:
            self._waking = None


class Awake:
    """The ASGI layer before vLLM's application that has the engine awake for what needs it."""

    def __init__(self, app: ASGIApp, sleeper: Sleeper) -> None:
        self.app = app
        self._sleeper = sleeper

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection; see the ASGI specification."""
        # What is only looked at (models, metrics, health) is told without the engine, and the
        # application's own life lasts as long as the replica's.
        if scope["type"] == "websocket" or scope.get("method") == "POST":
            async with self._sleeper.awake():
                await self.app(scope, receive, send)
        else:
            await self.app(scope, receive, send)


class AwakeReplica:
    """A `phi4ray.protocol.Replica` that is awake for each request of batch jobs."""

    def __init__(self, replica: OnlineReplica, sleeper: Sleeper) -> None:
        self._replica = replica
        self._sleeper = sleeper

    async def start(self) -> None:
        """The replica below has been started."""

    async def complete(self, endpoint: Endpoint, body: Json) -> Answer:
        """See `phi4ray.protocol.Replica.complete`."""
        async with self._sleeper.awake():
            return await self._replica.complete(endpoint, body)

    def kv(self) -> KVState:
        """See `phi4ray.protocol.Replica.kv`."""
        return self._replica.kv()

    async def stop(self) -> None:
        """The replica below goes on."""
