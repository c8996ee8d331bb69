"""Batch rows in the slack of a replica: let in, made to yield, taken up again, shared fairly."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phi4ray.serve.admission import Admission, AdmissionConfig
from phi4ray.serve.fair import FairQueue
from phi4ray.serve.harvest import Harvest
from phi4ray.serve.slack import LEAST_AHEAD, HarvestConfig
from tests.waiting import settle

JOB = "job"


class Engine:
    """The rows of a replica's batch that run, and those that ended; time stands still."""

    def __init__(
        self, tokens: int = 1000, seqs: int = 100, prefix_caching: bool = True, **settings: Any
    ) -> None:
        self.now = 100.0
        self.admission = Admission(
            AdmissionConfig(), capacity_tokens=tokens, max_num_seqs=seqs, clock=lambda: self.now
        )
        config = HarvestConfig.model_validate({"reserve_fraction": 0.1, **settings})
        self.harvest = Harvest(
            config, self.admission, prefix_caching=prefix_caching, clock=lambda: self.now
        )
        self.harvest.join(JOB)
        self.running: dict[str, asyncio.Event] = {}
        self.order: list[str] = []
        self.begun: list[str] = []
        self.tasks: dict[str, asyncio.Task[str]] = {}
        self.held: list[asyncio.Task[None]] = []

    def row(self, name: str, tokens: float = 100, prompt: float = 0, job: str = JOB) -> None:
        async def work() -> str:
            self.begun.append(name)
            event = self.running[name] = asyncio.Event()
            try:
                await event.wait()
            finally:
                del self.running[name]
            return name

        self.tasks[name] = asyncio.create_task(self.harvest.run(job, tokens, prompt, work))

    async def rows(self, count: int, prompt: float = 0) -> None:
        for name in names(count):
            self.row(name, prompt=prompt)
        await settle(10)

    async def end(self, name: str) -> None:
        self.running[name].set()
        assert await self.tasks[name] == name
        await settle(10)

    async def steps(self, count: int, running: int, step_s: float) -> None:
        for _ in range(count):
            self.harvest.step(running, step_s, 0)
        await settle(10)

    async def online(
        self, tokens: float, sequences: int = 1
    ) -> Callable[[], Coroutine[Any, Any, None]]:
        """An online request; gives what ends it."""
        done = asyncio.Event()

        async def hold() -> None:
            async with self.admission.admit(tokens, sequences=sequences):
                await done.wait()

        task = asyncio.create_task(hold())
        self.held.append(task)  # the loop itself would forget it
        await settle(10)

        async def finish() -> None:
            done.set()
            await task
            await settle(10)

        return finish


async def beside_an_online_request(rows: int) -> Engine:
    """An engine with so many rows and one online request, whose steps may last 50 ms."""
    engine = Engine(tokens=100_000, target_tpot_ms=50)
    await engine.rows(rows)
    engine.harvest.step(rows, None, rows)
    await engine.online(10)
    return engine


def names(count: int) -> list[str]:
    return [f"r{n:02d}" for n in range(count)]


def test_an_idle_replica_is_filled_and_the_next_row_follows_a_finished_one() -> None:
    async def scenario() -> None:
        engine = Engine()
        await engine.rows(15)
        assert sorted(engine.running) == names(12)  # a quarter more than the cache holds
        await engine.end("r03")
        assert "r12" in engine.running
        assert engine.harvest.waiting(JOB) == 2

    asyncio.run(scenario())


def test_an_idle_replica_has_few_rows_that_its_engine_has_not_begun() -> None:
    async def scenario() -> None:
        engine = Engine(tokens=100_000, seqs=1000)
        await engine.rows(300)
        assert len(engine.running) == LEAST_AHEAD
        await engine.steps(10, 64, 3.0)
        assert len(engine.running) == LEAST_AHEAD
        engine.harvest.step(70, 3.0, 6)
        await settle(10)
        assert len(engine.running) == LEAST_AHEAD + 6
        await engine.online(10)
        assert engine.harvest.aborted == LEAST_AHEAD

    asyncio.run(scenario())


def test_an_online_request_gets_its_tokens_at_once_and_the_youngest_rows_yield() -> None:
    async def scenario() -> None:
        engine = Engine()
        await engine.rows(10)
        engine.harvest.step(10, None, 10)
        await engine.online(300)
        assert engine.admission.running == 1  # it did not wait
        # 1,000 tokens, a tenth of them kept free: six rows of 100 stay beside 300.
        assert sorted(engine.running) == names(6)
        assert engine.harvest.aborted == 4

    asyncio.run(scenario())


