"""Sleep before zero: nobody asks an engine that sleeps, and none sleeps that somebody asks."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from phi4ray.config import EngineConfig
from phi4ray.errors import ConfigError, EngineDeadError
from phi4ray.fake import FakeReplica
from phi4ray.serve.app import OnlineApp
from phi4ray.serve.config import serve_config
from phi4ray.serve.sleep import AwakeReplica, Sleeper

DELAY_S = 0.05
ASKED: dict[str, Any] = {"model": "m", "prompt": "hi"}


class Engine(FakeReplica):
    """A fake that counts how often it fell asleep and woke."""

    def __init__(self, **knobs: Any) -> None:
        super().__init__(
            EngineConfig(kind="fake", model="m", engine_args={"enable_sleep_mode": True, **knobs})
        )
        self.slept = self.woke = 0

    async def sleep(self) -> None:
        await super().sleep()
        self.slept += 1

    async def wake(self) -> None:
        await super().wake()
        self.woke += 1


@contextlib.asynccontextmanager
async def watched(engine: Engine, delay_s: float = DELAY_S) -> AsyncIterator[Sleeper]:
    sleeper = Sleeper(engine, delay_s)
    watching = asyncio.create_task(sleeper.watch())
    yield sleeper
    watching.cancel()


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not holds():
            await asyncio.sleep(0.005)


def run(scenario: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(30):
            await scenario()

    asyncio.run(bounded())


def test_an_engine_that_nobody_needs_sleeps_once_and_wakes_for_all_that_come() -> None:
    async def scenario() -> None:
        engine = Engine(sleep_s=0.02)
        async with watched(engine) as sleeper:
            replica = AwakeReplica(engine, sleeper)
            await until(lambda: engine.slept == 1)
            await asyncio.sleep(3 * DELAY_S)
            assert (engine.slept, sleeper.asleep) == (1, True)
            asked = [replica.complete("/v1/completions", ASKED) for _ in range(5)]
            assert [answer.status for answer in await asyncio.gather(*asked)] == [200] * 5
            assert engine.woke == 1
            await until(lambda: engine.slept == 2)

    run(scenario)


def test_whoever_comes_while_it_falls_asleep_waits_until_it_has_and_wakes_it() -> None:
    async def scenario() -> None:
        engine = Engine(sleep_s=0.1)
        async with watched(engine) as sleeper:
            await until(lambda: sleeper.asleep)
            assert engine.slept == 0  # on its way
            answer = await AwakeReplica(engine, sleeper).complete("/v1/completions", ASKED)
            assert (answer.status, engine.slept, engine.woke) == (200, 1, 1)

    run(scenario)


def test_who_hangs_up_does_not_leave_it_half_awake() -> None:
    async def scenario() -> None:
        engine = Engine(sleep_s=0.1)
        async with watched(engine, delay_s=0.2) as sleeper:
            replica = AwakeReplica(engine, sleeper)
            await until(lambda: engine.slept == 1)
            first = asyncio.create_task(replica.complete("/v1/completions", ASKED))
            await asyncio.sleep(0.02)
            first.cancel()
            second = await replica.complete("/v1/completions", ASKED)
            assert (second.status, engine.woke) == (200, 1)
            assert first.cancelled()

    run(scenario)


def test_a_long_answer_keeps_it_awake() -> None:
    async def scenario() -> None:
        engine = Engine(latency_s=5 * DELAY_S)
        async with watched(engine) as sleeper:
            await AwakeReplica(engine, sleeper).complete("/v1/completions", ASKED)
            assert engine.slept == 0
            await until(lambda: engine.slept == 1)

    run(scenario)


def test_an_engine_that_dies_asleep_is_told_as_dead() -> None:
    async def scenario() -> None:
        engine = Engine()
        async with watched(engine) as sleeper:
            await until(lambda: engine.slept == 1)
            await engine.stop()
            with pytest.raises(EngineDeadError):
                await AwakeReplica(engine, sleeper).complete("/v1/completions", ASKED)

    run(scenario)


@pytest.mark.slow
@given(st.lists(st.tuples(st.floats(0, 0.03), st.floats(0, 0.02), st.booleans()), max_size=8))
def test_no_request_ever_meets_an_engine_that_sleeps(
    life: list[tuple[float, float, bool]],
) -> None:
    async def scenario() -> None:
        engine = Engine(sleep_s=0.003, latency_s=0.004)  # it asserts that it is awake
        async with watched(engine, delay_s=0.01) as sleeper:
            replica = AwakeReplica(engine, sleeper)

            async def one(at_s: float, patience_s: float, patient: bool) -> int:
                await asyncio.sleep(at_s)
                try:
                    async with asyncio.timeout(None if patient else patience_s):
                        return (await replica.complete("/v1/completions", ASKED)).status
                except TimeoutError:
                    return 0

            found = await asyncio.gather(*(one(*event) for event in life))
            for status, (_, _, patient) in zip(found, life, strict=True):
                assert status == 200 or (not patient and status == 0)

    run(scenario)


def online(**autoscaling: Any) -> OnlineApp:
    config = serve_config(
        {
            "engine": {"kind": "fake", "model": "m", "engine_args": {"enable_sleep_mode": True}},
            "autoscaling": autoscaling,
        }
    )
    return OnlineApp(FakeReplica(config.engine), config)


def test_requests_wake_it_and_looking_at_it_does_not() -> None:
    async def scenario() -> None:
        app = online(sleep_delay_s=DELAY_S)
        assert app.sleeper is not None
        watching = asyncio.create_task(app.sleeper.watch())
        # Servers keep this one open from their start to their end.
        life = asyncio.create_task(app({"type": "lifespan"}, asyncio.Event().wait, nothing))
        transport = httpx.ASGITransport(app=app)  # type: ignore[arg-type]
        async with httpx.AsyncClient(transport=transport, base_url="http://phi4") as client:
            await until(lambda: app.sleeper is not None and app.sleeper.asleep)
            for path in ("/health", "/ready", "/v1/models"):
                assert (await client.get(path)).status_code == 200
            assert app.sleeper.asleep
            assert (await client.post("/v1/completions", json=ASKED)).status_code == 200
            assert not app.sleeper.asleep
        watching.cancel()
        life.cancel()

    run(scenario)


async def nothing(message: Any) -> None:
    pass


def test_by_default_no_engine_sleeps() -> None:
    assert online().sleeper is None


def test_a_replica_that_would_go_before_it_sleeps_is_refused() -> None:
    with pytest.raises(ConfigError, match="sleep_delay_s 700 is not below"):
        online(min_replicas=0, sleep_delay_s=700)
    assert online(min_replicas=1, sleep_delay_s=700).sleeper is not None
