"""Who goes to the engine, who waits, and who is told to come back: admission by tokens of KV."""

import asyncio
import contextlib
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phi4ray.serve.admission import Admission, AdmissionConfig, OverloadedError
from tests.waiting import settle


def admission(
    tokens: int = 100, seqs: int = 10, *, timeout_s: float = 5.0, queue: int = 100
) -> Admission:
    config = AdmissionConfig(queue_timeout_s=timeout_s, max_queued_requests=queue)
    return Admission(config, capacity_tokens=tokens, max_num_seqs=seqs)


class Client:
    """A request that holds its room until it is told to end."""

    def __init__(
        self, room: Admission, tokens: float, priority: int = 0, sequences: int = 1
    ) -> None:
        self._end = asyncio.Event()
        self.inside = False
        self.task = asyncio.create_task(self._run(room, tokens, priority, sequences))

    async def _run(self, room: Admission, tokens: float, priority: int, sequences: int) -> None:
        async with room.admit(tokens, priority, sequences):
            self.inside = True
            await self._end.wait()

    async def end(self) -> None:
        self._end.set()
        await self.task


def test_requests_go_in_until_their_tokens_fill_the_cache() -> None:
    async def scenario() -> None:
        room = admission(tokens=100)
        first, second, third = (Client(room, 50) for _ in range(3))
        await settle()
        assert (first.inside, second.inside, third.inside) == (True, True, False)
        assert (room.used_tokens, room.queued, room.queued_tokens) == (100, 1, 50)
        await first.end()
        await settle()
        assert third.inside
        await asyncio.gather(second.end(), third.end())
        assert (room.running, room.used_tokens, room.queued) == (0, 0, 0)

    asyncio.run(scenario())


def test_requests_go_in_until_the_engine_has_all_its_sequences() -> None:
    async def scenario() -> None:
        room = admission(seqs=2)
        clients = [Client(room, 1) for _ in range(3)]
        await settle()
        assert [client.inside for client in clients] == [True, True, False]
        for client in clients:
            await client.end()

    asyncio.run(scenario())


def test_a_request_counts_as_the_sequences_that_it_holds() -> None:
    async def scenario() -> None:
        room = admission(seqs=4)
        four, one = Client(room, 1, sequences=4), Client(room, 1)
        await settle()
        assert (four.inside, one.inside, room.sequences) == (True, False, 4)
        await four.end()
        await settle()
        many = Client(room, 1, sequences=99)  # more than the engine has at once: alone
        await settle()
        assert (one.inside, many.inside) == (True, False)
        await one.end()
        await settle()
        assert (many.inside, room.sequences, room.has_room(1)) == (True, 4, False)
        await many.end()
        assert room.sequences == 0

    asyncio.run(scenario())


def test_a_request_larger_than_the_cache_goes_in_alone() -> None:
    async def scenario() -> None:
        room = admission(tokens=100)
        large = Client(room, 1e9)
        await settle()
        assert large.inside
        small = Client(room, 1)
        await settle()
        assert not small.inside
        await large.end()
        await small.end()
        assert room.used_tokens == 0

    asyncio.run(scenario())


def test_who_waits_goes_in_by_priority_and_then_by_arrival() -> None:
    async def scenario() -> None:
        room = admission(tokens=10)
        running = Client(room, 10)
        await settle()
        waiting = [Client(room, 10, priority) for priority in (1, 0, 1, 0)]
        await settle()
        order = []
        await running.end()
        for _ in waiting:
            await settle()
            (inside,) = [n for n, client in enumerate(waiting) if client.inside and n not in order]
            order.append(inside)
            await waiting[inside].end()
        assert order == [1, 3, 0, 2]

    asyncio.run(scenario())


def test_a_small_request_does_not_overtake_a_large_one_forever() -> None:
    async def scenario() -> None:
        room = admission(tokens=100)
        running = [Client(room, 50), Client(room, 50)]
        await settle()
        large, small = Client(room, 80), Client(room, 10)
        await running[0].end()
        await settle()
        assert (large.inside, small.inside) == (False, False)
        await running[1].end()
        await settle()
        assert (large.inside, small.inside) == (True, True)
        await asyncio.gather(large.end(), small.end())

    asyncio.run(scenario())


