"""The fine-tune on Ray: Ray Train hosts the workers, one a GPU, and replaces lost ones."""

import os
import queue
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

import ray
import ray.train
from ray.train.torch import TorchTrainer

from cluster.batch import ENVIRONMENT, translated
from cluster.environment import set_defaults
from phi4ray.batch.executor import in_thread
from phi4ray.errors import ConfigError, DivergedError, Phi4rayError
from phi4ray.train.config import FinetuneConfig
from phi4ray.train.curve import Point
from phi4ray.train.host import Stopped

POLL_S = 0.5


class Board:
    """A small actor: the curve's points on their way to the driver, and its word to stop."""

    def __init__(self) -> None:
        self._points: list[Point] = []
        self._stopping = False
        self._failure: Phi4rayError | None = None

    def put(self, point: Point) -> bool:
        """Take a point from a worker; returns whether it shall go on."""
        self._points.append(point)
        return not self._stopping

    def take(self) -> list[Point]:
        """The points since the last call."""
        taken, self._points = self._points, []
        return taken

    def failed(self, error: Phi4rayError) -> None:
        """Note an error that another try would meet again."""
        self._failure = self._failure or error

    def failure(self) -> Phi4rayError | None:
        """The first of them."""
        return self._failure

    def stop(self) -> None:
        """Have workers stop, those too that are started after this."""
        self._stopping = True

    def stopping(self) -> bool:
        """Whether `stop` was called."""
        return self._stopping


class RayHost:
    """A `phi4ray.train.host.Host` on the Ray cluster that this process is connected to."""

    def train(self, config: FinetuneConfig) -> Iterator[Point | None]:
        """See `phi4ray.train.host.Host.train`."""
        board = ray.remote(num_cpus=0)(Board).remote()
        ended: queue.SimpleQueue[Point] = queue.SimpleQueue()
        trainer = _trainer(config, board)
        try:
            for _ in in_thread(trainer.fit, ended, lambda: ray.get(board.stop.remote())):
                yield from ray.get(board.take.remote())
                yield None
            yield from ray.get(board.take.remote())
            if failure := ray.get(board.failure.remote()):
                raise failure
        except ray.train.TrainingFailedError as error:
            raise _cause(error) from error
        finally:
            ray.kill(board)


def _trainer(config: FinetuneConfig, board: Any) -> TorchTrainer:
    resources = {"CPU": config.cpus_per_worker}
    if config.gpus_per_worker:
        resources["GPU"] = config.gpus_per_worker
    return TorchTrainer(
        _work,
        train_loop_config={
            "config": config,
            "board": board,
            "environment": {name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
        },
        scaling_config=ray.train.ScalingConfig(
            num_workers=config.num_workers,
            use_gpu=config.gpus_per_worker > 0,
            resources_per_worker=resources,
        ),
        run_config=ray.train.RunConfig(
            # Nothing of value is kept there: checkpoints go to the output prefix.
            storage_path=os.path.join(tempfile.gettempdir(), "phi4ray-train"),
            failure_config=ray.train.FailureConfig(max_failures=config.max_failures),
        ),
    )


def _work(given: Mapping[str, Any]) -> None:
    """One worker: `phi4ray.train.trainer.train`, in the environment of the driver."""
    set_defaults(given["environment"])
    board = given["board"]
    if ray.get(board.stopping.remote()):
        return
    from phi4ray.train.trainer import train

    def report(point: Point) -> None:
        if not ray.get(board.put.remote(point)):
            raise Stopped

    try:
        train(given["config"], report)
    except (ConfigError, DivergedError) as error:
        ray.get(board.failed.remote(error))


def _cause(error: Any) -> BaseException:
    """The error that a worker raised on purpose, out of those that Ray collected."""
    failures = [*getattr(error, "worker_failures", {}).values(), error]
    return translated(failures[0])