def test_a_row_too_large_for_beside_an_online_request_delays_no_other() -> None:
    async def scenario() -> None:
        engine = Engine()
        finish = await engine.online(50)
        engine.harvest.step(1, 0.01, 1)
        engine.row("large", tokens=950)
        engine.row("small")
        engine.row("gone", tokens=950)
        await settle(10)
        assert list(engine.running) == ["small"]
        assert engine.harvest.waiting(JOB) == engine.harvest.all_waiting == 2
        engine.tasks["gone"].cancel()
        await settle(10)
        assert engine.harvest.waiting(JOB) == 1
        await finish()
        engine.now += 100  # then it has its turn again, before those that came later
        engine.row("later", tokens=300)
        await settle(10)
        assert list(engine.running) == ["small", "large"]
        await engine.end("small")
        assert list(engine.running) == ["large", "later"]

    asyncio.run(scenario())


def test_a_large_row_that_fits_beside_online_requests_has_the_others_wait_for_it() -> None:
    async def scenario() -> None:
        engine = Engine()
        await engine.online(50)
        engine.harvest.step(1, 0.01, 1)
        engine.row("first", tokens=500)
        await settle(10)
        engine.row("large", tokens=600)
        engine.row("small")
        await settle(10)
        assert list(engine.running) == ["first"]
        await engine.end("first")
        assert list(engine.running) == ["large", "small"]

    asyncio.run(scenario())


def test_a_row_as_large_as_the_cache_goes_where_there_is_nothing_else() -> None:
    async def scenario() -> None:
        engine = Engine()
        finish = await engine.online(50)
        engine.row("large", tokens=1000)
        await settle(10)
        assert not engine.running
        await finish()
        assert list(engine.running) == ["large"]

    asyncio.run(scenario())


def test_rows_that_an_idle_engine_had_not_begun_make_way_for_the_first_online_request() -> None:
    async def scenario() -> None:
        engine = Engine(tokens=100_000, prefill_tokens=100)
        await engine.rows(10, prompt=60)
        engine.harvest.step(6, None, 6)
        await engine.online(10)
        assert engine.harvest.aborted == 4
        # As many of them come again as one step is to begin, and after the one that it waits for.
        assert engine.begun[10:] == []
        engine.harvest.step(7, 0.001, 1)
        await settle(10)
        assert engine.begun[10:] == names(10)[6:8]

    asyncio.run(scenario())


def test_rows_that_made_way_go_first_when_there_is_room_again() -> None:
    async def scenario() -> None:
        engine = Engine(reserve_half_life_s=1.0, idle_s=0.0)
        await engine.rows(10)
        engine.harvest.step(10, None, 10)
        finish = await engine.online(600)
        assert sorted(engine.running) == names(3)
        engine.row("later")
        await finish()
        engine.now += 60
        engine.harvest.step(3, 0.001, 3)
        await settle(10)
        assert engine.begun[10:] == [*names(10)[3:], "later"]
        for name in (*names(10), "later"):
            await engine.end(name)
        assert (engine.harvest.rows, engine.harvest.tokens) == (0, 0)

    asyncio.run(scenario())


def test_while_online_requests_wait_no_batch_row_runs() -> None:
    async def scenario() -> None:
        engine = Engine()
        engine.row("batch")
        await engine.online(1000)
        second = asyncio.create_task(engine.online(1000))
        await settle(10)
        assert engine.admission.crowded
        assert engine.running == {}
        second.cancel()

    asyncio.run(scenario())


def test_beside_online_requests_a_step_gets_only_so_many_prompt_tokens() -> None:
    async def scenario() -> None:
        engine = Engine(tokens=100_000, prefill_tokens=100)
        await engine.online(10)
        await engine.rows(6, prompt=60)
        assert engine.running == {}
        engine.harvest.step(1, None, 1)
        await settle(10)
        assert sorted(engine.running) == names(2)
        engine.harvest.step(3, 0.001, 1)
        await settle(10)
        assert sorted(engine.running) == names(2)  # the other one is still on its way
        engine.harvest.step(3, 0.001, 1)
        await settle(10)
        assert sorted(engine.running) == names(4)

    asyncio.run(scenario())


def test_no_row_is_handed_over_while_more_online_requests_come_than_usual() -> None:
    async def scenario() -> None:
        engine = Engine(tokens=1_000_000, target_tpot_ms=50, prefill_tokens=1000)
        await engine.online(10)
        engine.now += 1
        for _ in range(3):
            await engine.online(500)
        await engine.rows(3, prompt=1000)
        assert not engine.running
        await engine.steps(20, 4, 0.01)
        assert not engine.running
        engine.now += 1  # and as none came since then
        await engine.steps(1, 4, 0.01)
        assert sorted(engine.running) == names(1)

    asyncio.run(scenario())


