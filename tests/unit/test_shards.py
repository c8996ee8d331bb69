"""Whole batch jobs on replicas that serve online traffic, without Ray: nothing lost or doubled."""

import asyncio
import itertools
import math
import random
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

import pytest
from rich.console import Console

from phi4ray import preemption
from phi4ray.batch import answers as answers_module
from phi4ray.batch import jobtable
from phi4ray.batch.jobtable import MAX_DIED, JobTable, Orders, Report
from phi4ray.batch.parts import Receipt
from phi4ray.batch.plan import Plan
from phi4ray.batch.run import run_batch
from phi4ray.batch.worker import WorkerStats
from phi4ray.config import BatchConfig, Endpoint, EngineConfig
from phi4ray.demand import prompt_of
from phi4ray.errors import InputError, PlanMismatchError
from phi4ray.fake import FakeReplica, fake_text
from phi4ray.preemption import Preemptible
from phi4ray.protocol import Answer, Json, RowError
from phi4ray.serve import executor as executor_module
from phi4ray.serve.admission import Admission, AdmissionConfig
from phi4ray.serve.executor import TableExecutor
from phi4ray.serve.harvest import Harvest
from phi4ray.serve.shards import BATCH_PRIORITY, ShardHost
from phi4ray.serve.slack import HarvestConfig
from phi4ray.storage import join, storage_for
from tests.small_jobs import answers, job, prompts, write_lines

T = TypeVar("T")
R = TypeVar("R")

ENGINE = EngineConfig(kind="fake", model="tiny", max_num_seqs=8)


class Engine(FakeReplica):
    """Keeps what it was asked, and how many rows it has at once."""

    def __init__(self, **knobs: Any) -> None:
        super().__init__(ENGINE.model_copy(update={"engine_args": knobs}))
        self.bodies: list[Json] = []
        self.asked: list[tuple[str, Preemptible | None]] = []
        self.most = 0
        self.deadly: str | None = None

    async def complete(self, endpoint: Endpoint, body: Json) -> Answer:
        self.bodies.append(body)
        self.asked.append((prompt_of(body), preemption._asked.get()))
        self.most = max(self.most, self.kv().running + 1)
        if self.deadly is not None and prompt_of(body) == self.deadly:
            self._dead = True
        return await super().complete(endpoint, body)


class Replica:
    """One replica: its engine, its online admission and its door for shards."""

    def __init__(
        self, name: str, table: Callable[[], JobTable], model: str = ENGINE.model, **knobs: Any
    ) -> None:
        self.engine = Engine(**knobs)
        self.admission = Admission(AdmissionConfig(), capacity_tokens=100_000, max_num_seqs=8)
        self.harvest = Harvest(HarvestConfig(idle_s=0.1), self.admission)
        self.engine.on_step = self.harvest.step
        engine = ENGINE.model_copy(update={"model": model})
        self.host = ShardHost(name, engine, self.engine, self.harvest)
        self._table = table
        self._task = asyncio.create_task(self._exchange())

    async def _exchange(self) -> None:
        while True:
            report = self.host.report()
            self.host.obey(report, self._table().exchange(report, time.monotonic()))
            await asyncio.sleep(0.01)

    async def asked(self, rows: int) -> None:
        """Until its engine was asked so many."""
        while len(self.engine.bodies) < rows:
            await asyncio.sleep(0.005)

    def drain(self, draining: bool = True) -> None:
        self.host.drain(draining)

    def report(self) -> Report:
        return self.host.report()

    def kill(self) -> None:
        """Its process is gone: nothing it does from now on counts."""
        self._task.cancel()
        for running in self.host._jobs.values():
            running.worker.cancel()
            for lane in list(running.lanes.values()):
                lane.cancel()


