"""Per-key limits over the whole fleet: replicas tell each other what was spent at them."""

import asyncio
import logging
import time
from collections.abc import Mapping

import ray

from cluster.shared import shared_actor
from phi4ray.serve.exchange import Exchange
from phi4ray.serve.limits import Limiter, Spent

EXCHANGE_S = 0.5

logger = logging.getLogger(__name__)


class LimitsBoard:
    """The actor in the middle: a `phi4ray.serve.exchange.Exchange` with a clock."""

    def __init__(self) -> None:
        self._exchange = Exchange()

    def exchange(
        self, replica: str, spent: Mapping[str, Spent], lacking: Mapping[str, Spent]
    ) -> dict[str, Spent]:
        """See `phi4ray.serve.exchange.Exchange.exchange`."""
        return self._exchange.exchange(replica, spent, lacking, time.monotonic())


async def share_limits(application: str, replica: str, limiter: Limiter) -> None:
    """Exchange what was spent with the other replicas, from now on, while this one lives."""
    board = shared_actor(LimitsBoard, f"phi4ray-limits-{application}")
    while True:
        spent, lacking = limiter.take_spent(), limiter.lacking(time.monotonic())
        try:
            heard = await board.exchange.remote(replica, spent, lacking)
            limiter.absorb(heard, time.monotonic())
        except ray.exceptions.RayError:
            logger.warning("limits are counted at each replica alone until their actor is back")
        except Exception:  # nobody waits for this task, which would end for good
            logger.exception("what the other replicas spent could not be counted")
        await asyncio.sleep(EXCHANGE_S)