def test_online_requests_that_keep_coming_hold_no_row_back() -> None:
    async def scenario() -> None:
        engine = Engine(tokens=1_000_000, target_tpot_ms=50, prefill_tokens=1000)
        for _ in range(1000):
            engine.now += 0.05
            finish = await engine.online(250)
            await finish()
        engine.now += 0.05
        await engine.online(250)
        engine.row("row", prompt=1000)
        await engine.steps(1, 4, 0.01)
        assert "row" in engine.running

    asyncio.run(scenario())


def test_rows_yield_when_steps_get_longer_than_online_requests_may_wait() -> None:
    async def scenario() -> None:
        engine = await beside_an_online_request(40)
        await engine.steps(200, 41, 0.1)  # twice as long as they may be
        assert len(engine.running) == 19  # 20.5 sequences, one of them online
        assert sorted(engine.running) == names(19)

    asyncio.run(scenario())


def test_a_row_whose_place_an_online_request_took_comes_back_with_the_next_free_place() -> None:
    async def scenario() -> None:
        engine = Engine(tokens=100_000, seqs=10, target_tpot_ms=50)
        await engine.rows(10)
        engine.harvest.step(10, None, 10)
        await engine.online(10)
        finish = await engine.online(10)
        assert sorted(engine.running) == names(8)
        await finish()
        await engine.steps(1, 9, 0.02)
        assert sorted(engine.running) == names(9)

    asyncio.run(scenario())


def test_rows_make_way_for_each_sequence_of_an_online_request() -> None:
    async def scenario() -> None:
        engine = Engine(tokens=100_000, seqs=10)
        await engine.rows(10)
        engine.harvest.step(10, None, 10)
        await engine.online(10, sequences=4)
        assert sorted(engine.running) == names(6)

    asyncio.run(scenario())


def test_rows_that_went_for_a_burst_come_back_when_it_is_over_and_not_in_its_gaps() -> None:
    async def scenario() -> None:
        engine = await beside_an_online_request(4)
        await engine.steps(200, 5, 0.2)
        assert not engine.running
        await engine.steps(20, 1, 0.02)
        assert not engine.running
        await engine.steps(200, 1, 0.02)
        assert sorted(engine.running) == names(4)

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("prefix_caching", "came_tokens", "fed"), [(True, 100, 4), (True, 6000, 2), (False, 100, 2)]
)
def test_rows_that_made_way_count_little_of_a_step_while_the_cache_still_holds_them(
    prefix_caching: bool, came_tokens: int, fed: int
) -> None:
    async def scenario() -> None:
        engine = Engine(10_000, 10, prefix_caching, prefill_tokens=1000, reserve_half_life_s=0.1)
        for name in names(10):
            engine.row(name, tokens=600, prompt=500)
        await settle(10)
        engine.harvest.step(10, None, 10)
        assert sorted(engine.running) == names(10)
        ends = [await engine.online(10) for _ in range(4)]
        assert sorted(engine.running) == names(6)
        for end in ends:
            await end()
        await (await engine.online(came_tokens))()
        engine.now += 10
        engine.begun.clear()
        engine.harvest.step(6, 0.001, 0)
        await settle(10)
        # Of 1,000 tokens: all four, or what two prompts take.
        assert engine.begun == names(10)[6:][:fed]

    asyncio.run(scenario())


def test_a_cancelled_row_frees_its_place_whether_it_runs_or_waits() -> None:
    async def scenario() -> None:
        engine = Engine(tokens=100)
        await engine.rows(4)
        assert sorted(engine.running) == names(1)
        engine.tasks["r01"].cancel()
        engine.tasks["r00"].cancel()
        await settle(10)
        assert sorted(engine.running) == ["r02"]
        assert engine.tasks["r00"].cancelled()
        assert engine.harvest.waiting(JOB) == 1

    asyncio.run(scenario())


def test_a_failing_row_frees_its_place_and_its_error_is_passed_on() -> None:
    async def scenario() -> None:
        engine = Engine()

        async def fail() -> None:
            raise RuntimeError("engine")

        failed = asyncio.create_task(engine.harvest.run(JOB, 10, 0, fail))
        await settle(10)
        assert isinstance(failed.exception(), RuntimeError)
        assert engine.harvest.rows == 0

    asyncio.run(scenario())


def test_a_row_larger_than_the_cache_goes_alone() -> None:
    async def scenario() -> None:
        engine = Engine(tokens=100, idle_s=1000)
        finish = await engine.online(10)
        engine.row("large", tokens=1e9)
        await settle(10)
        assert engine.running == {}
        await finish()
        assert "large" in engine.running

    asyncio.run(scenario())


