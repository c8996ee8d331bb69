"""Running shards in this process, and ending when told to."""

import threading
import time
from pathlib import Path
from queue import SimpleQueue

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phi4ray.batch.executor import (
    FILLS,
    IN_FLIGHT_BYTES,
    MAX_IN_FLIGHT,
    InProcessExecutor,
    in_thread,
    shards_in_flight,
    share_of,
    threaded,
)
from phi4ray.batch.plan import Input, Plan, Shard, Slice, make_plan
from phi4ray.batch.planning import obtain_plan
from phi4ray.config import EngineConfig
from phi4ray.errors import EngineStartError
from phi4ray.fake import FakeReplica
from phi4ray.protocol import RowError
from tests.small_jobs import engine, job, parts, prompts, write_lines

# Shards in flight


@given(st.lists(st.integers(1, 2000), min_size=1, max_size=20), st.integers(1, 2000))
def test_shards_in_flight_hold_the_rows_that_fill_a_replica_so_many_times(
    rows: list[int], max_num_seqs: int
) -> None:
    pieces = [Slice(file=0, row_start=0, rows=count) for count in rows]
    shards = [Shard(index=at, slices=(piece,)) for at, piece in enumerate(pieces)]
    plan = make_plan({}, [Input(uri="a.jsonl", size=1, etag="e")], shards, carried="")
    config = job(Path("/x"), engine={"max_num_seqs": max_num_seqs})
    count, mean = shards_in_flight(config, plan), plan.rows / len(shards)
    wanted = FILLS * max_num_seqs
    assert 2 <= count <= MAX_IN_FLIGHT
    assert count == MAX_IN_FLIGHT or (count - 1) * mean >= wanted or mean >= wanted
    assert count == 2 or (count - 2) * int(mean) < wanted  # and not more than it takes


def test_shards_in_flight_may_be_set() -> None:
    plan = Plan(plan_id="p", identity={}, inputs=(), carried="", shards=())
    assert shards_in_flight(job(Path("/x"), shards_in_flight=7), plan) == 7


def test_of_large_shards_fewer_are_in_flight() -> None:
    pieces = [Slice(file=0, row_start=at, rows=1, size=64 << 20) for at in range(100)]
    shards = [Shard(index=at, slices=(piece,)) for at, piece in enumerate(pieces)]
    inputs = [Input(uri="a.jsonl", size=1, etag="e")]
    plan = make_plan({}, inputs, shards, carried="", prompt_bytes=100 * (64 << 20))
    assert shards_in_flight(job(Path("/x")), plan) == IN_FLIGHT_BYTES // (64 << 20)


@given(st.integers(1, 5000), st.integers(1, 64), st.integers(1, 64))
def test_replicas_that_start_first_leave_the_others_their_share(
    shards: int, replicas: int, wanted: int
) -> None:
    share = share_of(shards, replicas, wanted)
    assert min(2, wanted) <= share <= wanted
    assert share == wanted or share * replicas >= shards  # none is left over
    assert share <= 2 or (share - 1) * replicas < shards  # and none goes without


# Results of a thread


def test_results_come_in_the_order_they_were_put_and_all_of_them() -> None:
    results: SimpleQueue[int] = SimpleQueue()

    def work() -> None:
        for number in range(100):
            results.put(number)

    found = [item for item in in_thread(work, results, lambda: None) if item is not None]
    assert found == list(range(100))


def test_what_the_thread_raises_comes_after_what_it_had_put() -> None:
    results: SimpleQueue[int] = SimpleQueue()

    def work() -> None:
        results.put(1)
        raise EngineStartError("no")

    iterator = in_thread(work, results, lambda: None)
    assert next(iterator) == 1
    with pytest.raises(EngineStartError):
        list(iterator)


def test_a_consumer_that_goes_away_stops_the_thread_and_waits_for_its_end() -> None:
    results: SimpleQueue[int] = SimpleQueue()
    stopped, ended = threading.Event(), threading.Event()

    def work() -> None:
        results.put(1)
        stopped.wait()
        ended.set()

    iterator = in_thread(work, results, stopped.set)
    assert next(iterator) == 1
    iterator.close()  # type: ignore[attr-defined]
    assert ended.is_set()


def test_threads_keep_the_order_of_their_items() -> None:
    assert threaded(lambda n: time.sleep(0.001 * (n % 3)) or n, range(50)) == list(range(50))


# Shards


def test_closing_ends_the_work_and_the_engine(tmp_path: Path) -> None:
    write_lines(tmp_path / "in" / "a.jsonl", prompts(40))
    config = job(tmp_path, shard_rows=10)
    made: list[FakeReplica] = []

    class Noted(FakeReplica):
        stopped = False

        async def stop(self) -> None:
            self.stopped = True
            await super().stop()

    def make(config: EngineConfig) -> FakeReplica:
        made.append(Noted(config.model_copy(update={"engine_args": {"latency_s": 60}})))
        return made[-1]

    executor = InProcessExecutor(make)
    plan = obtain_plan(config, executor)
    work = executor.run_shards(config, plan, range(4))
    assert next(work) is None  # it has begun, and nothing is done
    work.close()  # type: ignore[attr-defined]
    assert [replica.stopped for replica in made] == [True]  # type: ignore[attr-defined]
    assert executor.stats() == {}
    assert parts(config) == {}


def test_no_engine_is_started_twice_for_one_run(tmp_path: Path) -> None:
    write_lines(tmp_path / "in" / "a.jsonl", prompts(40))
    config = job(tmp_path, shard_rows=10)
    made: list[EngineConfig] = []

    def make(config: EngineConfig) -> FakeReplica:
        made.append(config)
        return FakeReplica(config)

    executor = InProcessExecutor(make)
    plan = obtain_plan(config, executor)
    receipts = [r for r in executor.run_shards(config, plan, range(4)) if r is not None]
    assert sorted(receipt.shard for receipt in receipts) == [0, 1, 2, 3]
    assert len(made) == 1


def test_only_pending_shards_are_run(tmp_path: Path) -> None:
    write_lines(tmp_path / "in" / "a.jsonl", prompts(40))
    config = job(tmp_path, shard_rows=10)
    executor = InProcessExecutor(engine())
    plan = obtain_plan(config, executor)
    assert [r.shard for r in executor.run_shards(config, plan, [2]) if r is not None] == [2]
    assert list(parts(config)) == [plan.part_name(2)]


def test_stopped_before_it_begins_no_row_is_asked(tmp_path: Path) -> None:
    write_lines(tmp_path / "in" / "a.jsonl", prompts(4))
    config = job(tmp_path, shard_rows=2)
    stopped = RowError("batch_expired", "too late")
    executor = InProcessExecutor(engine(die_after=1), lambda: stopped)
    receipts = executor.run_shards(config, obtain_plan(config, executor), [0, 1])
    told = [receipt.errors for receipt in receipts if receipt is not None]
    assert told == [{"batch_expired": 2}, {"batch_expired": 2}]