def test_who_waits_too_long_is_told_when_to_come_back() -> None:
    async def scenario() -> None:
        room = admission(tokens=10, timeout_s=0.01)
        running = Client(room, 10)
        await settle()
        with pytest.raises(OverloadedError, match="Try again in") as refused:
            async with room.admit(10):
                raise AssertionError("there was no room")
        assert 1 <= refused.value.retry_after_s <= 60
        assert (room.queued, room.totals.rejected) == (0, 1)
        await running.end()

    asyncio.run(scenario())


def test_a_full_queue_turns_away_at_once() -> None:
    async def scenario() -> None:
        room = admission(tokens=10, queue=1)
        running = Client(room, 10)
        await settle()
        waiting = Client(room, 10)
        await settle()
        with pytest.raises(OverloadedError):
            async with room.admit(10):
                raise AssertionError("there was no room")
        await running.end()
        await waiting.end()

    asyncio.run(scenario())


def test_rates_tell_what_comes_turned_away_or_not_and_what_ends() -> None:
    now = 0.0

    async def scenario() -> None:
        nonlocal now
        room = Admission(
            AdmissionConfig(queue_timeout_s=0), capacity_tokens=100, max_num_seqs=8,
            clock=lambda: now,
        )  # fmt: skip
        for _ in range(100):  # a second each, of which the second request finds no room
            async with room.admit(60):
                with pytest.raises(OverloadedError):
                    async with room.admit(60):
                        pass
                now += 1.0
        assert room.arrived_tokens_per_s == pytest.approx(120, rel=0.1)
        assert room.arrived_squares_per_s == pytest.approx(2 * 60**2, rel=0.1)
        assert room.released_tokens_per_s == pytest.approx(60, rel=0.1)

    asyncio.run(scenario())


def test_retry_after_follows_the_rate_at_which_tokens_get_free() -> None:
    now = 0.0
    room = Admission(AdmissionConfig(), capacity_tokens=1000, max_num_seqs=10, clock=lambda: now)

    async def scenario() -> None:
        nonlocal now
        for _ in range(100):  # 100 tokens a second, for long enough to be known
            async with room.admit(100):
                now += 1.0
        async with room.admit(1000):
            assert room.retry_after_s(1000, now) == pytest.approx(10, abs=1)
            assert room.retry_after_s(100, now) == pytest.approx(1, abs=1)

    asyncio.run(scenario())


def test_who_gives_up_waiting_makes_way_for_those_behind() -> None:
    async def scenario() -> None:
        room = admission(tokens=100)
        running = [Client(room, 50), Client(room, 50)]
        await settle()
        large, small = Client(room, 80), Client(room, 40)
        await running[0].end()
        await settle()
        large.task.cancel()
        await settle()
        assert small.inside
        await asyncio.gather(running[1].end(), small.end())
        assert room.used_tokens == 0

    asyncio.run(scenario())


@given(st.integers(0, 2**32), st.integers(1, 200), st.integers(1, 8))
def test_room_is_never_exceeded_nor_lost_whatever_ends_when(
    seed: int, capacity: int, seqs: int
) -> None:
    async def scenario() -> None:
        chance = random.Random(seed)
        room = admission(tokens=capacity, seqs=seqs, timeout_s=0.002, queue=5)
        most = 0.0

        async def one() -> None:
            nonlocal most
            with contextlib.suppress(OverloadedError):
                sequences = chance.randint(1, 4)
                async with room.admit(chance.randint(1, 100), chance.randint(0, 2), sequences):
                    assert room.running <= room.sequences <= seqs
                    if room.running > 1:
                        assert room.used_tokens <= capacity
                    most = max(most, room.used_tokens)
                    await asyncio.sleep(chance.choice([0, 0, 0.0005]))

        tasks = [asyncio.create_task(one()) for _ in range(30)]
        for task in tasks:
            if chance.random() < 0.2:
                await asyncio.sleep(0)
                task.cancel()
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            assert result is None or isinstance(result, asyncio.CancelledError)
        assert (room.running, room.sequences, room.used_tokens, room.queued) == (0, 0, 0.0, 0)
        assert most <= capacity
        async with asyncio.timeout(1), room.admit(capacity):
            pass

    asyncio.run(scenario())
