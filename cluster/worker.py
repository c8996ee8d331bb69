"""The Ray Data actor that answers shards: one replica, one event loop, several shards at once."""

import asyncio
import contextlib
import os
import platform
import threading
from collections import deque
from collections.abc import Coroutine, Iterable, Mapping
from concurrent.futures import CancelledError, Future
from typing import Any, TypeVar

import ray
import uvloop

from cluster.board import Idle
from cluster.environment import set_defaults
from phi4ray.batch.parts import Receipt
from phi4ray.batch.plan import Plan
from phi4ray.batch.planning import check_shared
from phi4ray.batch.worker import ShardWorker
from phi4ray.config import BatchConfig
from phi4ray.engines import make_replica
from phi4ray.errors import ConfigError, EngineDeadError, EngineStartError, Phi4rayError
from phi4ray.exporter import export_metrics
from phi4ray.protocol import Replica

REPORT_S = 0.5

NOTHING = ""
"""In place of a receipt, for a shard that was given up: Ray Data would hide an empty batch."""

T = TypeVar("T")


CLOSE_S = 10.0
"""So long a replica has to stop, before Ray kills what is left of it."""


class RayShardWorker:
    """A `ray.data.Dataset.map_batches` callable: shard indices in, receipts out.

    Ray Data lets go of it before its actor ends; the engine stops then, which else would be killed
    under vLLM's eyes and have it log an engine's failure at the end of each job.
    """

    def __init__(self, **arguments: Any) -> None:
        """See `ShardCalls`."""
        self._calls = ShardCalls(**arguments)

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, list[str]]:
        """See `ShardCalls.__call__`."""
        return self._calls(batch)

    def __del__(self) -> None:
        self._calls.close()


class ShardCalls:
    """What a `RayShardWorker` does, on an event loop that refers to it as long as it runs.

    Ray calls it from several threads at once, one a shard; all of them wait on one event loop, on
    which the replica runs.

    A worker whose engine cannot start leaves its shards to the others, and waits with them until
    the job ends. Ray would replace one that went, most likely on the same node, and hand all
    shards to one that returned; and it gives a shard to one worker only, through all its restarts.
    Where no other has an engine either, the calls raise why. So they do at once where the job's
    output is not to be seen from here.
    """

    def __init__(
        self, config: BatchConfig, plan: Any, board: Any, environment: Mapping[str, str]
    ) -> None:
        set_defaults(environment)
        # Ray allows as many threads as the actor has CPUs; vLLM knows better what its engine needs.
        os.environ.pop("OMP_NUM_THREADS", None)
        self._board = board
        self._name = ray.get_runtime_context().get_actor_id() or "driver"
        self._replica: Replica | None = None
        self._worker: ShardWorker | None = None
        self._left: set[int] = set()
        self._hopeless = asyncio.Event()
        self._running: set[Future[Any]] = set()
        self._stopped = False
        self._dying = threading.Lock()
        self._loop = uvloop.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="phi4ray", daemon=True).start()
        self._wrong_output: ConfigError | None = None
        job = ray.get(plan)
        try:
            check_shared(config, job, here())
        except ConfigError as error:
            # Not one node's bad luck, as an engine's is: every other node than the driver's has it,
            # and a job that goes on without them costs as much and takes many times as long. It is
            # known before the first engine is up, and the next run keeps what is done.
            self._wrong_output = error
            return
        try:
            self._worker = worker = self._wait(self._start(config, job))
        except Phi4rayError as error:
            self._failure = error
            telling = self._idle(error)
        else:
            telling = self._report(worker)
        self._run(telling)

    async def _start(self, config: BatchConfig, plan: Plan) -> ShardWorker:
        if not await self._board.starting.remote(self._name, here()):
            raise EngineStartError(
                "the worker's process, or its engine, died again and again and finished no shard: "
                "look at the memory of its node (processes that want more are killed without a "
                "word) and at the worker logs of this actor in the Ray dashboard. Smaller "
                "shard_rows or shards_in_flight take less memory"
            )
        self._replica = replica = make_replica(config.engine)
        export_metrics(ray.util.get_node_ip_address())
        await replica.start()
        await self._board.started.remote(self._name)
        return ShardWorker(config, plan, replica)

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, list[str]]:
        """Answer the shards in `batch["item"]`; gives their receipts as JSON in `receipt`.

        Then also a shard that a worker without an engine has left, if there is one.
        """
        if self._stopped:
            return {"receipt": [NOTHING]}
        shards, receipts = deque(map(int, batch["item"])), []
        try:
            if self._wrong_output is not None:
                raise self._wrong_output
            if self._worker is None:
                self._wait(self._leave(shards))
                raise self._failure
            while shards:
                receipts.append(self._wait(self._worker.run(shards.popleft())))
                left = ray.get(self._board.shard_finished.remote(self._name))
                if left is not None:
                    shards.append(left)
        except CancelledError:  # the driver said stop
            pass
        except Phi4rayError as error:
            if isinstance(error, EngineDeadError):
                with self._dying:  # all shards in flight see the one death, which counts once
                    if ray.get(self._board.engine_died.remote(self._name, str(error))):
                        # Ray restarts the actor, and gives it the shards that it had.
                        os._exit(1)
            ray.get(self._board.failed.remote(error))
            raise
        return {"receipt": [receipt.model_dump_json() for receipt in receipts] or [NOTHING]}

    def close(self) -> None:
        """Stop the replica, if there is one."""
        if self._replica is not None:
            with contextlib.suppress(TimeoutError):
                self._run(self._replica.stop()).result(CLOSE_S)

    def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        future = self._run(work)
        self._running.add(future)
        try:
            return future.result()
        finally:
            self._running.discard(future)

    def _run(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    async def _leave(self, shards: Iterable[int]) -> None:
        """Have others answer these shards; ends where there are no others."""
        self._left.update(shards)
        await self._hopeless.wait()

    async def _report(self, worker: ShardWorker) -> None:
        while True:
            with contextlib.suppress(ray.exceptions.RayActorError):  # the board is restarted
                if not await self._board.report.remote(self._name, worker.stats()):
                    self._stop()
            await asyncio.sleep(REPORT_S)

    async def _idle(self, error: Phi4rayError) -> None:
        node = here()
        node_id = ray.get_runtime_context().get_node_id()
        while True:
            with contextlib.suppress(ray.exceptions.RayActorError):  # the board is restarted
                idle = Idle(node, node_id, error, frozenset(self._left))
                if not await self._board.idles.remote(self._name, idle):
                    self._stop()
                elif await self._board.hopeless.remote():
                    self._hopeless.set()
            await asyncio.sleep(REPORT_S)

    def _stop(self) -> None:
        self._stopped = True  # Ray may have many more shards for this actor
        for future in list(self._running):
            future.cancel()


def here() -> str:
    """This node, as people are told of it."""
    return f"{platform.node()} ({ray.util.get_node_ip_address()})"


def receipts_of(batch: Mapping[str, Any]) -> list[Receipt]:
    """Decode what `RayShardWorker` gave."""
    return [Receipt.model_validate_json(text) for text in batch["receipt"] if text != NOTHING]
