"""What a fault campaign puts into the job's own processes: Python imports this file by itself.

It is on the PYTHONPATH of the driver, and so of its workers. It lets their wall clocks jump, and
has every answer of an engine leave a byte in a file, which outlives any SIGKILL.
"""

import importlib.util
import os
import random
import sys
import time
from functools import wraps
from importlib.abc import MetaPathFinder
from typing import Any

ANSWERS = os.environ.get("PHI4RAY_CHAOS_ANSWERS")
CLOCK_S = float(os.environ.get("PHI4RAY_CHAOS_CLOCK_S", "0"))
TOLD_OF = "phi4ray.batch.worker"


class _Clock:
    real = time.time
    random = random.Random(os.getpid())
    offset_s = until = 0.0


def jumping_time() -> float:
    """A wall clock that is set to another time every few seconds.

    A plain function of a module, as Ray pickles what holds `time.time`.
    """
    if time.monotonic() > _Clock.until:
        _Clock.until = time.monotonic() + _Clock.random.uniform(1, 10)
        _Clock.offset_s = _Clock.random.uniform(-CLOCK_S, CLOCK_S)
    return _Clock.real() + _Clock.offset_s


def count_answers(worker: Any, folder: str) -> None:
    """Have the replicas of `ShardWorker`s leave a byte for each answer with status 200."""
    start = worker.__init__

    @wraps(start)
    def starts(self: Any, config: Any, plan: Any, replica: Any) -> None:
        start(self, config, plan, replica)
        complete = replica.complete
        file = os.open(f"{folder}/{os.getpid()}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

        async def completes(endpoint: Any, body: Any) -> Any:
            answer = await complete(endpoint, body)
            if answer.status == 200:
                os.write(file, b".")
            return answer

        replica.complete = completes

    worker.__init__ = starts


class _AtImport(MetaPathFinder):
    """Changes `ShardWorker` where it is imported, and imports nothing where it is not."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name != TOLD_OF:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        assert spec is not None
        loader: Any = spec.loader
        load = loader.exec_module

        def loads(module: Any) -> None:
            load(module)
            count_answers(module.ShardWorker, str(ANSWERS))

        loader.exec_module = loads
        return spec


if ANSWERS:
    sys.meta_path.insert(0, _AtImport())
if CLOCK_S:
    time.time = jumping_time
