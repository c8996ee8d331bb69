"""An S3 server that fails at random, for the fault campaign: moto's, behind a breaking proxy."""

import logging
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
from moto.server import ThreadedMotoServer

from tests.fault_proxy import (
    Fault,
    FaultProxy,
    Request,
    cut_after,
    fault_proxy,
    hang_up,
    lose_answer,
    refusal,
    reset,
    stall,
)

BUCKET = "campaign"
LONG_STALL_S = 70.0
"""Longer than the client waits for a byte: it gives up and sends the request again."""


class Store:
    """The server, as the campaign sees it: how far the job is, and what was done to it."""

    def __init__(self, seed: int, fault_rate: float, url: str, direct: str) -> None:
        self.url, self.direct = url, direct
        self.requests = 0
        self.faults: Counter[str] = Counter()
        self.parts: set[str] = set()
        self._random = random.Random(seed)
        self._rate = fault_rate
        self._down_until = 0.0
        self._lock = threading.Lock()

    def fail_for(self, seconds: float) -> None:
        """Refuse everything for so long."""
        self._down_until = time.monotonic() + seconds

    def choose(self, request: Request) -> Fault | None:
        """What is done to a request. A part that is sent is written when it is asked for again."""
        with self._lock:
            self.requests += 1
            if request.method == "PUT" and "/part-" in request.path:
                self.parts.add(request.path)
            if time.monotonic() < self._down_until:
                self.faults["outage: 503"] += 1
                return refusal(503, "ServiceUnavailable", "the campaign's outage")
            if self._random.random() >= self._rate:
                return None
            name, fault = self._fault()
            self.faults[name] += 1
            return fault

    def _fault(self) -> tuple[str, Fault]:
        random_ = self._random
        cut = int(10 ** random_.uniform(0, 4))
        faults: list[tuple[str, Fault, float]] = [
            ("500 InternalError", refusal(500, "InternalError", "as planned"), 20),
            ("503 SlowDown", refusal(503, "SlowDown", "as planned"), 20),
            ("connection ended", hang_up, 10),
            ("connection reset", reset, 15),
            ("done, answer lost", lose_answer, 15),
            ("body cut short", cut_after(cut), 10),
            ("stall of 1 to 5 s", stall(random_.uniform(1, 5)), 9.5),
            ("stall of 70 s", stall(LONG_STALL_S), 0.5),
        ]
        weights = [weight for _, _, weight in faults]
        name, fault, _ = random_.choices(faults, weights)[0]
        return name, fault


@contextmanager
def failing_store(seed: int, fault_rate: float) -> Iterator[Store]:
    """Run the server and the proxy in this process's threads."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    direct = f"http://{host}:{port}"
    httpx.put(f"{direct}/{BUCKET}").raise_for_status()
    proxy: FaultProxy
    try:
        with fault_proxy(direct) as proxy:
            store = Store(seed, fault_rate, proxy.url, direct)
            proxy.choose = store.choose
            yield store
    finally:
        server.stop()
