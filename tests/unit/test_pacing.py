"""How many rows are with the engine at once, who goes next, and in which order rows are asked."""

import asyncio
import itertools
import random
from collections.abc import Callable

from hypothesis import given
from hypothesis import strategies as st

from phi4ray.batch.pacing import FOLLOWERS, KIN_CHARS, Pacer, Waiting, common_chars, rank_of
from phi4ray.protocol import KVState
from tests.waiting import settle


def kv_of(tokens: int, rows: int) -> KVState:
    return KVState(
        capacity_tokens=tokens,
        used_tokens=0,
        running=0,
        waiting=0,
        max_num_seqs=rows,
        max_model_len=1000,
    )


def pacer(tokens: int = 100, rows: int = 10) -> Pacer:
    return Pacer(kv_of(tokens, rows), tokens=1.0, rows=1.0)


class Turn:
    """One row, whose turn can be awaited; gives up when that is cancelled."""

    def __init__(self, tokens: Callable[[], float]) -> None:
        self._tokens = tokens
        self._begun: asyncio.Future[float] = asyncio.get_running_loop().create_future()

    def demand(self, row: Waiting) -> float:
        return self._tokens()

    def begin(self, row: Waiting, tokens: float) -> None:
        self._begun.set_result(tokens)

    async def come(self, room: Pacer, rank: int, prompt: str) -> float:
        row = room.push(self, 0, rank, prompt)
        try:
            return await asyncio.shield(self._begun)
        except asyncio.CancelledError:
            room.withdraw(row)
            if self._begun.done():
                room.release(self._begun.result())
            raise


async def turn(room: Pacer, tokens: Callable[[], float], rank: int = 0, prompt: str = "") -> float:
    return await Turn(tokens).come(room, rank, prompt)


async def acquired(room: Pacer, tokens: float, rank: int = 0) -> float:
    return await turn(room, lambda: tokens, rank)


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


def test_few_rows_lie_in_the_engines_queue_so_that_a_long_answer_begins_soon() -> None:
    async def scenario() -> None:
        room = Pacer(kv_of(tokens=1_000_000, rows=100))
        short = [asyncio.create_task(acquired(room, 1)) for _ in range(300)]
        await settle()
        assert sum(task.done() for task in short) == room.rows == 125
        long = asyncio.create_task(acquired(room, 1, rank=-1))
        await settle()
        room.release(1)
        await asyncio.wait_for(long, 5)
        for task in short:
            task.cancel()

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
        waiting = asyncio.create_task(turn(room, lambda: known))
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


# Kin

SHORT, LONG = "x" * (KIN_CHARS - 2), "x" * KIN_CHARS


async def went(rows: list[tuple[str, int]], at_once: int = 1) -> list[int]:
    """The order in which rows go that all wait already, given as prompts and ranks."""
    room, found = pacer(rows=at_once), []

    async def go(number: int, prompt: str, rank: int) -> None:
        tokens = await turn(room, lambda: 1.0, rank, prompt)
        found.append(number)
        room.release(tokens)

    for _ in range(at_once):
        await acquired(room, 1)
    tasks = [asyncio.create_task(go(at, *row)) for at, row in enumerate(rows)]
    await settle()
    for _ in range(at_once):
        room.release(1)
    await asyncio.wait_for(asyncio.gather(*tasks), 5)
    return found


def test_rows_that_share_a_prefix_go_together_and_in_order_of_their_prompts() -> None:
    rows = [(f"{LONG}{'ab'[n % 2]}{n}", 0) for n in range(6)] + [("other", 0)]
    assert asyncio.run(went(rows)) == [0, 2, 4, 1, 3, 5, 6]


def test_a_prefix_that_all_share_or_that_is_short_leaves_rows_as_they_came() -> None:
    for prefix, others in ((LONG, []), (SHORT, [("other", 0)])):
        rows = [(f"{prefix}{'ba'[n % 2]}", 0) for n in range(6)] + others
        assert asyncio.run(went(rows)) == list(range(len(rows)))


def test_rows_with_longer_answers_do_not_wait_for_kin_of_others() -> None:
    rows = [(LONG, 0), ("other", -1), (LONG, 0), (LONG, -1)]
    assert asyncio.run(went(rows)) == [1, 3, 0, 2]


def test_kin_that_gave_up_are_passed_over() -> None:
    async def scenario() -> None:
        room, found = pacer(rows=1), []

        async def go(name: str) -> None:
            tokens = await turn(room, lambda: 1.0, 0, f"{LONG}{name}")
            found.append(name)
            room.release(tokens)

        await acquired(room, 1)
        tasks = {name: asyncio.create_task(go(name)) for name in ("a", "b", "c")}
        tasks["z"] = asyncio.create_task(turn(room, lambda: 1.0, 0, "z"))
        await settle()
        tasks["b"].cancel()
        room.release(1)  # before the one that gave up has heard of it
        await asyncio.wait([*tasks.values()], timeout=5)
        assert found == ["a", "c"]
        assert tasks["z"].done()

    asyncio.run(scenario())


texts = st.builds(
    lambda shared, rest: shared * KIN_CHARS + rest, st.sampled_from("pq"), st.text("ab", max_size=3)
)


@given(st.lists(st.tuples(texts, st.integers(-1, 0)), max_size=100), st.integers(1, 5))
def test_every_row_goes_once_and_none_is_passed_by_more_than_the_kin_of_its_elders(
    rows: list[tuple[str, int]], at_once: int
) -> None:
    order = asyncio.run(went(rows, at_once))
    assert sorted(order) == list(range(len(rows)))
    for rank in (-1, 0):
        elders = [at for at, row in enumerate(rows) if row[1] == rank]
        place = {at: place for place, at in enumerate(at for at in order if rows[at][1] == rank)}
        for before, at in enumerate(elders):
            assert place[at] <= before * (1 + FOLLOWERS)


@given(st.text("ab", max_size=40), st.text("ab", max_size=40))
def test_common_chars_is_the_length_of_the_common_prefix(one: str, other: str) -> None:
    alike = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))
    assert common_chars(one, other) == len(list(alike))


# Rank


@given(st.lists(st.none() | st.integers(1, 5000)))
def test_long_answers_do_not_end_up_last(limits: list[int | None]) -> None:
    sizes = [2**63 if limit is None else limit for limit in sorted(limits, key=rank_of)]
    for before, after in itertools.pairwise(sizes):
        assert after < 2 * before  # equal to a power of two
