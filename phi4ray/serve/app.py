"""The online door of a replica: vLLM's application with what a service needs around it.

    HTTP → Observe (ids, log, metrics) → Gate (keys, limits) → Admit (KV tokens) → vLLM's app

Each layer is plain ASGI: vLLM's answers, streams included, pass through untouched.
"""

from starlette.types import ASGIApp, Receive, Scope, Send

from phi4ray.protocol import OnlineReplica
from phi4ray.serve import metrics
from phi4ray.serve.admission import Admission
from phi4ray.serve.admit import Admit
from phi4ray.serve.config import ServeConfig
from phi4ray.serve.gate import Gate
from phi4ray.serve.meter import Meter
from phi4ray.serve.observe import Observe
from phi4ray.serve.responses import send_error


class OnlineApp:
    """The ASGI application of one started replica."""

    def __init__(self, replica: OnlineReplica, config: ServeConfig) -> None:
        kv = replica.kv()
        meter = Meter()
        replica.on_finished = meter.finished
        self.admission = Admission(
            config.admission,
            capacity_tokens=kv.capacity_tokens,
            max_num_seqs=kv.max_num_seqs,
        )
        metrics.watch(self.admission)
        admit = Admit(Ready(replica.app, replica), self.admission, meter)
        self.gate = Gate(admit, config.gate, admit.demand)
        self._app: ASGIApp = Observe(self.gate)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection; see the ASGI specification."""
        await self._app(scope, receive, send)


class Ready:
    """Answers `/ready`: whether the engine is up. `/health` is vLLM's own."""

    def __init__(self, app: ASGIApp, replica: OnlineReplica) -> None:
        self.app = app
        self._replica = replica

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection; see the ASGI specification."""
        if scope["type"] != "http" or scope["path"] != "/ready":
            await self.app(scope, receive, send)
        elif self._replica.alive():
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b""})
        else:
            await send_error(
                send, 503, "engine_dead", "the engine died; the replica is being replaced",
                kind="server_error",
            )  # fmt: skip
