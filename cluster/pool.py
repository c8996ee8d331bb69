"""Ray Data as the job uses it: shard indices through an autoscaling pool of workers."""

import math
import time
from collections.abc import Collection, Mapping, Sequence
from contextvars import ContextVar
from typing import Any

import ray
import ray.data

from phi4ray.config import EngineConfig
from phi4ray.errors import ClusterError


class End:
    """When an execution shall end by itself, in `time.monotonic`'s seconds."""

    def __init__(self) -> None:
        self.at = math.inf


this_end: ContextVar[End | None] = ContextVar("this_end", default=None)
"""Of the execution that this thread begins."""


class Ending:
    """A callback of Ray Data's that ends its execution in time.

    Its consumer could only do so at a result, and there is none before the first replica is ready.
    Ray makes one for each execution, in the thread that begins it.
    """

    def __init__(self) -> None:
        self._end = this_end.get() or End()

    def before_execution_starts(self, executor: Any) -> None:
        """Do nothing."""

    def on_execution_step(self, executor: Any) -> None:
        """End the execution, if it is time."""
        if time.monotonic() > self._end.at:
            raise ClusterError("the job was stopped")

    def after_execution_succeeds(self, executor: Any) -> None:
        """Do nothing."""

    def after_execution_fails(self, executor: Any, error: Exception) -> None:
        """Do nothing."""


def through_workers(
    worker: Any,
    arguments: Mapping[str, Any],
    shards: Sequence[int],
    engine: EngineConfig,
    *,
    fewest: int,
    first: int,
    most: int,
    at_once: int,
    broken: Collection[str],
) -> Any:
    """Give the dataset of what workers return of shards; one block, hence one task, a shard.

    The `first` workers start together; Ray Data adds others one by one, each when those before
    have started and have their shards. `at_once` shards are with a worker at a time. On the nodes
    `broken`, by their ids, none is started if others could have one.
    """
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.max_consecutive_actor_init_deaths = 3
    context.custom_execution_callback_classes = [Ending]
    # A pool whose every replica has its shards is due for one more.
    context.autoscaling_config.actor_pool_util_upscaling_threshold = 1.0
    items = ray.data.from_items(list(shards), override_num_blocks=len(shards))
    return items.map_batches(
        worker,
        fn_constructor_kwargs=arguments,
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(
            min_size=fewest,
            initial_size=first,
            max_size=most,
            max_tasks_in_flight_per_actor=at_once,
            max_concurrent_calls_per_actor=at_once,
            enable_true_multi_threading=True,
        ),
        num_gpus=engine.gpus_per_replica,
        num_cpus=engine.num_cpus,
        label_selector=_elsewhere(engine, broken),
    )


def _elsewhere(engine: EngineConfig, broken: Collection[str]) -> dict[str, str]:
    wanted = {"GPU": engine.gpus_per_replica, "CPU": engine.num_cpus}
    others = (
        node["Resources"] for node in ray.nodes() if node["Alive"] and node["NodeID"] not in broken
    )
    if broken and any(
        all(has.get(name, 0) >= amount for name, amount in wanted.items()) for has in others
    ):
        return {"ray.io/node-id": f"!in({','.join(sorted(broken))})"}
    return {}
