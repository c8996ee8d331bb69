"""The online door of a replica: vLLM's application with what a service needs around it.

    HTTP → CORS → Observe (ids, log, metrics) → Gate (keys, limits) → BatchApi (files, batches)
         → Admit (KV tokens) → Alive → Awake → vLLM

Each layer is plain ASGI: vLLM's answers, streams included, pass through untouched.
"""

import time
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from phi4ray.batches.app import BatchApi
from phi4ray.protocol import OnlineReplica, Replica
from phi4ray.serve import metrics
from phi4ray.serve.admission import Admission
from phi4ray.serve.admit import Admit
from phi4ray.serve.config import ServeConfig
from phi4ray.serve.gate import Gate
from phi4ray.serve.harvest import Harvest
from phi4ray.serve.meter import Meter
from phi4ray.serve.observe import Observe
from phi4ray.serve.responses import send_error
from phi4ray.serve.sleep import Awake, AwakeReplica, Sleeper
from phi4ray.serve.state import State

EXPOSED = (
    "retry-after",
    "x-request-id",
    *(f"x-ratelimit-{what}-{of}" for what in ("limit", "remaining", "reset")
      for of in ("requests", "tokens")),
)  # fmt: skip
"""Headers of answers that pages may read."""


class OnlineApp:
    """The ASGI application of one started replica."""

    def __init__(
        self,
        replica: OnlineReplica,
        config: ServeConfig,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`clock` gives the Unix time in seconds by which files and batches expire."""
        kv = replica.kv()
        meter = Meter()
        replica.on_begun, replica.on_finished = meter.begun, meter.finished
        replica.on_aborted = meter.aborted
        self.admission = Admission(
            config.admission,
            capacity_tokens=kv.capacity_tokens,
            max_num_seqs=kv.max_num_seqs,
        )
        self.harvest = Harvest(
            config.harvest, self.admission, prefix_caching=config.engine.enable_prefix_caching
        )
        replica.on_step = self.harvest.step
        metrics.watch(self.admission, self.harvest)
        self.sleeper: Sleeper | None = None
        """What puts the engine to sleep, where that is wanted and can be; to be watched."""
        self.batch_replica: Replica = replica
        """The replica as batch jobs are to ask it."""
        engine: ASGIApp = replica.app
        if (delay_s := config.autoscaling.sleep_delay_s) is not None and replica.can_sleep:
            self.sleeper = Sleeper(replica, delay_s)
            self.batch_replica = AwakeReplica(replica, self.sleeper)
            engine = Awake(engine, self.sleeper)
            metrics.watch_sleep(self.sleeper)
        admit = Admit(
            Alive(engine, replica), self.admission, meter, replica.abort, kv.max_model_len
        )
        batches = config.batches
        api = BatchApi(admit, batches, config.engine.model_name, clock)
        self.gate = Gate(
            api, config.gate, admit.demand, batches.max_file_bytes if batches is not None else 0
        )
        self._app: ASGIApp = _told_to_pages(Observe(self.gate), replica.app)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection; see the ASGI specification."""
        await self._app(scope, receive, send)


def _told_to_pages(app: ASGIApp, engine: Any) -> ASGIApp:
    """Have what stands before vLLM's application told to the browser's pages that vLLM lets ask.

    A page sees no answer, a refusal neither, that is not allowed so. vLLM's own layer for it adds
    nothing to this one.
    """
    for layer in getattr(engine, "user_middleware", ()):
        if layer.cls is CORSMiddleware:
            return CORSMiddleware(app, **{**layer.kwargs, "expose_headers": EXPOSED})
    return app


class Alive:
    """Speaks for the engine's life: `/ready`, and 503 instead of a dead engine's last words.

    A proxy in front may give a request that got 503 to another replica (see
    `cluster.environment`), and OpenAI's clients try it again. `/health` is vLLM's own.
    """

    def __init__(self, app: ASGIApp, replica: OnlineReplica) -> None:
        self.app = app
        self._replica = replica

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection; see the ASGI specification."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
        elif not self._replica.alive():
            await _dead(send)
        elif State.of(scope).path == "/ready":
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b""})
        else:
            await self._watched(scope, receive, send)

    async def _watched(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = died = False

        # No coroutine of its own: every chunk of every stream goes through here.
        def watched(message: Message) -> Awaitable[None]:
            nonlocal started, died
            if not started and message["type"] == "http.response.start":
                died = message["status"] >= 500 and not self._replica.alive()
                started = True
                if died:
                    return _dead(send)
            return _nothing() if died else send(message)

        try:
            await self.app(scope, receive, watched)
        except Exception:
            if started or self._replica.alive():
                raise
            await _dead(send)


async def _nothing() -> None:
    pass


async def _dead(send: Send) -> None:
    await send_error(
        send, 503, "engine_dead", "the engine died and is being replaced: try again",
        kind="server_error", headers={"retry-after": "1"},
    )  # fmt: skip
