"""Workers whose engine cannot start, or dies and cannot start again, or tells when it is stopped.

Importable by Ray's processes. Which of them it is they settle by a file: the first one there.
"""

import asyncio
from pathlib import Path
from typing import Any

from cluster.batch import RayExecutor
from cluster.worker import RayShardWorker, ShardCalls
from phi4ray.batch.plan import Plan
from phi4ray.batch.worker import ShardWorker
from phi4ray.config import BatchConfig, EngineConfig
from phi4ray.errors import EngineDeadError, EngineStartError

REASON = "no CUDA-capable device is detected"


def first(config: BatchConfig, name: str) -> bool:
    """Whether this process is the first one to ask so."""
    try:
        (Path(config.output).parent / name).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


class Broken(ShardCalls):
    """The first worker has no engine."""

    async def _start(self, config: BatchConfig, plan: Plan) -> ShardWorker:
        if first(config, "broken"):
            await self._board.starting.remote(self._name)
            raise EngineStartError(REASON)
        return await super()._start(config, plan)


class Elsewhere(ShardCalls):
    """A worker on a node with a disk of its own."""

    def __init__(self, config: BatchConfig, **others: Any) -> None:
        elsewhere = str(Path(config.output).parent / "elsewhere")
        super().__init__(config.model_copy(update={"output": elsewhere}), **others)


class Breaking(ShardCalls):
    """The first worker to have a shard loses its engine with it, and has none after that."""

    def __init__(self, config: BatchConfig, **others: Any) -> None:
        self._config = config
        super().__init__(config, **others)

    async def _start(self, config: BatchConfig, plan: Plan) -> ShardWorker:
        me = Path(config.output).parent / self._name
        if me.exists():
            await self._board.starting.remote(self._name)
            raise EngineStartError(REASON)
        worker = await super()._start(config, plan)
        if first(config, "breaking"):
            me.touch()
            self._shards = len(plan.shards)
            worker.run = self._die  # type: ignore[method-assign]
        return worker

    async def _die(self, index: int) -> Any:
        raise EngineDeadError(f"the engine died in shard {index}")


class BreakingLast(Breaking):
    """It does so when its own shards are the only ones left."""

    async def _die(self, index: int) -> Any:
        output, held = Path(self._config.output), self._config.shards_in_flight or 1
        while len(list(output.glob("part-*"))) < self._shards - held:
            await asyncio.sleep(0.1)
        await asyncio.sleep(2.0)  # the other one is let go
        return await super()._die(index)


class Counting(ShardCalls):
    """A worker that notes how many had begun to start when its engine was up."""

    async def _start(self, config: BatchConfig, plan: Plan) -> ShardWorker:
        folder = Path(config.output).parent
        (folder / f"begun-{self._name}").touch()
        worker = await super()._start(config, plan)
        (folder / f"up-{self._name}").write_text(str(len(list(folder.glob("begun-*")))))
        return worker


class Telling(RayShardWorker):
    """A `Counting` that leaves a file when its replica is stopped."""

    def __init__(self, config: BatchConfig, **others: Any) -> None:
        self._calls = Counting(config, **others)
        file = Path(config.output).parent / f"stopped-{self._calls._name}"

        async def stop() -> None:  # which does not refer to this worker: Ray lets go of it
            file.touch()

        self._calls._replica.stop = stop  # type: ignore[union-attr, method-assign]


class Several(RayExecutor):
    """Two replicas on a node."""

    def __init__(self, worker: type[Any], *arguments: Any) -> None:
        super().__init__(*arguments)
        self.worker = worker

    def _fits(self, engine: EngineConfig) -> int:
        return 2
