"""Per-key limits over the whole fleet: replicas tell each other what was spent at them."""

import asyncio
import logging
import time
from collections.abc import Mapping

import ray

from phi4ray.serve.limits import Limiter, Spent

EXCHANGE_S = 0.5

logger = logging.getLogger(__name__)


class LimitsBoard:
    """The actor in the middle: takes what one replica's tenants spent, gives what others' did."""

    def __init__(self) -> None:
        self._owed: dict[str, dict[str, Spent]] = {}  # replica: tenant: what it has not heard of
        self._running: dict[str, dict[str, int]] = {}

    def exchange(self, replica: str, spent: Mapping[str, Spent], replicas: int) -> dict[str, Spent]:
        """Hand in what was spent at a replica; gives what was spent at the others since its last.

        `replicas` is how many there are: the ones not heard of for longest are forgotten.
        """
        heard = self._owed.pop(replica, {})
        for owed in self._owed.values():
            for tenant, one in spent.items():
                known = owed.setdefault(tenant, Spent())
                known.requests += one.requests
                known.tokens += one.tokens
        self._owed[replica] = {}
        self._running.pop(replica, None)
        self._running[replica] = {tenant: one.running for tenant, one in spent.items()}
        while len(self._running) > max(1, replicas):
            gone = next(iter(self._running))
            del self._running[gone]
            self._owed.pop(gone, None)
        for other, running in self._running.items():
            if other != replica:
                for tenant, count in running.items():
                    heard.setdefault(tenant, Spent()).running += count
        return heard


async def share_limits(application: str, replica: str, limiter: Limiter, replicas: int) -> None:
    """Exchange what was spent with the other replicas, for as long as this one lives."""
    board = (
        ray.remote(LimitsBoard)
        .options(name=f"phi4ray-limits-{application}", get_if_exists=True, num_cpus=0,
                 max_restarts=-1, lifetime="detached", namespace="phi4ray")
        .remote()
    )  # fmt: skip
    while True:
        await asyncio.sleep(EXCHANGE_S)
        spent = limiter.take_spent()
        try:
            heard = await board.exchange.remote(replica, spent, replicas)
            limiter.absorb(heard, time.monotonic())
        except ray.exceptions.RayError:
            logger.warning("limits are counted at each replica alone until their actor is back")
