"""The reads of one worker: several at once, those of one file one by one in the order of its rows.

Files that are read forward, see `phi4ray.batch.files.Reader`, are opened anew for what lies behind
them, so that of the slices which wait for one file the first goes first. Shards queue up before
they know whether they have to be read: then those that begin together are in order.
"""

import asyncio
import contextlib
from bisect import insort
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from threading import Lock
from typing import Generic, TypeVar

from phi4ray.batch.plan import Input, Slice

T = TypeVar("T")

SMALL_BYTES = 1 << 20
SMALL_AT_ONCE, LARGE_AT_ONCE = 16, 4
"""Reading small files is waiting for the store; of larger ones, each read takes memory."""


@dataclass(eq=False, slots=True)
class _Turn(Generic[T]):
    piece: Slice
    ready: bool = False
    result: "Future[T]" = field(default_factory=Future)


class Reads(Generic[T]):
    """Reads slices with one function, in threads of its own. May be used from any thread."""

    def __init__(self, inputs: Sequence[Input], read: Callable[[Slice], T]) -> None:
        self._inputs = inputs
        self._read = read
        self._small = ThreadPoolExecutor(SMALL_AT_ONCE, thread_name_prefix="phi4ray-read-small")
        self._large = ThreadPoolExecutor(LARGE_AT_ONCE, thread_name_prefix="phi4ray-read-large")
        self._lock = Lock()
        self._waiting: defaultdict[int, list[_Turn[T]]] = defaultdict(list)
        self._reading: set[int] = set()

    @contextlib.contextmanager
    def queued(self, pieces: Sequence[Slice]) -> Iterator[Callable[[], Awaitable[list[T]]]]:
        """Queue up for slices; what it gives reads them, and has the results in their order.

        Whatever has not begun when the block ends is not read. Raises what the function raises.
        """
        turns: list[_Turn[T]] = [_Turn(piece) for piece in pieces]
        with self._lock:
            for turn in turns:
                insort(self._waiting[turn.piece.file], turn, key=lambda one: one.piece.row_start)
        try:
            yield partial(self._results, turns)
        finally:
            for turn in turns:
                turn.result.cancel()
            with self._lock:
                for turn in turns:
                    if turn in self._waiting[turn.piece.file]:
                        self._waiting[turn.piece.file].remove(turn)
                    self._begin_next(turn.piece.file)

    async def _results(self, turns: Sequence[_Turn[T]]) -> list[T]:
        with self._lock:
            for turn in turns:
                turn.ready = True
                self._begin_next(turn.piece.file)
        return [await asyncio.wrap_future(turn.result) for turn in turns]

    def _begin_next(self, file: int) -> None:
        """Begin the read that is next in a file, if it may; to be called with the lock."""
        waiting = self._waiting[file]
        if not waiting:
            del self._waiting[file]
        elif waiting[0].ready and file not in self._reading:
            self._reading.add(file)
            small = self._inputs[file].size <= SMALL_BYTES
            (self._small if small else self._large).submit(self._run, waiting.pop(0))

    def _run(self, turn: _Turn[T]) -> None:
        if turn.result.set_running_or_notify_cancel():
            try:
                turn.result.set_result(self._read(turn.piece))
            except BaseException as error:
                turn.result.set_exception(error)
        with self._lock:
            self._reading.discard(turn.piece.file)
            self._begin_next(turn.piece.file)
