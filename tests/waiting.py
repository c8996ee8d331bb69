"""What tests wait for: something that comes true, a server that answers, a port that is free."""

import asyncio
import contextlib
import random
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import psutil


def until(
    done: Callable[[], Any],
    seconds: float,
    log: Callable[[], str] = lambda: "in vain",
    every_s: float = 0.1,
) -> Any:
    """Wait for something that is true, and give it; `log` says what happened instead."""
    deadline = time.monotonic() + seconds
    while not (found := done()):
        assert time.monotonic() < deadline, log()
        time.sleep(every_s)
    return found


async def settle(turns: int = 5) -> None:
    """Give the other tasks of the event loop so many turns."""
    for _ in range(turns):
        await asyncio.sleep(0)


def reached(url: str) -> bool:
    """Whether a server answers there, with success."""
    try:
        return httpx.get(url).is_success
    except httpx.TransportError:
        return False


def until_ready(url: str, server: psutil.Popen, log: Path, seconds: float) -> None:
    """Wait until a service takes requests; its log is told where it ends or takes too long."""

    def said() -> str:
        return log.read_text(errors="replace")[-5000:]

    until(lambda: reached(f"{url}/ready") or server.poll() is not None, seconds, said)
    assert server.poll() is None, said()


def free_port() -> int:
    """A port of this machine that nothing listens on.

    None that the kernel gives to connections (from 32768 on), nor one of those that Ray's workers
    and replicas take by themselves: what will listen there takes a minute to start.
    """
    while True:
        with socket.socket() as probe, contextlib.suppress(OSError):
            port = random.randrange(20_000, 30_000)
            probe.bind(("127.0.0.1", port))
            return port
