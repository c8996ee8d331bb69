"""The reconcile loop of the Batch API: what the store says is to be done, is done.

    open batches in the store ─▶ a look at each ─▶ its next step, in a thread ─▶ state in the store

It keeps nothing that it could not find again: it may die at any point, and another one goes on.
"""

import logging
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor

from phi4ray.batch.executor import threaded
from phi4ray.batches import states
from phi4ray.batches.config import DAY_S, BatchesConfig
from phi4ray.batches.executors import Executors
from phi4ray.batches.job import InterruptedJob, Job, Step, next_step
from phi4ray.batches.records import BatchRequest, BatchState, age_s
from phi4ray.batches.store import Key, Store
from phi4ray.batches.sweep import sweep
from phi4ray.batches.turns import turns
from phi4ray.config import EngineConfig
from phi4ray.errors import Phi4rayError, StorageError

QUICK_JOBS = 4
"""Batches that are validated, stopped or tidied at once: these wait for no engine."""

logger = logging.getLogger(__name__)


class Runner:
    """Carries the batches of one store through, on the engine of one service."""

    def __init__(
        self,
        config: BatchesConfig,
        engine: EngineConfig,
        executors: Executors,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Raises:
        ConfigError: there is no such kind of store.
        """
        self._config, self._engine, self._executors = config, engine, executors
        self._clock = clock
        self._store = Store(config.store)
        self._wake, self._closed = threading.Event(), threading.Event()
        self._lock = threading.Lock()
        self._running: dict[Key, Job] = {}
        self._known: dict[Key, tuple[BatchRequest, BatchState]] = {}
        # By the monotonic clock: a wall clock that is set back would make pauses of it.
        self._not_before_s: dict[Key, float] = {}
        self._swept_s = -math.inf
        threads = config.max_concurrent_batches + QUICK_JOBS + 1
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="phi4ray-batch")

    def run(self) -> None:
        """Look again and again, until `close`."""
        try:
            while not self._closed.is_set():
                self._guarded(self.look)
                self._wake.wait(self._config.poll_interval_s)
                self._wake.clear()
        finally:
            self._pool.shutdown()

    def close(self) -> None:
        """Stop looking, and leave what runs to the next runner. May be called from any thread."""
        self._closed.set()
        with self._lock:
            for job in self._running.values():
                job.interrupted = True
        self._wake.set()

    def look(self) -> None:
        """One look at the store: begins what is to be done and finds room.

        Raises:
            StorageError: the store cannot be read.
        """
        now_s = self._clock()
        cancels = self._store.cancels()
        batches = self._store.open_batches()
        for key in set(self._known) - set(batches):
            self._known.pop(key, None)
        with self._lock:
            running = dict(self._running)
        for key, job in running.items():
            job.cancelled = key in cancels
        waiting = [key for key in batches if key not in running and self._due(key)]
        self._read(waiting, now_s)
        steps = {
            key: self._step(key, key in cancels, now_s) for key in waiting if key in self._known
        }
        self._take_turns(steps, running, cancels)
        if time.monotonic() - self._swept_s >= self._config.sweep_interval_s:
            self._swept_s = time.monotonic()
            self._pool.submit(self._guarded, self.sweep)

    def answering(self) -> int:
        """How many batches are being answered."""
        with self._lock:
            return sum(job.step == "answer" for job in self._running.values())

    def _due(self, key: Key) -> bool:
        return time.monotonic() >= self._not_before_s.get(key, -math.inf)

    def _read(self, keys: Sequence[Key], now_s: float) -> None:
        """Read the records of batches that are not known: of hundreds, after a start."""

        def read(key: Key) -> None:
            try:
                request = self._store.request(key)
                if request is not None:
                    self._known[key] = (request, self._store.state(key))
                elif age_s(key.id, now_s) > DAY_S:  # its door died, long ago
                    self._store.close_batch(key)
            except StorageError as error:
                self._postpone(key, error)  # the others need not wait for it

        threaded(read, [key for key in keys if key not in self._known])

    def _step(self, key: Key, cancelled: bool, now_s: float) -> Step:
        request, state = self._known[key]  # its job is over: nobody else touches it
        # Whether it is stopped decides where it runs; the job looks by itself, and writes it down.
        cancel_at = int(now_s) if cancelled else None
        return next_step(states.looked_at(state, request, cancel_at, now_s))

    def _take_turns(
        self, steps: Mapping[Key, Step], running: Mapping[Key, Job], cancels: Set[Key]
    ) -> None:
        at_work = {key: job for key, job in running.items() if job.step == "answer"}
        stay = [key for key, job in at_work.items() if not job.interrupted]
        answer = [key for key, step in steps.items() if step == "answer"]
        room = self._config.max_concurrent_batches - len(at_work)
        answers = turns(answer, stay, room, len(at_work) - len(stay))
        quick = [key for key, step in steps.items() if step != "answer"]
        others = [key for key in running if key not in at_work]
        for key in answers.begin + turns(quick, others, QUICK_JOBS - len(others)).begin:
            self._begin(key, steps[key], key in cancels)
        for key in answers.leave:
            logger.info("%s makes room for another owner's batch", key.id)
            running[key].interrupted = True

    def _begin(self, key: Key, step: Step, cancelled: bool) -> None:
        job = Job(
            self._store, key, self._known[key][0], step, self._config, self._engine,
            self._executors, self._clock,
        )  # fmt: skip
        job.cancelled = cancelled
        with self._lock:
            if self._closed.is_set():
                return
            self._running[key] = job
        self._pool.submit(self._run, key, job)

    def _run(self, key: Key, job: Job) -> None:
        self._not_before_s.pop(key, None)
        try:
            job.run()
            self._known[key] = (job.request, job.state)
        except InterruptedJob:
            self._known.pop(key, None)
        except Exception as error:
            self._known.pop(key, None)
            self._postpone(key, error)
        finally:
            with self._lock:
                del self._running[key]
            self._wake.set()

    def _postpone(self, key: Key, error: Exception) -> None:
        wait_s = self._config.retry_interval_s
        self._not_before_s[key] = time.monotonic() + wait_s
        logger.error(
            "%s is taken up again in %g s: %s: %s", key.id, wait_s, type(error).__name__, error,
            exc_info=not isinstance(error, Phi4rayError),
        )  # fmt: skip

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Phi4rayError as error:
            logger.error("batches wait for the store: %s", error)
        except Exception:  # one bad look must not be the last
            logger.exception("a look at the batches failed")

    def sweep(self) -> None:
        """See `phi4ray.batches.sweep`."""
        sweep(self._store, self._clock())
