"""What keeps pauses short in a process that streams tokens: hundreds of requests wait for each."""

import asyncio
import contextlib
import gc
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import TypeVar

TURN_S = 0.01
"""So long at most the engine's outputs are taken, one after the other, before others go on."""

FULL_EVERY = 1000
"""Collections of young objects between two of all objects; Python's default is ten.

With a thousand requests and a few thousand rows in work a full one takes 50 to 170 ms, every few
seconds of a burst, and half a second until all streams are on time again (benchmarks/RESULTS.md).
It finds little: what requests leave behind dies young, without references in circles. A collection
of young objects follows 7,000 new ones, so there are never more than seven million to look through.
"""

T = TypeVar("T")


def in_turns(get: Callable[[], Awaitable[T]]) -> Callable[[], Awaitable[T]]:
    """Give other tasks a turn every so often, also where there is always something to get.

    vLLM's front end takes steps from a queue and yields only when that is empty. Where an engine
    is faster it never is: new requests do not reach the engine, whose steps get the faster for it.
    """
    clock = time.monotonic
    until = 0.0

    async def got() -> T:
        nonlocal until
        if clock() >= until:
            await asyncio.sleep(0)
            until = clock() + TURN_S
        return await get()

    return got


@contextlib.contextmanager
def rare_collections() -> Iterator[None]:
    """Have Python look seldom through all objects, and never again through those of now.

    What is loaded when this begins stays: it is frozen, and stays so afterwards.
    """
    thresholds = gc.get_threshold()
    gc.collect()
    gc.freeze()
    gc.set_threshold(*thresholds[:2], FULL_EVERY)
    try:
        yield
    finally:
        gc.set_threshold(*thresholds)
