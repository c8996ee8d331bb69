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

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.bombs"])


def within(limit_mib: int, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """The function's result; `MemoryError` if it needs so much more than the process has."""
    with ProcessPoolExecutor(1, mp_context=_context) as pool:
        return pool.submit(_bounded, limit_mib, function, *args, **kwargs).result()


def _bounded(limit_mib: int, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    bytes_ = pages * resource.getpagesize() + limit_mib * MIB
    resource.setrlimit(resource.RLIMIT_AS, (bytes_, bytes_))
    return function(*args, **kwargs)
