"""Ray Serve's autoscaling hook: `phi4ray.serve.autoscaling` fed with what replicas tell."""

import dataclasses
import logging
import time
from collections.abc import Mapping
from concurrent.futures import Future
from typing import Any

import ray
from ray.serve.config import AutoscalingConfig, AutoscalingContext, AutoscalingPolicy
from ray.util.metrics import Gauge

from cluster.harvest import job_board
from phi4ray.config import EngineConfig
from phi4ray.serve.autoscaling import CAUSES, AutoscalingPolicyConfig, ReplicaLoad, decide
from phi4ray.serve.config import ServeConfig

STATS_S = 1.0
STATS = tuple(field.name for field in dataclasses.fields(ReplicaLoad))

logger = logging.getLogger("ray.serve")


def load_stats(load: ReplicaLoad) -> dict[str, float]:
    """A replica's load as numbers by name, as `record_autoscaling_stats` gives them."""
    return dataclasses.asdict(load)


class OpenShards:
    """What batch jobs still want answered, asked of their board and never waited for.

    Where no replica runs nobody else tells the board what one would run.
    """

    def __init__(self, engine: EngineConfig, batch_replicas: int) -> None:
        self._engine = engine
        self._batch_replicas = batch_replicas
        self._board: Any = None
        self._asked_s = -STATS_S
        self._answer: Future[int] | None = None
        self._known = 0

    def look(self, application: str) -> int:
        """The newest answer; asks again after `STATS_S`."""
        if self._answer is not None and self._answer.done():
            try:
                self._known = self._answer.result()
            except ray.exceptions.RayError:
                logger.warning("the actor of batch jobs is away")
                self._board = None
            self._answer = None
        now_s = time.monotonic()  # a clock may be set back
        if self._answer is None and now_s - self._asked_s >= STATS_S:
            self._asked_s = now_s
            self._board = self._board or job_board(application)
            asked = self._board.open_shards.remote(self._engine, self._batch_replicas)
            self._answer = asked.future()
        return self._known


class ScaleByTokens:
    """Serve makes one in its controller, and calls it several times a second.

    Around it Serve keeps the bounds of its own configuration, which are the widest that the
    schedule ever has, and starts the first replica itself when a request waits for one.
    """

    def __init__(self, policy: Mapping[str, Any], engine: Mapping[str, Any]) -> None:
        self._config = AutoscalingPolicyConfig.model_validate(policy)
        self._open_shards = OpenShards(
            EngineConfig.model_validate(engine), self._config.batch_replicas
        )
        self._problem = ""
        self._desired = Gauge(
            "phi4ray_desired_replicas", "Replicas that autoscaling wants", ("application",)
        )
        self._cause = Gauge(
            "phi4ray_desired_replicas_cause",
            "1 for why it wants as many as it last decided, 0 for the other causes",
            ("application", "cause"),
        )
        self._bounds = Gauge(
            "phi4ray_replicas_bound", "Fewest and most replicas now", ("application", "bound")
        )

    def __call__(self, context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        """How many replicas there should be, and the state for the next call."""
        try:
            decided = self._decided(context)
        except Exception as error:
            # Serve's controller would leave off with all that it does for any application.
            if repr(error) != self._problem:
                self._problem = repr(error)
                logger.exception(
                    "autoscaling failed; %d replicas stay", context.target_num_replicas
                )
            return context.target_num_replicas, context.policy_state or {}
        self._problem = ""
        return decided

    def _decided(self, context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        stats = context.aggregated_metrics or {}
        told = [stats.get(name, {}) for name in STATS]
        loads = [
            ReplicaLoad(*(float(values.get(replica, 0.0)) for values in told))
            for replica in context.running_replicas
            if replica in told[0]
        ]
        now = context.target_num_replicas
        decision = decide(
            self._config,
            loads,
            target=now,
            # With replicas there, Serve's count is of requests that are on their way to one.
            held_requests=0.0 if context.running_replicas else context.total_num_requests,
            open_shards=self._open_shards.look(context.app_name or ""),
            now_s=context.current_time,
            state=context.policy_state,
        )
        application = {"application": context.app_name or ""}
        self._desired.set(decision.replicas, tags=application)
        for cause in CAUSES:
            self._cause.set(float(cause == decision.cause), tags={**application, "cause": cause})
        for bound, replicas in zip(
            ("min", "max"), self._config.bounds(context.current_time), strict=True
        ):
            self._bounds.set(replicas, tags={**application, "bound": bound})
        if decision.replicas != now:
            # Serve's controller shows warnings and keeps the rest in a file.
            logger.warning(
                "%d -> %d replicas (%s): %s",
                now,
                decision.replicas,
                decision.cause,
                decision.reason,
            )
        return decision.replicas, decision.state


def autoscaling_config(config: ServeConfig) -> AutoscalingConfig:
    """Serve's configuration that calls `ScaleByTokens` for this application."""
    least, most = config.autoscaling.widest
    return AutoscalingConfig(
        min_replicas=least,
        max_replicas=most,
        initial_replicas=max(least, 1),
        metrics_interval_s=STATS_S,
        look_back_period_s=2 * STATS_S,
        upscale_delay_s=0,
        downscale_delay_s=0,
        policy=AutoscalingPolicy(
            policy_function="cluster.autoscaling:ScaleByTokens",
            policy_kwargs={
                "policy": config.autoscaling.model_dump(mode="json"),
                "engine": config.engine.model_dump(mode="json"),
            },
        ),
    )
