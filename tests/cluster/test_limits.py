"""Limits over replicas that meet at the actor of a real cluster."""

import asyncio
import time
from collections.abc import Callable, Iterator

import pytest

from cluster.limits import share_limits
from cluster.local import connected
from phi4ray.serve.limits import Limiter
from tests.unit.test_limits import admitted, tenant

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(120)]


@pytest.fixture(autouse=True, scope="module")
def cluster() -> Iterator[None]:
    with connected(num_cpus=1):
        yield


def test_a_replica_that_starts_takes_over_what_the_fleet_has_left() -> None:
    who = tenant(requests_per_minute=1000)
    limiters = [Limiter() for _ in range(3)]

    def left(at: int) -> float:
        requests = limiters[at].remaining(who, time.monotonic()).requests
        assert requests is not None
        return requests[1]

    async def until(true: Callable[[], bool]) -> None:
        while not true():
            await asyncio.sleep(0.05)

    async def meet() -> None:
        async with asyncio.TaskGroup() as group:

            def start(at: int) -> asyncio.Task[None]:
                limiters[at].open([who], time.monotonic())
                return group.create_task(share_limits("test", str(at), limiters[at]))

            running = [start(0), start(1)]
            assert admitted(limiters[0], who, 900, time.monotonic()) == 900
            await until(lambda: left(1) < 500)
            running.append(start(2))
            assert left(2) == 1000
            await until(lambda: left(2) < 500)
            for task in running:
                task.cancel()

    asyncio.run(meet())