class Fleet:
    """An `Executor` on replicas of this process, which a scenario lets come and go."""

    def __init__(self, scenario: Callable[["Fleet"], Any]) -> None:
        self.table = JobTable(time.monotonic() - 100)
        self.replicas: list[Replica] = []
        self.stopped: RowError | None = None
        self.same_engine = True
        self._made = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.scenario: Future[Any] = self.do(scenario(self))

    def do(self, work: Any) -> "Future[Any]":
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def start(self, **knobs: Any) -> Replica:
        self._made += 1
        replica = Replica(f"replica-{self._made}", lambda: self.table, **knobs)
        self.replicas.append(replica)
        return replica

    def kill(self, at: int) -> None:
        self.replicas.pop(at).kill()

    def map(self, function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
        return map(function, items)

    def stats(self) -> Mapping[str, WorkerStats]:
        return {}

    def ask(self, method: str, *arguments: Any) -> Any:
        now_s = () if method in ("forget", "stop") else (time.monotonic(),)
        return getattr(self.table, method)(*arguments, *now_s)

    def run_shards(
        self, config: BatchConfig, plan: Plan, pending: Sequence[int]
    ) -> Iterator[Receipt | None]:
        executor = TableExecutor(
            "phi4", self.ask, self, lambda: self.stopped, print, same_engine=self.same_engine
        )
        return executor.run_shards(config, plan, pending)

    def close(self) -> None:
        self.scenario.cancel()

        async def end() -> None:
            others = asyncio.all_tasks() - {asyncio.current_task()}
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)

        self.do(end()).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executor_module, "TICK_S", 0.01)
    monkeypatch.setattr(jobtable, "SILENT_S", 0.3)
    monkeypatch.setattr(jobtable, "BACKUP_AFTER_S", 0.5)
    monkeypatch.setattr(answers_module, "BACKOFF_S", 0.0)


@pytest.fixture
def fleet() -> Iterator[Callable[..., Fleet]]:
    made: list[Fleet] = []

    def make(scenario: Callable[[Fleet], Any]) -> Fleet:
        made.append(Fleet(scenario))
        return made[-1]

    yield make
    for one in made:
        one.close()


def planned(folder: Path, rows: int, **changes: Any) -> BatchConfig:
    write_lines(folder / "in" / "a.jsonl", prompts(rows))
    return job(folder, engine={"max_num_seqs": 8}, shard_rows=5, **changes)


def quiet() -> Console:
    return Console(quiet=True)


def finish(config: BatchConfig, on: Fleet) -> list[dict[str, Any]]:
    """Run a job; gives its rows, each of which is answered."""
    run_batch(config, on, quiet())
    rows = answers(config)
    assert all(row["error_code"] is None for row in rows)
    assert all(row["text"] == fake_text(f"prompt {row['n']}") for row in rows)
    return rows


