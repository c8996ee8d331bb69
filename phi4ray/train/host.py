"""Where a fine-tune's workers run: the seam between the job and whatever hosts them.

`cluster.train.RayHost` runs them on Ray Train; `InProcessHost` runs one here, in this process.
"""

import queue
import threading
from collections.abc import Iterator
from typing import Protocol

from phi4ray.batch.executor import in_thread
from phi4ray.train.config import FinetuneConfig
from phi4ray.train.curve import Point


class Host(Protocol):
    """Runs the workers."""

    def train(self, config: FinetuneConfig) -> Iterator[Point | None]:
        """Train to the end; yields the points of the loss curve as they come, and None now and
        then so that the caller can show that time passes. Closing the iterator stops the work.

        Raises:
            ClusterError: workers are lost again and again.
            Phi4rayError: whatever a worker raised.
        """
        ...


class Stopped(Exception):
    """Raised into a worker whose driver has gone away."""


class InProcessHost:
    """One worker in this process: tests, laptops, and a single GPU without a cluster."""

    def train(self, config: FinetuneConfig) -> Iterator[Point | None]:
        """See `Host.train`."""
        from phi4ray.train.trainer import train

        points: queue.SimpleQueue[Point] = queue.SimpleQueue()
        stopping = threading.Event()

        def report(point: Point) -> None:
            if stopping.is_set():
                raise Stopped
            points.put(point)

        yield from in_thread(lambda: train(config, report), points, stopping.set)
