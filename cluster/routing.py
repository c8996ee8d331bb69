"""Routing on Ray Serve's hooks: `phi4ray.serve.routing` behind its request router class.

With HAProxy, the load balancer asks a `RoutePicker` for the replica of each POST request and
then talks to that replica itself; the picker asks the router class by the deployment's handle.
"""

import asyncio
import json
import logging
from typing import Any

from ray import serve
from ray.serve.handle import DeploymentHandle
from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica
from ray.serve.schema import LoggingConfig
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from cluster.draining import exit_with_the_application
from phi4ray.demand import prompt_of
from phi4ray.protocol import Json
from phi4ray.serve.routing import Load, PrefixRouter, RoutingConfig, likely_demand

# What HAProxy is told when there is no replica: one that it does not know either. It then asks
# Serve's own proxy, which holds the request until autoscaling has started one.
NOBODY = "none"
# A pick takes milliseconds; one that waits, as in the moment in which a service of one replica is
# replaced, waits better in Serve's own proxy, which has no limit to it: HAProxy has.
PICK_TIMEOUT_S = 2
# How long HAProxy keeps an idle connection: `keep_alive_timeout_s` of Serve's `http_options`.
KEEP_ALIVE_S = 90

logger = logging.getLogger(__name__)


class KVRouter(RequestRouter):
    """Serve's request router class: the replica with the prefix, or the emptiest one."""

    def initialize_state(self, routing: dict[str, Any]) -> None:
        """Serve calls this with `request_router_kwargs`."""
        self._router = PrefixRouter(RoutingConfig.model_validate(routing))
        self._names: set[str] = set()

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """See `ray.serve.request_router.RequestRouter.choose_replicas`."""
        if not candidate_replicas:
            return []
        replicas = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        if gone := self._names - set(replicas):
            self._router.forget(gone)
        self._names = set(replicas)
        args = pending_request.args if pending_request is not None else ()
        body = args[0] if args and isinstance(args[0], dict) else {}
        loads = {name: load_of(replica.routing_stats) for name, replica in replicas.items()}
        demand = likely_demand(body)
        # Ranks: when the first refuses, the next is asked.
        return [[replicas[name]] for name in self._router.rank(prompt_of(body), demand, loads)]


def load_of(stats: dict[str, float]) -> Load:
    """What a replica told by `record_routing_stats`; a new one has told nothing yet."""
    return Load(
        capacity_tokens=stats.get("capacity_tokens", 1.0),
        demand_tokens=stats.get("demand_tokens", 0.0),
        at_s=stats.get("at_s", 0.0),
    )


class RoutePicker:
    """Answers HAProxy's `POST /internal/route` with the replica for a request's body."""

    async def __init__(self, replicas: DeploymentHandle) -> None:  # type: ignore[misc]
        self._handle = replicas
        self._handle._init()
        here = serve.get_replica_context().replica_id
        self._leaving = asyncio.create_task(exit_with_the_application(here))

    def __serve_build_asgi_app__(self) -> Starlette:
        """Serve calls this once, after the constructor."""
        return Starlette(routes=[Route("/internal/route", self._route, methods=["POST"])])

    async def _route(self, request: Request) -> Response:
        return JSONResponse({"replica_id": await self._pick(await request.body())})

    async def _pick(self, body: bytes) -> str:
        request = decoded(body)
        if not self._handle.running_replicas_populated():
            return NOBODY
        try:
            async with (
                asyncio.timeout(PICK_TIMEOUT_S),
                self._handle.choose_replica(request, _reserve=False) as selection,
            ):
                return str(selection._replica.replica_id.to_full_id_str())
        except Exception as error:  # whatever it is, Serve's own proxy can do without this
            logger.warning("no replica for a request: %s", str(error) or "none is running")
            return NOBODY


def decoded(body: bytes) -> Json:
    """A request's body; one that was cut off at the proxy's limit is taken as a prompt."""
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        return {"prompt": body.decode("utf-8", "replace")}
    return value if isinstance(value, dict) else {}


def route_picker(replicas: serve.Application, drain_timeout_s: float) -> serve.Application:
    """The router's deployment, to stand beside every proxy.

    Each deployment of the application replaces its routers and starts a new HAProxy. The old one
    goes on with the connections that it has, knows the old routers only, and answers 503 without
    one: it asks for the next request of a client whose stream has ended, or that had paused. So an
    old router stays for as long as a stream may last, and a connection may be idle after it.
    """
    linger_s = drain_timeout_s + KEEP_ALIVE_S
    return serve.deployment(
        serve.ingress()(RoutePicker),
        name="router",
        max_ongoing_requests=10_000,
        max_surge_percent=100,  # the new ones are there before the old ones leave
        graceful_shutdown_wait_loop_s=linger_s,
        graceful_shutdown_timeout_s=linger_s + 30,
        ray_actor_options={"num_cpus": 0},
        logging_config=LoggingConfig(enable_access_log=False),
    ).bind(replicas)