def test_a_job_runs_on_the_replicas_of_a_service(
    tmp_path: Path, fleet: Callable[..., Fleet], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Nothing is lost here that would have to be done again after a while.
    monkeypatch.setattr(jobtable, "SILENT_S", math.inf)
    monkeypatch.setattr(jobtable, "BACKUP_AFTER_S", math.inf)

    async def scenario(on: Fleet) -> None:
        on.start()
        on.start()

    on = fleet(scenario)
    rows = finish(planned(tmp_path, 103), on)
    assert [row["n"] for row in rows] == list(range(103))
    bodies = [body for replica in on.replicas for body in replica.engine.bodies]
    assert len(bodies) == 103
    assert {body["priority"] for body in bodies} == {BATCH_PRIORITY}


@pytest.mark.slow
def test_each_row_is_answered_once_while_replicas_come_go_and_are_busy(
    tmp_path: Path, fleet: Callable[..., Fleet]
) -> None:
    chance = random.Random(7)
    events = {"killed": 0, "restarted": 0, "bursts": 0}

    async def burst(replica: Replica) -> None:
        async with replica.admission.admit(95_000):
            await asyncio.sleep(0.1)

    async def scenario(on: Fleet) -> None:
        on.start(latency_s=0.02)
        on.start(latency_s=0.02)
        bursts = set()
        for move in itertools.cycle(("killed", None, "restarted", None)):
            await asyncio.sleep(0.15)
            replica = chance.choice(on.replicas)
            bursts.add(asyncio.create_task(burst(replica)))
            events["bursts"] += 1
            if move == "killed":
                on.kill(on.replicas.index(replica))
                on.start(latency_s=0.02)
            elif move == "restarted":
                on.table = JobTable(time.monotonic())
            if move:
                events[move] += 1

    on = fleet(scenario)
    rows = finish(planned(tmp_path, 1000), on)
    assert [row["n"] for row in rows] == list(range(1000))
    assert min(events.values()) >= 2


def test_a_burst_of_online_requests_stops_batch_and_no_row_becomes_an_error(
    tmp_path: Path, fleet: Callable[..., Fleet]
) -> None:
    seen: list[int] = []

    async def scenario(on: Fleet) -> None:
        replica = on.start(latency_s=0.05)
        while not replica.engine.kv().running:
            await asyncio.sleep(0.005)
        async with replica.admission.admit(100_000):
            await asyncio.sleep(0.01)
            seen.append(replica.engine.kv().running)
            await asyncio.sleep(0.2)
            seen.append(replica.engine.kv().running)
        seen.append(replica.harvest.aborted)

    on = fleet(scenario)
    rows = finish(planned(tmp_path, 60), on)
    assert len(rows) == 60
    assert seen[:2] == [0, 0]
    assert seen[2] > 0
    assert {row["attempts"] for row in rows} == {1}
    # Each is one request, also if it was asked twice, and goes on where it was.
    asked = on.replicas[0].engine.asked
    assert len(asked) > 60
    assert len(set(asked)) == len({request for _, request in asked}) == 60


def test_a_draining_replica_gives_all_its_rows_up_at_once_and_another_one_answers_them(
    tmp_path: Path, fleet: Callable[..., Fleet]
) -> None:
    drained: list[tuple[int, int]] = []

    async def scenario(on: Fleet) -> None:
        leaving = on.start(latency_s=30)
        while not leaving.engine.kv().running:
            await asyncio.sleep(0.005)
        begun = len(leaving.engine.bodies)
        other = on.start()
        leaving.drain()
        while not other.engine.bodies or leaving.engine.kv().running:
            await asyncio.sleep(0.005)
        await asyncio.sleep(0.1)
        drained.append((len(leaving.engine.bodies) - begun, leaving.harvest.rows))

    rows = finish(planned(tmp_path, 200), fleet(scenario))
    assert [row["n"] for row in rows] == list(range(200))
    assert drained == [(0, 0)]


def test_a_replica_that_does_not_drain_after_all_works_on(
    tmp_path: Path, fleet: Callable[..., Fleet]
) -> None:
    async def scenario(on: Fleet) -> None:
        replica = on.start(latency_s=0.01)
        await replica.asked(50)
        replica.drain()
        await asyncio.sleep(0.1)
        replica.drain(False)

    rows = finish(planned(tmp_path, 200), fleet(scenario))
    assert [row["n"] for row in rows] == list(range(200))


def test_orders_about_a_job_that_has_ended_here_are_passed_over(
    tmp_path: Path, fleet: Callable[..., Fleet]
) -> None:
    """It drained while it asked, and does not any more when the answer comes."""

    async def scenario(on: Fleet) -> None:
        replica = on.start(latency_s=0.01)
        await replica.asked(20)
        report = replica.report()
        orders = Orders(
            live=frozenset(report.wanted),
            begin=dict.fromkeys(report.wanted, (0, 1)),
            drop=dict.fromkeys(report.wanted, frozenset([2])),
        )
        replica.drain()
        replica.drain(False)
        replica.host.obey(report, orders)

    on = fleet(scenario)
    rows = finish(planned(tmp_path, 200), on)
    assert [row["n"] for row in rows] == list(range(200))
    on.scenario.result(1)


def test_waiting_for_slack_is_not_under_the_timeout_of_a_row(
    tmp_path: Path, fleet: Callable[..., Fleet]
) -> None:
    async def scenario(on: Fleet) -> None:
        replica = on.start()
        async with replica.admission.admit(100_000):
            await asyncio.sleep(0.4)

    rows = finish(planned(tmp_path, 10, request_timeout_s=0.2), fleet(scenario))
    assert len(rows) == 10


def test_a_replica_is_not_given_more_rows_than_its_engine_has_places(
    tmp_path: Path, fleet: Callable[..., Fleet]
) -> None:
    async def scenario(on: Fleet) -> None:
        on.start(latency_s=0.01)

    on = fleet(scenario)
    finish(planned(tmp_path, 100), on)
    assert on.replicas[0].engine.most == 10  # eight, and a quarter more that wait in the engine


@pytest.mark.slow
def test_two_jobs_share_the_replicas(tmp_path: Path, fleet: Callable[..., Fleet]) -> None:
    async def scenario(on: Fleet) -> None:
        on.start(latency_s=0.01)

    on = fleet(scenario)
    large, small = planned(tmp_path / "large", 2000), planned(tmp_path / "small", 20)
    thread = threading.Thread(target=finish, args=(large, on), daemon=True)
    thread.start()
    while not on.replicas or not on.replicas[0].engine.bodies:
        time.sleep(0.01)
    finish(small, on)
    assert thread.is_alive()  # the small one came last and was done first
    thread.join(60)
    assert len(answers(large)) == 2000


@pytest.mark.slow
def test_a_job_that_is_stopped_keeps_the_rows_that_are_answered(
    tmp_path: Path, fleet: Callable[..., Fleet]
) -> None:
    async def scenario(on: Fleet) -> None:
        replica = on.start(latency_s=0.02)
        while len(replica.engine.bodies) < 50:
            await asyncio.sleep(0.01)
        on.stopped = RowError("batch_cancelled", "cancelled")

    config = planned(tmp_path, 1000)
    run_batch(config, fleet(scenario), quiet())
    codes = [row["error_code"] for row in answers(config)]
    assert len(codes) == 1000
    assert set(codes) == {None, "batch_cancelled"}
    assert 20 < codes.count(None) < 500


def test_an_error_of_a_shard_fails_the_job_with_its_own_type(
    tmp_path: Path, fleet: Callable[..., Fleet]
) -> None:
    async def scenario(on: Fleet) -> None:
        on.start(latency_s=0.02)

    config = planned(tmp_path, 500)

    class Meddled(Fleet):
        def run_shards(self, *args: Any) -> Iterator[Receipt | None]:
            (tmp_path / "in" / "a.jsonl").write_text("changed\n")
            yield from super().run_shards(*args)

    on = Meddled(scenario)
    try:
        with pytest.raises(InputError, match=r"a\.jsonl"):
            finish(config, on)
    finally:
        on.close()


def test_a_row_that_kills_its_engine_costs_its_shard_and_no_other(
    tmp_path: Path, fleet: Callable[..., Fleet]
) -> None:
    last: list[Report] = []

    async def scenario(on: Fleet) -> None:
        while True:
            replica = on.start()
            replica.engine.deadly = "prompt 7"
            while replica.engine.alive():
                await asyncio.sleep(0.005)
            await asyncio.sleep(0.05)  # until its process ends
            last.append(replica.report())
            on.kill(0)

    config = planned(tmp_path, 100)
    run_batch(config, fleet(scenario), quiet())
    errors = {row["n"]: row["error_code"] for row in answers(config) if row["error_code"]}
    assert errors == dict.fromkeys(range(5, 10), "engine_died")
    assert len(last) == MAX_DIED
    assert all(report.engine_died and not report.holding for report in last)


def test_a_plan_that_was_replaced_fails_the_job(
    tmp_path: Path, fleet: Callable[..., Fleet]
) -> None:
    async def scenario(on: Fleet) -> None:
        on.start()

    config = planned(tmp_path, 50)
    other = planned(tmp_path / "other", 60)

    class Meddled(Fleet):
        def run_shards(
            self, config: BatchConfig, plan: Plan, pending: Sequence[int]
        ) -> Iterator[Receipt | None]:
            theirs = join(other.output, "_plan.json")
            Path(join(config.output, "_plan.json")).write_bytes(storage_for(theirs).read(theirs))
            yield from super().run_shards(config, plan, pending)

    assert len(finish(other, fleet(scenario))) == 60
    on = Meddled(scenario)
    try:
        with pytest.raises(PlanMismatchError):
            finish(config, on)
    finally:
        on.close()


def test_a_job_ends_where_its_service_gets_another_model_and_goes_on_where_it_is_back(
    tmp_path: Path, fleet: Callable[..., Fleet]
) -> None:
    async def redeployed(on: Fleet) -> None:
        old = on.start(latency_s=0.01)
        await old.asked(50)
        on.start(model="tuned")
        old.drain()

    async def back(on: Fleet) -> None:
        on.start()

    config = planned(tmp_path, 200)
    on = fleet(redeployed)
    with pytest.raises(PlanMismatchError, match=r"engine\.model was 'tiny' and is now 'tuned'"):
        finish(config, on)
    assert not on.replicas[1].engine.bodies
    again = fleet(back)
    assert len(finish(config, again)) == 200
    assert len(again.replicas[0].engine.bodies) < 200


def test_a_batch_goes_on_with_whatever_model_has_its_name(
    tmp_path: Path, fleet: Callable[..., Fleet]
) -> None:
    async def scenario(on: Fleet) -> None:
        on.same_engine = False
        on.start(model="tuned")

    assert len(finish(planned(tmp_path, 20), fleet(scenario))) == 20
