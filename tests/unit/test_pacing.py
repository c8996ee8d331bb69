"""How many rows are with the engine at once, who goes next, and in which order rows are asked."""

import asyncio
import itertools
import random

from hypothesis import given
from hypothesis import strategies as st

from phi4ray.batch.pacing import Pacer, order
from phi4ray.protocol import KVState


def pacer(tokens: int = 100, rows: int = 10) -> Pacer:
    kv = KVState(
        capacity_tokens=tokens,
        used_tokens=0,
        running=0,
        waiting=0,
        max_num_seqs=rows,
        max_model_len=1000,
    )
    return Pacer(kv, oversubscribe=1.0)


async def acquired(room: Pacer, tokens: float, rank: int = 0) -> float:
    return await room.acquire(lambda: tokens, rank)


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


# Room


def test_rows_go_until_their_tokens_fill_the_cache() -> None:
    async def scenario() -> None:
        room = pacer(tokens=100)
        for _ in range(4):
            await acquired(room, 25)
        waiting = asyncio.create_task(acquired(room, 1))
        await settle()
        assert not waiting.done()
        room.release(25)
        await asyncio.wait_for(waiting, 5)
        assert (room.rows, room.tokens) == (4, 76)

    asyncio.run(scenario())


def test_rows_go_until_the_engine_has_all_the_sequences_it_takes() -> None:
    async def scenario() -> None:
        room = pacer(rows=2)
        await acquired(room, 1)
        await acquired(room, 1)
        waiting = asyncio.create_task(acquired(room, 1))
        await settle()
        assert not waiting.done()
        room.release(1)
        await asyncio.wait_for(waiting, 5)

    asyncio.run(scenario())


def test_a_row_that_can_never_fit_is_let_in_alone_for_the_engine_to_refuse() -> None:
    async def scenario() -> None:
        room = pacer(tokens=100)
        await asyncio.wait_for(acquired(room, 1e9), 5)
        waiting = asyncio.create_task(acquired(room, 1))
        await settle()
        assert not waiting.done()
        room.release(1e9)
        await asyncio.wait_for(waiting, 5)

    asyncio.run(scenario())


def test_a_small_row_does_not_pass_a_large_one_that_waits() -> None:
    async def scenario() -> None:
        room, went = pacer(tokens=100), []

        async def go(name: str, tokens: float) -> None:
            await acquired(room, tokens)
            went.append(name)

        await acquired(room, 60)
        tasks = [asyncio.create_task(go("large", 80)), asyncio.create_task(go("small", 1))]
        await settle()
        assert went == []
        room.release(60)
        await asyncio.gather(*tasks)
        assert went == ["large", "small"]

    asyncio.run(scenario())


def test_of_rows_that_wait_the_lowest_rank_goes_first_and_equals_as_they_came() -> None:
    async def scenario() -> None:
        room, went = pacer(rows=1), []

        async def go(name: str, rank: int) -> None:
            tokens = await acquired(room, 1, rank)
            went.append(name)
            room.release(tokens)

        await acquired(room, 1)
        asked = [("b", -5), ("c", -5), ("d", 0), ("a", -9)]
        tasks = [asyncio.create_task(go(*row)) for row in asked]
        await settle()
        room.release(1)
        await asyncio.gather(*tasks)
        assert went == ["a", "b", "c", "d"]

    asyncio.run(scenario())


def test_what_a_row_holds_is_asked_when_its_turn_comes() -> None:
    async def scenario() -> None:
        room, known = pacer(tokens=100), 90.0
        await acquired(room, 90)
        waiting = asyncio.create_task(room.acquire(lambda: known))
        await settle()
        known = 10.0
        room.release(90)
        assert await asyncio.wait_for(waiting, 5) == room.tokens == 10

    asyncio.run(scenario())


def test_a_row_that_gives_up_waiting_holds_no_room_and_no_one_up() -> None:
    async def scenario() -> None:
        room = pacer(tokens=100)
        await acquired(room, 60)
        gone = asyncio.create_task(acquired(room, 80))
        after = asyncio.create_task(acquired(room, 50))
        await settle()
        gone.cancel()
        await settle()
        room.release(60)
        await asyncio.wait_for(after, 5)
        assert (room.rows, room.tokens) == (1, 50)

    asyncio.run(scenario())


def test_a_row_cancelled_just_as_its_turn_came_gives_its_room_back() -> None:
    async def scenario() -> None:
        room = pacer(tokens=100)
        await acquired(room, 100)
        chosen = asyncio.create_task(acquired(room, 100))
        await settle()
        room.release(100)  # it is the chosen one's, which has not run since
        chosen.cancel()
        await settle()
        assert (room.rows, room.tokens) == (0, 0)

    asyncio.run(scenario())


@given(st.lists(st.tuples(st.integers(1, 200), st.booleans()), max_size=30), st.randoms())
def test_every_row_gets_its_turn_and_all_room_comes_back(
    rows: list[tuple[int, bool]], chance: random.Random
) -> None:
    async def scenario() -> None:
        room, most = pacer(tokens=100, rows=4), 0
        served = 0

        async def row(tokens: int) -> None:
            nonlocal most, served
            await acquired(room, tokens)
            try:
                most = max(most, room.rows)
                assert room.tokens <= 100 or room.rows == 1
                for _ in range(chance.randint(0, 3)):
                    await asyncio.sleep(0)
            finally:
                room.release(tokens)
            served += 1

        tasks = [asyncio.create_task(row(tokens)) for tokens, _ in rows]
        await settle()
        given_up = [task for task, (_, stays) in zip(tasks, rows, strict=True) if not stays]
        for task in given_up:
            task.cancel()
        await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 5)
        assert served + sum(task.cancelled() for task in tasks) == len(rows)
        assert served >= sum(stays for _, stays in rows)
        assert most <= 4
        assert (room.rows, room.tokens) == (0, 0)

    asyncio.run(scenario())


# Order

requests = st.lists(st.tuples(st.text("ab", max_size=4), st.none() | st.integers(1, 5000)))


@given(requests)
def test_every_request_is_asked_once(rows: list[tuple[str, int | None]]) -> None:
    assert sorted(order(rows)) == list(range(len(rows)))


@given(requests)
def test_long_answers_do_not_end_up_last(rows: list[tuple[str, int | None]]) -> None:
    limits = [rows[at][1] for at in order(rows)]
    sizes = [2**63 if limit is None else limit for limit in limits]
    for before, after in itertools.pairwise(sizes):
        assert after < 2 * before  # equal to a power of two


def test_requests_with_a_shared_prefix_meet() -> None:
    rows = [(f"{'doc one' if n % 2 else 'doc two'}: question {n}", 100) for n in range(10)]
    asked = [rows[at][0].split(":")[0] for at in order(rows)]
    assert asked == ["doc one"] * 5 + ["doc two"] * 5


def test_requests_alike_in_all_that_counts_keep_their_order() -> None:
    assert order([("same", 100)] * 20) == list(range(20))
