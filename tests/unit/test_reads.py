"""A worker's reads: some at once, one a file, its first rows first; nothing is left of any."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import pytest

from phi4ray.batch.plan import Input, Slice
from phi4ray.batch.reads import LARGE_AT_ONCE, SMALL_AT_ONCE, SMALL_BYTES, Reads

FILES = 3 * SMALL_AT_ONCE


def piece(file: int, row: int) -> Slice:
    return Slice(file=file, row_start=row, rows=1)


def reads_of(read: Callable[[Slice], int], size: int = 1) -> Reads[int]:
    return Reads([Input(uri=f"{n}.jsonl", size=size, etag="") for n in range(FILES)], read)


async def read_all(reads: Reads[int], pieces: Sequence[Slice], look_up_s: float = 0.0) -> list[int]:
    """As a shard does: it queues up, looks whether it is done, and reads."""
    with reads.queued(pieces) as read:
        await asyncio.sleep(look_up_s)
        return await read()


class Watched:
    """Reads that take a moment; keeps their order, and how many there were at once."""

    def __init__(self) -> None:
        self.order: list[int] = []
        self.most = self.most_of_a_file = 0
        self._now: list[int] = []

    @contextmanager
    def __call__(self, file: int) -> Iterator[None]:
        self._now.append(file)
        self.most = max(self.most, len(self._now))
        self.most_of_a_file = max(self.most_of_a_file, self._now.count(file))
        yield
        self._now.remove(file)

    def read(self, one: Slice) -> int:
        with self(one.file):
            self.order.append(one.row_start)
            time.sleep(0.002)
        return one.row_start


def test_of_the_shards_that_wait_for_a_file_the_one_with_its_first_rows_goes_first() -> None:
    watched = Watched()
    reads = reads_of(watched.read)

    async def shards() -> None:
        # Those with the last rows know first that they are not done.
        waits = [(50, 0.0), (30, 0.005), (10, 0.02), (40, 0.0), (20, 0.01)]
        await asyncio.gather(*(read_all(reads, [piece(0, row)], wait) for row, wait in waits))

    asyncio.run(shards())
    assert watched.order == [10, 20, 30, 40, 50]


@pytest.mark.parametrize(("size", "most"), [(1, SMALL_AT_ONCE), (SMALL_BYTES + 1, LARGE_AT_ONCE)])
def test_a_shards_slices_are_read_some_at_once_and_given_in_their_order(
    size: int, most: int
) -> None:
    watched = Watched()
    barrier = threading.Barrier(most)

    def read(one: Slice) -> int:
        with watched(one.file):
            barrier.wait(10)
            return one.file

    files = list(range(FILES))[::-1]
    assert asyncio.run(read_all(reads_of(read, size), [piece(n, 0) for n in files])) == files
    assert watched.most == most


def test_one_slice_of_a_file_is_read_at_a_time() -> None:
    watched = Watched()
    pieces = [piece(n % 2, n) for n in range(12)]
    assert asyncio.run(read_all(reads_of(watched.read), pieces)) == list(range(12))
    assert watched.most_of_a_file == 1


def test_a_shard_that_is_done_lets_the_others_go_on() -> None:
    reads = reads_of(Watched().read)

    async def shards() -> list[int]:
        with reads.queued([piece(0, 1)]):
            other = asyncio.create_task(read_all(reads, [piece(0, 2)]))
            await asyncio.sleep(0.005)
            assert not other.done()
        return await other

    assert asyncio.run(shards()) == [2]


def test_a_read_that_fails_fails_its_shard_and_no_other() -> None:
    def read(one: Slice) -> int:
        if one.row_start == 1:
            raise ValueError("broken")
        return one.row_start

    reads = reads_of(read)

    async def shards() -> list[object]:
        pieces = [piece(0, 0), piece(0, 1), piece(0, 3)]
        both = read_all(reads, pieces), read_all(reads, [piece(0, 2)])
        return list(await asyncio.gather(*both, return_exceptions=True))

    failed, other = asyncio.run(shards())
    assert isinstance(failed, ValueError)
    assert other == [2]


def test_of_a_cancelled_shard_nothing_more_is_read_and_the_next_waits_for_what_runs() -> None:
    watched = Watched()
    begun, go_on = threading.Event(), threading.Event()

    def read(one: Slice) -> int:
        if one.row_start == 0:
            with watched(one.file):
                begun.set()
                assert go_on.wait(10)
            return 0
        return watched.read(one)

    reads = reads_of(read)

    async def shards() -> list[int]:
        cancelled = asyncio.create_task(read_all(reads, [piece(0, 0), piece(0, 1)]))
        other = asyncio.create_task(read_all(reads, [piece(0, 2)]))
        await asyncio.to_thread(begun.wait, 10)
        cancelled.cancel()
        with pytest.raises(asyncio.CancelledError):
            await cancelled
        await asyncio.sleep(0.005)
        assert not watched.order
        go_on.set()
        return await other

    assert asyncio.run(shards()) == [2]
    assert watched.order == [2]
    assert watched.most_of_a_file == 1
