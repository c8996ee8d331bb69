"""Which replica works on which shards: leases that end, backups, jobs that come and go."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phi4ray.batch.answers import Done
from phi4ray.batch.jobtable import (
    BACKUP_AFTER_S,
    DRIVER_SILENT_S,
    GRACE_S,
    MAX_DIED,
    MAX_LOST,
    SILENT_S,
    Job,
    JobTable,
    Orders,
    Report,
    waits_for,
)
from phi4ray.batch.parts import Receipt, make_receipt
from phi4ray.batch.worker import WorkerStats
from phi4ray.config import BatchConfig, EngineConfig
from phi4ray.errors import InputError, Phi4rayError
from phi4ray.protocol import RowError

ENGINE = EngineConfig(kind="fake", model="m")
CONFIG = BatchConfig(input=("in/",), output="out", engine=ENGINE)


def job(name: str = "job", lanes: int = 4) -> Job:
    return Job(name, CONFIG, "plan", lanes)


def receipt(shard: int) -> Receipt:
    return make_receipt("plan", shard, [], 0, 1)


class Replica:
    """Asks for shards and works on them as it is told to, without an engine."""

    def __init__(self, table: JobTable, name: str) -> None:
        self.table, self.name = table, name
        self.known: set[str] = set()
        self.holding: dict[str, set[int]] = {}

    def exchange(
        self,
        now_s: float,
        wanted: int = 0,
        finished: tuple[tuple[str, int], ...] = (),
        failed: tuple[tuple[str, Phi4rayError], ...] = (),
        done_rows: dict[int, int] | None = None,
    ) -> Orders:
        for name, shard in finished:
            self.holding[name].discard(shard)
        rows = {shard: Done(rows) for shard, rows in (done_rows or {}).items()}
        orders = self.table.exchange(
            Report(
                self.name,
                ENGINE,
                stats={name: WorkerStats(open_shards=rows) for name in self.known},
                holding={name: frozenset(shards) for name, shards in self.holding.items()},
                wanted=dict.fromkeys(self.known, wanted),
                finished=[(name, receipt(shard)) for name, shard in finished],
                failed=failed,
            ),
            now_s,
        )
        self.known &= orders.live
        self.known |= {found.name for found in orders.new}
        self.holding = {name: self.holding.get(name, set()) for name in self.known}
        for name, shards in orders.begin.items():
            self.holding[name] |= set(shards)
        for name, shards in orders.drop.items():
            self.holding[name] -= shards
        return orders


def table(*shards: int, now_s: float = 100.0) -> JobTable:
    found = JobTable(now_s - 2 * GRACE_S)
    found.submit(job(), shards, now_s)
    return found


def test_a_replica_is_told_of_a_job_and_given_shards_in_order() -> None:
    found = table(0, 1, 2, 3)
    a, b = Replica(found, "a"), Replica(found, "b")
    assert a.exchange(100).begin == {"job": (0,)}
    assert a.exchange(100, wanted=2).begin == {"job": (1, 2)}
    assert b.exchange(100).begin == {"job": (3,)}
    assert b.exchange(100, wanted=5).begin == {"job": ()}
    assert found.engine == ENGINE


def test_receipts_are_told_until_the_driver_says_that_it_has_them() -> None:
    found = table(0, 1)
    a = Replica(found, "a")
    a.exchange(100)
    a.exchange(100, wanted=1, finished=(("job", 0),))
    for _ in range(2):
        news = found.poll("job", 0, 100)
        assert news is not None
        assert [one.shard for one in news.receipts] == [0]
    a.exchange(100, finished=(("job", 1),))
    news = found.poll("job", 1, 100)
    assert news is not None
    assert [one.shard for one in news.receipts] == [1]
    assert news.stats.keys() == {"a"}


def test_the_shards_of_a_silent_replica_go_to_another_one_after_all_others() -> None:
    """One of them may be what killed it."""
    found = table(0, 1, 2, 3)
    a, b = Replica(found, "a"), Replica(found, "b")
    a.exchange(100)
    a.exchange(100, wanted=1)
    b.exchange(101)
    assert b.exchange(100 + SILENT_S + 1, wanted=3).begin == {"job": (3, 0, 1)}
    news = found.poll("job", 0, 110)
    assert news is not None
    assert news.stats.keys() == {"b"}


def test_a_draining_replica_hands_its_shards_back_at_once_and_gets_none() -> None:
    found = table(0, 1, 2)
    a, b = Replica(found, "a"), Replica(found, "b")
    a.exchange(100)
    a.exchange(100, wanted=1)
    orders = found.exchange(Report("a", ENGINE, draining=True), 100.1)
    assert orders == Orders(live=frozenset())
    assert b.exchange(100.2).begin == {"job": (1,)}
    assert b.exchange(100.3, wanted=3).begin == {"job": (0, 2)}
    news = found.poll("job", 0, 100.4)
    assert news is not None
    assert (news.stats.keys(), news.replicas) == ({"b"}, 1)


def test_a_shard_may_be_handed_back_by_any_number_of_draining_replicas() -> None:
    found = table(0)
    for n in range(2 * MAX_LOST):
        assert Replica(found, f"r{n}").exchange(100 + n).begin == {"job": (0,)}
        found.exchange(Report(f"r{n}", ENGINE, draining=True), 100.5 + n)
    news = found.poll("job", 0, 200)
    assert news is not None
    assert news.failure is None


def test_a_draining_replica_still_tells_what_it_has_finished() -> None:
    found = table(0, 1)
    Replica(found, "a").exchange(100)
    report = Report("a", ENGINE, finished=[("job", receipt(0))], draining=True)
    found.exchange(report, 100.1)
    news = found.poll("job", 0, 100.2)
    assert news is not None
    assert [one.shard for one in news.receipts] == [0]
    assert Replica(found, "b").exchange(100.3, wanted=3).begin == {"job": (1,)}


def test_shards_are_open_until_they_are_answered_or_nobody_wants_them() -> None:
    found = JobTable(100)
    assert found.open_shards(ENGINE, 1, 100) == 0
    assert found.engine == ENGINE  # where no replica runs, nobody else says so
    found.submit(job(), [0, 1, 2], 100)
    assert found.open_shards(ENGINE, 1, 100) == 3
    a = Replica(found, "a")
    a.exchange(101)
    assert found.open_shards(ENGINE, 1, 101) == 3
    a.exchange(102, finished=(("job", 0),))
    assert found.open_shards(ENGINE, 1, 102) == 2
    assert found.open_shards(ENGINE, 1, 101 + DRIVER_SILENT_S) == 0


def test_the_shards_of_a_job_that_failed_or_was_stopped_are_not_open() -> None:
    stopped = table(0, 1)
    stopped.stop("job", RowError("batch_cancelled", "cancelled"))
    assert stopped.open_shards(ENGINE, 1, 100) == 0
    found = table(0, 1)
    Replica(found, "a").exchange(100)
    Replica(found, "a").exchange(100, failed=(("job", InputError("gone")),))
    assert found.open_shards(ENGINE, 1, 100) == 0


@pytest.mark.parametrize(
    ("budget", "words"),
    [(None, "until Serve has started one"), (0, "batch_replicas"), (2, "being started for them")],
)
def test_a_job_that_no_replica_works_on_says_what_it_waits_for(
    budget: int | None, words: str
) -> None:
    found = table(0)
    if budget is not None:
        found.open_shards(ENGINE, budget, 100)
    news = found.poll("job", 0, 100)
    assert news is not None
    assert words in waits_for("phi4", news)
    Replica(found, "a").exchange(100)
    news = found.poll("job", 0, 101)
    assert news is not None
    assert waits_for("phi4", news) == ""
    news = found.poll("job", 0, 101 + 2 * SILENT_S)
    assert news is not None
    assert words in waits_for("phi4", news)


def test_a_lease_that_the_replica_does_not_hold_ends() -> None:
    found = table(0)
    a, b = Replica(found, "a"), Replica(found, "b")
    a.exchange(100)
    a.holding["job"].clear()  # the orders were lost on their way
    for now_s in range(101, 101 + int(SILENT_S) + 1):
        a.exchange(now_s)
    assert b.exchange(107).begin == {"job": (0,)}


def test_the_slowest_shard_is_given_a_second_time_when_no_other_is_left() -> None:
    found = table(0, 1)
    a, b = Replica(found, "a"), Replica(found, "b")
    a.exchange(100)
    a.exchange(100, wanted=1)
    b.exchange(100)
    late = 101 + BACKUP_AFTER_S
    a.exchange(late, done_rows={0: 10, 1: 5})
    assert b.exchange(late, wanted=1).begin == {"job": (1,)}
    assert a.exchange(late, wanted=1).begin == {"job": ()}  # it has both already
    # The first that finishes has the other one stop.
    assert a.exchange(late + 1, finished=(("job", 1),)).drop == {}
    assert b.exchange(late + 1).drop == {"job": {1}}


def test_a_job_that_was_forgotten_is_not_live_any_more() -> None:
    found = table(0)
    a = Replica(found, "a")
    assert a.exchange(100).live == {"job"}
    found.forget("job")
    assert a.exchange(100).live == frozenset()
    assert found.poll("job", 0, 100) is None


def test_a_job_whose_driver_is_gone_is_forgotten() -> None:
    found = table(0)
    a = Replica(found, "a")
    assert a.exchange(100).live
    assert found.poll("job", 0, 101)
    assert a.exchange(101 + DRIVER_SILENT_S).live
    assert not a.exchange(102 + DRIVER_SILENT_S).live


def test_a_restarted_table_learns_what_replicas_have_in_hand() -> None:
    before = table(0, 1, 2)
    a = Replica(before, "a")
    a.exchange(100)
    a.exchange(100, wanted=1)
    a.table = after = JobTable(200)
    assert a.exchange(200.1).live == {"job"}  # not known, and not to be dropped yet
    after.submit(job(), [0, 1, 2], 200.2)
    a.exchange(200.3)
    b = Replica(after, "b")
    assert b.exchange(200.4).begin == {"job": (2,)}
    assert b.exchange(200.5, wanted=3).begin == {"job": ()}


def test_a_job_that_is_stopped_has_what_is_in_hand_ended_and_begins_nothing() -> None:
    found = table(0, 1)
    a = Replica(found, "a")
    a.exchange(100)
    error = RowError("batch_expired", "too late")
    found.stop("job", error)
    orders = a.exchange(100, wanted=1)
    assert (orders.begin, orders.stop) == ({}, {"job": error})
    news = found.poll("job", 0, 100)
    assert news is not None
    assert news.leased == 1
    a.exchange(100, finished=(("job", 0),))
    news = found.poll("job", 0, 100)
    assert news is not None
    assert (news.leased, len(news.receipts)) == (0, 1)


def test_a_job_that_is_stopped_ends_though_the_replica_that_had_its_shards_is_gone() -> None:
    """And no other one runs, whose report would have the table look for those that are silent."""
    found = table(0, 1)
    Replica(found, "a").exchange(100)
    found.stop("job", RowError("batch_cancelled", "cancelled"))
    news = found.poll("job", 0, 100 + SILENT_S)
    assert news is not None
    assert (news.leased, news.replicas) == (1, 1)
    news = found.poll("job", 0, 101 + SILENT_S)
    assert news is not None
    assert (news.leased, news.replicas, news.stats) == (0, 0, {})


def test_the_first_failure_of_a_replica_fails_the_job_and_stops_it() -> None:
    found = table(0, 1, 2)
    a = Replica(found, "a")
    a.exchange(100)
    a.exchange(100, failed=(("job", InputError("first")), ("job", InputError("second"))))
    assert a.exchange(100, wanted=1).begin == {}
    news = found.poll("job", 0, 100)
    assert news is not None
    assert str(news.failure) == "first"


def die(found: JobTable, name: str, now_s: float) -> None:
    """Have a replica tell, as often as it can, that its engine died."""
    for _ in range(3):
        orders = found.exchange(Report(name, ENGINE, engine_died=True), now_s)
        assert orders == Orders(live=frozenset())


def lost_with(found: JobTable, names: str, now_s: float, wanted: int) -> None:
    """Have one engine after the other die at work on some shards."""
    for name in names:
        replica = Replica(found, name)
        replica.exchange(now_s)
        replica.exchange(now_s, wanted)
        die(found, name, now_s)


def test_a_shard_that_takes_engine_after_engine_down_is_given_up_and_no_other_one() -> None:
    assert MAX_DIED == 3
    found, now_s = table(0, 1, 2), 100.0
    lost_with(found, "ab", now_s, wanted=5)
    for name in "cd":
        # Any of the three may be what kills: no replica has two of them.
        assert Replica(found, name).exchange(now_s, wanted=5).begin == {
            "job": (0,) if name == "c" else (1,)
        }
    d = Replica(found, "d")
    d.holding, d.known = {"job": {1}}, {"job"}
    assert d.exchange(now_s, wanted=5).begin == {"job": ()}
    die(found, "c", now_s)
    news = found.poll("job", 0, now_s)
    assert news is not None
    assert (news.given_up, news.leased, news.failure) == ((0,), 1, None)
    assert d.exchange(now_s, wanted=5, finished=(("job", 1),)).begin == {"job": (2,)}
    d.exchange(now_s, finished=(("job", 2),))
    assert found.open_shards(ENGINE, 1, now_s) == 0


def test_of_replicas_that_are_taken_away_without_a_word_a_shard_may_lose_some_more() -> None:
    found, now_s = table(0), 100.0
    for n in range(MAX_LOST):
        news = found.poll("job", 0, now_s)
        assert news is not None
        assert news.given_up == ()
        assert Replica(found, f"r{n}").exchange(now_s).begin == {"job": (0,)}
        now_s += SILENT_S + 1
    news = found.poll("job", 0, now_s)
    assert news is not None
    assert news.given_up == (0,)


def test_a_replica_has_one_suspect_of_all_jobs() -> None:
    found = table(0)
    found.submit(job("other"), [5, 6], 100)
    now_s = 100.0
    lost_with(found, "ab", now_s, wanted=5)
    found.submit(job("clean"), [7], 100)
    c = Replica(found, "c")
    assert c.exchange(now_s).begin == {"job": (0,), "other": (), "clean": (7,)}
    c.exchange(now_s, finished=(("job", 0),))
    assert c.exchange(now_s, wanted=5).begin["other"] == (5,)
    late = now_s + 2 * BACKUP_AFTER_S
    c.exchange(late)
    assert Replica(found, "d").exchange(late).begin["other"] == (6,)
    c.exchange(late)
    e = Replica(found, "e").exchange(late)  # nothing is left, and suspects have no backup
    assert e.begin["other"] == ()


def test_a_replica_that_was_only_out_of_reach_has_lost_no_shard() -> None:
    found = table(0)
    a = Replica(found, "a")
    a.exchange(100)
    now_s = 100.0
    for _ in range(2 * MAX_LOST):
        now_s += SILENT_S + 1
        news = found.poll("job", 0, now_s)
        assert news is not None
        assert (news.leased, news.given_up) == (0, ())
        a.exchange(now_s)


def test_what_is_given_up_is_dropped_by_a_replica_that_has_it_after_all() -> None:
    found = table(0)
    a = Replica(found, "a")
    a.exchange(100)
    now_s = 101 + SILENT_S
    lost_with(found, "bcd", now_s, wanted=1)
    news = found.poll("job", 0, now_s)
    assert news is not None
    assert news.given_up == (0,)
    assert a.exchange(now_s).drop == {"job": {0}}


moves = st.lists(
    st.tuples(st.sampled_from("abc"), st.sampled_from(["want", "finish", "die", "restart"])),
    max_size=80,
)


@given(moves, st.integers(1, 12))
def test_whatever_happens_each_shard_is_told_once_and_none_is_left(
    life: list[tuple[str, str]], shards: int
) -> None:
    now_s = 100.0
    found = table(*range(shards))
    replicas = {name: Replica(found, name) for name in "abc"}
    told: list[int] = []

    def poll() -> None:
        nonlocal seen
        news = found.poll("job", seen, now_s)
        if news is None:
            found.submit(job(), [n for n in range(shards) if n not in told], now_s)
            seen = 0
            return
        seen += len(news.receipts)
        told.extend(one.shard for one in news.receipts if one.shard not in told)
        told.extend(shard for shard in news.given_up if shard not in told)

    seen = 0
    for name, move in life:
        now_s += 1
        replica = replicas[name]
        if move == "want":
            replica.exchange(now_s, wanted=2)
        elif move == "finish" and (held := replica.holding.get("job")):
            replica.exchange(now_s, finished=(("job", min(held)),))
        elif move == "die":
            replicas[name] = Replica(found, name + str(now_s))
        elif move == "restart":
            found = JobTable(now_s)
            for other in replicas.values():
                other.table = found
        poll()
    survivor: Any = Replica(found, "survivor")
    for _ in range(100 + 10 * shards):
        now_s += 1
        held = survivor.holding.get("job") or set()
        survivor.exchange(now_s, wanted=1, finished=tuple(("job", shard) for shard in held))
        poll()
    news = found.poll("job", seen, now_s)
    assert news is not None
    if news.failure is None:
        assert sorted(told) == list(range(shards))
