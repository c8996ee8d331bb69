"""Running a function in a process of its own whose memory is bounded."""

import multiprocessing
import resource
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

MIB = 1 << 20

forks = multiprocessing.get_context("forkserver")
"""Starts processes that have imported all they need already."""
forks.set_forkserver_preload(["tests.bombs", "tests.batch_service"])

BACKSTOP_MIB = 4096
"""Of address space, beyond the limit: what takes without end stops there, not at the machine's."""


def within(limit_mib: int, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """The function's result; `MemoryError` if it needs so much more than the process has."""
    with ProcessPoolExecutor(1, mp_context=forks) as pool:
        return pool.submit(_bounded, limit_mib, function, *args, **kwargs).result()


def _bounded(limit_mib: int, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Counts pages in use: allocators reserve addresses by what they find, not by what is asked."""
    size, resident = (
        int(pages) * resource.getpagesize()
        for pages in Path("/proc/self/statm").read_text().split()[:2]
    )
    most = size + (limit_mib + BACKSTOP_MIB) * MIB
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    result = function(*args, **kwargs)
    took = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - resident
    if took > limit_mib * MIB:
        raise MemoryError(f"took {took / MIB:.0f} MiB, more than {limit_mib}")
    return result
