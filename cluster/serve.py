"""The Ray Serve application: replicas of one engine, and what stands in front of them.

    client → HAProxy → Phi4Replica (its own HTTP server, on its own port)
                 └──── RoutePicker: which replica has this prompt's prefix
    object store → BatchRunner: what was asked for at /v1/batches

HAProxy and the direct way to the replicas are Serve's, switched on for a cluster before Ray
starts by `cluster.environment.SERVING`. Without it Serve's own proxy stands there, and every
chunk of every stream makes two more hops.
"""

import asyncio
import logging
import os
import time
from collections.abc import Mapping
from typing import Any

import ray
from ray import serve
from ray.serve._private.constants import RAY_SERVE_ENABLE_HA_PROXY
from ray.serve.config import RequestRouterConfig
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import LoggingConfig

from cluster.autoscaling import autoscaling_config, load_stats
from cluster.batches import batch_runner
from cluster.draining import follow_draining
from cluster.gpus import cluster_gpus
from cluster.harvest import host_shards
from cluster.limits import share_limits
from cluster.routing import KVRouter, route_picker
from phi4ray.config import EngineConfig
from phi4ray.engines import make_replica
from phi4ray.errors import EngineDeadError
from phi4ray.exporter import export_metrics
from phi4ray.fit import cards, refuse_misfit
from phi4ray.serve.app import OnlineApp
from phi4ray.serve.autoscaling import ReplicaLoad
from phi4ray.serve.config import ServeConfig, serve_config
from phi4ray.serve.observe import log_to_stderr
from phi4ray.serve.shards import ShardHost

# Read in the replica's process only. One event loop for HTTP and engine client: a hop between
# threads for every chunk of every stream costs more than the chunk.
_REPLICA_ENVIRONMENT = {"RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0"}

ENGINE_LOOK_S = 0.25

logger = logging.getLogger(__name__)


@serve.ingress()
class Phi4Replica:
    """One vLLM engine behind one HTTP server."""

    async def __init__(  # type: ignore[misc]
        self, config: ServeConfig, *beside: DeploymentHandle
    ) -> None:
        """What runs beside the replicas is given only to be a part of the application."""
        log_to_stderr()
        # Ray allows as many threads as the actor has CPUs; vLLM knows better what it needs.
        os.environ.pop("OMP_NUM_THREADS", None)
        self._replica: Any = make_replica(engine_of(config))
        # Before the engine: one that cannot start is seen as well.
        export_metrics(ray.util.get_node_ip_address())
        await self._replica.start()
        self._app = OnlineApp(self._replica, config)
        here = serve.get_replica_context()
        self._watch = asyncio.create_task(self._exit_with_the_engine())
        if config.gate.keys_file is not None:
            self._sharing = asyncio.create_task(
                share_limits(here.app_name, here.replica_id.unique_id, self._app.gate.limiter)
            )
        host = ShardHost(
            here.replica_id.unique_id, config.engine, self._app.batch_replica, self._app.harvest
        )
        if self._app.sleeper is not None:
            self._sleeping = asyncio.create_task(self._app.sleeper.watch())
        self._hosting = asyncio.create_task(host_shards(here.app_name, host))
        self._draining = asyncio.create_task(follow_draining(here.replica_id, host.drain))

    async def _exit_with_the_engine(self) -> None:
        # Serve notices a dead process at once, and an unhealthy replica after three looks.
        while self._replica.alive():
            await asyncio.sleep(ENGINE_LOOK_S)
        logger.error("the vLLM engine died; its log above says why. Serve starts another replica")
        await asyncio.sleep(1.0)  # until all that were waiting for it are told
        os._exit(1)

    def __serve_build_asgi_app__(self) -> OnlineApp:
        """Serve calls this once, after the constructor."""
        return self._app

    def check_health(self) -> None:
        """Serve replaces a replica that raises here.

        Raises:
            EngineDeadError: the engine died.
        """
        if not self._replica.alive():
            raise EngineDeadError("the vLLM engine died; its log above says why")

    def record_autoscaling_stats(self) -> dict[str, float]:
        """What `cluster.autoscaling` decides by."""
        admission, harvest = self._app.admission, self._app.harvest
        return load_stats(
            ReplicaLoad(
                admission.capacity_tokens,
                admission.used_tokens,
                admission.queued_tokens,
                admission.arrived_tokens_per_s,
                admission.released_tokens_per_s,
                harvest.tokens,
                harvest.rows + harvest.all_waiting,
                admission.arrived_squares_per_s,
            )
        )

    def record_routing_stats(self) -> dict[str, float]:
        """What the router weighs."""
        admission = self._app.admission
        return {
            "at_s": time.time(),
            "capacity_tokens": admission.capacity_tokens,
            "demand_tokens": admission.used_tokens + admission.queued_tokens,
        }


def engine_of(config: ServeConfig) -> EngineConfig:
    """The engine's configuration with what serving needs.

    Batch rows stand behind online requests, and where replicas are to sleep the engine must know.
    """
    engine = config.engine
    wanted: dict[str, Any] = {}
    if engine.kind == "vllm":
        wanted["scheduling_policy"] = "priority"
    if config.autoscaling.sleep_delay_s is not None:
        wanted["enable_sleep_mode"] = True
    return engine.model_copy(update={"engine_args": {**wanted, **engine.engine_args}})


def application(config: ServeConfig) -> serve.Application:
    """Bind the deployments of one service."""
    engine = config.engine
    ongoing = engine.max_num_seqs + config.admission.max_queued_requests + 1000
    replicas = serve.deployment(
        Phi4Replica,
        name="replica",
        # Admission bounds what runs and what waits; Serve is not to do so before it.
        max_ongoing_requests=ongoing,
        graceful_shutdown_timeout_s=config.drain_timeout_s,
        health_check_period_s=5,
        ray_actor_options={
            "num_cpus": engine.num_cpus,
            "num_gpus": engine.gpus_per_replica,
            "runtime_env": {"env_vars": {**_REPLICA_ENVIRONMENT, **engine.env}},
        },
        logging_config=LoggingConfig(enable_access_log=False),
    )
    least, most = config.autoscaling.widest
    if least == most:
        replicas = replicas.options(num_replicas=most)
    else:
        replicas = replicas.options(
            num_replicas="auto", autoscaling_config=autoscaling_config(config)
        )
    beside = [batch_runner(config)] if config.batches is not None else []
    # One replica needs no choice, and its requests no hop to who makes it.
    if most == 1:
        return replicas.bind(config, *beside)
    routed = replicas.options(
        request_router_config=RequestRouterConfig(
            request_router_class=KVRouter,
            request_router_kwargs={"routing": config.routing.model_dump()},
            request_routing_stats_period_s=config.routing.stats_period_s,
        )
    ).bind(config, *beside)
    if RAY_SERVE_ENABLE_HA_PROXY:
        routed = routed._with_ingress_request_router(route_picker(routed, config.drain_timeout_s))
    return routed


def app(args: Mapping[str, Any]) -> serve.Application:
    """Build the application from a Serve config file: `import_path: cluster.serve:app`.

    `args` are what `phi4ray.serve.config.serve_config` takes.

    Raises:
        ConfigError: names every field that is wrong, or the engine does not fit on the cards of
            the nodes that are up.
    """
    config = serve_config(args)
    if ray.is_initialized():  # Serve builds it on the cluster
        refuse_misfit(config.engine, cards(None, cluster_gpus(), None))
    return application(config)