def test_a_small_job_gets_its_share_at_once_behind_a_large_one() -> None:
    async def scenario() -> None:
        engine = Engine(tokens=800)
        await engine.rows(100)
        engine.harvest.join("small")
        for n in range(5):
            engine.row(f"s{n}", job="small")
        for name in sorted(engine.running)[:8]:
            await engine.end(name)
        assert engine.harvest.running("small") == 4  # every second place that got free

    asyncio.run(scenario())


def test_rows_of_a_lower_priority_yield_first_and_come_last() -> None:
    async def scenario() -> None:
        engine = Engine()
        engine.harvest.join("low", priority=10)
        for n in range(6):
            engine.row(f"low{n}", job="low")
        await settle(10)
        await engine.rows(6)
        assert len(engine.running) == 12
        engine.harvest.step(12, None, 12)
        await engine.online(400)
        assert sorted(engine.running) == names(5)

    asyncio.run(scenario())


def served(weights: dict[str, float], picks: int) -> dict[str, int]:
    queue: FairQueue[str] = FairQueue()
    for job, weight in weights.items():
        queue.join(job, weight)
        for number in range(picks):
            queue.push(job, number, job)
    counts = dict.fromkeys(weights, 0)
    for _ in range(picks):
        counts[queue.pop(cost=10)] += 1
    return counts


@given(st.dictionaries(st.text(min_size=1, max_size=3), st.integers(1, 20), min_size=1, max_size=6))
def test_jobs_get_room_by_their_weights(weights: dict[str, int]) -> None:
    total = sum(weights.values())
    counts = served({job: float(w) for job, w in weights.items()}, 10 * total)
    for job, weight in weights.items():
        assert abs(counts[job] - 10 * weight) <= len(weights)


def test_a_job_that_comes_late_does_not_take_what_it_did_not_use() -> None:
    queue: FairQueue[str] = FairQueue()
    queue.join("old")
    queue.join("new")
    for number in range(200):
        queue.push("old", number, "old")
    for _ in range(100):
        queue.pop(cost=1)
    for number in range(100):
        queue.push("new", number, "new")
    assert sorted([queue.pop(cost=1) for _ in range(20)]) == ["new"] * 10 + ["old"] * 10


@pytest.mark.parametrize("before", [True, False])
def test_a_job_of_another_priority_takes_nothing_from_one_that_comes_meanwhile(
    before: bool,
) -> None:
    queue: FairQueue[str] = FairQueue()
    queue.join("old")
    queue.join("urgent", priority=-1)
    if before:  # "new" is of the same priority from the start, or becomes it
        queue.join("new", priority=-1)
    for number in range(100):
        queue.push("old", number, "old")
        queue.push("urgent", number, "urgent")
    for _ in range(90):
        assert queue.pop(cost=1) == "urgent"
    queue.join("new")
    for number in range(100):
        queue.push("new", number, "new")
    assert [queue.pop(cost=1) for _ in range(10)] == ["urgent"] * 10
    assert sorted([queue.pop(cost=1) for _ in range(20)]) == ["new"] * 10 + ["old"] * 10


# A random life of a replica: rows and requests come and go, and the rules hold at every moment.
events = st.lists(
    st.tuples(st.sampled_from(["row", "online", "end", "leave", "step"]), st.integers(1, 400)),
    max_size=60,
)


@given(events)
def test_whatever_happens_online_fits_first_and_no_row_is_lost(life: list[tuple[str, int]]) -> None:
    async def scenario() -> None:
        engine = Engine()
        online: list[Callable[[], Coroutine[Any, Any, None]]] = []
        for n, (event, size) in enumerate(life):
            engine.now += 0.1
            if event == "row":
                engine.row(f"r{n}", tokens=size)
            elif event == "online" and len(online) < 5:
                online.append(await engine.online(size))
            elif event == "end" and engine.running:
                await engine.end(min(engine.running))
            elif event == "leave" and online and not engine.admission.crowded:
                await online.pop(0)()
            elif event == "step":
                engine.harvest.step(engine.harvest.rows, size / 10_000, size % 4)
            await settle(10)
            held = engine.harvest.tokens + engine.admission.used_tokens
            if engine.admission.running and engine.harvest.rows:
                assert held <= 1000
            assert engine.harvest.rows == len(engine.running)
        if not engine.admission.crowded:
            for finish in online:
                await finish()
            engine.now += 1000
            while not all(task.done() for task in engine.tasks.values()):
                engine.harvest.update()
                await settle(10)
                await engine.end(min(engine.running))
            assert (engine.harvest.rows, engine.harvest.tokens) == (0, 0)
        else:
            for task in engine.tasks.values():
                task.cancel()

    asyncio.run(scenario())
