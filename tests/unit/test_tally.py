"""What progress and `max_error_fraction` count while a run goes on."""

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phi4ray.batch.answers import Done
from phi4ray.batch.executor import InProcessExecutor
from phi4ray.batch.parts import Receipt, Result, make_receipt
from phi4ray.batch.planning import obtain_plan
from phi4ray.batch.summary import facts_of
from phi4ray.batch.tally import Snapshot, Tally
from phi4ray.batch.worker import WorkerStats
from phi4ray.config import batch_config
from phi4ray.errors import TooManyErrorsError


def receipt(
    shard: int, rows: int, started_at: float = 0.0, seconds: float = 1.0, **errors: int
) -> Receipt:
    codes = list(Counter(errors).elements())
    codes += [None] * (rows - len(codes))
    results = [
        Result(
            id=str(at),
            source_file="s3://in/a.jsonl",
            source_row=at,
            prompt_tokens=None if code else 10,
            completion_tokens=None if code else 3,
            error_code=code,
        )
        for at, code in enumerate(codes)
    ]
    return make_receipt("plan", shard, results, started_at, started_at + seconds)


def working(**open_shards: int) -> WorkerStats:
    """A worker with so many finished rows in each open shard: `working(s3=10)`."""
    return WorkerStats(
        open_shards={
            int(name[1:]): Done(rows, {}, 10 * rows, 3 * rows) for name, rows in open_shards.items()
        }
    )


def test_a_run_starts_with_the_rows_of_earlier_runs() -> None:
    now = Tally(rows_total=1000, rows_resumed=400).snapshot({}, elapsed_s=2.0)
    assert (now.rows_done, now.rows_resumed, now.rows_total) == (400, 400, 1000)
    assert (now.prompt_tokens, now.completion_tokens, now.errors) == (0, 0, {})
    assert now.starting


def test_a_run_is_not_starting_once_a_replica_reports() -> None:
    assert not Tally(1000, 400).snapshot({"a": WorkerStats()}, 2.0).starting


def test_a_run_between_two_replicas_is_not_starting() -> None:
    tally = Tally(1000, 0)
    tally.add(receipt(0, 100), 5.0)
    assert not tally.snapshot({}, 6.0).starting


def test_finished_rows_count_before_their_part_is_written() -> None:
    now = Tally(1000, 0).snapshot({"a": working(s0=60), "b": working(s1=40)}, 1.0)
    assert (now.rows_done, now.prompt_tokens, now.completion_tokens) == (100, 1000, 300)


def test_a_written_part_takes_the_place_of_its_open_shard() -> None:
    tally = Tally(1000, 0)
    tally.add(receipt(0, 100, bad=20), 1.0)
    now = tally.snapshot({"a": working(s0=90, s1=5)}, 1.0)
    assert now.rows_done == 105
    assert now.prompt_tokens == 10 * (80 + 5)
    assert now.errors == {"bad": 20}


def test_rows_do_not_drop_while_a_receipt_is_on_its_way() -> None:
    tally = Tally(1000, 0)
    tally.snapshot({"a": working(s0=100, s1=7)}, 1.0)
    assert tally.snapshot({"a": working(s1=9)}, 2.0).rows_done == 109
    tally.add(receipt(0, 100), 3.0)
    assert tally.snapshot({"a": working(s1=9)}, 3.0).rows_done == 109


def test_what_a_lost_worker_had_open_is_lost() -> None:
    tally = Tally(1000, 0)
    tally.add(receipt(0, 100), 1.0)
    assert tally.snapshot({"a": working(s1=50), "b": working(s2=5)}, 1.0).rows_done == 155
    assert tally.snapshot({"b": working(s2=6)}, 2.0).rows_done == 106


def test_a_shard_that_a_worker_begins_again_counts_from_its_new_rows() -> None:
    tally = Tally(1000, 0)
    tally.snapshot({"a": working(s1=50)}, 1.0)
    assert tally.snapshot({"a": working(s1=2)}, 2.0).rows_done == 2


@pytest.mark.parametrize("names", ["ab", "ba"])
def test_a_shard_that_two_workers_tell_of_counts_once(names: str) -> None:
    stats = {names[0]: working(s1=50), names[1]: working(s1=8)}
    assert Tally(1000, 0).snapshot(stats, 1.0).rows_done == 50


def test_a_receipt_that_comes_twice_counts_once() -> None:
    tally = Tally(1000, 0)
    tally.add(receipt(0, 100, bad=1), 1.0)
    tally.add(receipt(0, 100, bad=1), 9.0)
    now = tally.snapshot({}, 9.0)
    assert (now.rows_done, now.error_rows) == (100, 1)
    assert tally.last_part_s == 1.0


def test_times_of_parts_are_kept() -> None:
    tally = Tally(1000, 0)
    tally.snapshot({"a": WorkerStats(), "b": WorkerStats()}, 1.0)
    tally.add(receipt(1, 10), 4.0)
    tally.add(receipt(0, 10, seconds=6.0), 7.5)
    tally.snapshot({"a": WorkerStats()}, 8.0)
    assert (tally.first_part_s, tally.last_part_s) == (4.0, 7.5)
    assert tally.engine_began_s == 1.5


def test_replicas_that_come_late_are_paid_for_only_since_then() -> None:
    tally, first = Tally(1000, 0), {"a": WorkerStats()}
    for hour in range(11):
        tally.snapshot(first, 3600.0 * hour)
    last = tally.snapshot({name: WorkerStats() for name in "abcdefghijklmnop"}, 36000.0)
    config = batch_config({"input": ["x"], "output": "y", "engine": {"model": "m"}})
    assert facts_of(config, tally, last, 0.0, []).gpu_hours == 10.0


def test_replicas_are_paid_for_while_they_start_and_not_once_they_are_gone() -> None:
    tally = Tally(1000, 0)
    tally.snapshot({}, 0.0)
    tally.snapshot({"a": WorkerStats()}, 60.0)  # took a minute to start, as "b" did
    tally.snapshot({"a": WorkerStats(), "b": WorkerStats()}, 100.0)
    tally.snapshot({"b": WorkerStats()}, 110.0)
    tally.snapshot({"a": WorkerStats(), "b": WorkerStats()}, 130.0)  # the process was lost
    tally.snapshot({}, 135.0)
    assert tally.replica_s == 60 + 40 + 60 + 2 * 10 + 20 + 2 * 5


@given(st.lists(st.floats(-1e10, 1e10), min_size=1, max_size=5))
def test_no_worker_s_wall_clock_changes_what_a_run_took(clocks: list[float]) -> None:
    tally = Tally(1000, 0)
    for shard, clock in enumerate(clocks):
        tally.add(receipt(shard, 10, started_at=clock, seconds=2.0), 5.0 + shard)
    assert tally.engine_began_s == pytest.approx(3.0, abs=1e-4)


def test_a_part_that_another_run_began_counts_from_this_one_s_start() -> None:
    tally = Tally(1000, 0)
    tally.add(receipt(0, 10, seconds=100.0), 5.0)
    assert tally.engine_began_s == 0.0


def test_a_part_that_is_rerun_counts_from_the_rerun_s_start() -> None:
    tally = Tally(10, 6, {0: receipt(0, 10, timeout=4)})
    again = receipt(0, 10, seconds=100.0).model_copy(update={"rerun_at": 98.0})
    tally.add(again, 5.0)
    assert tally.engine_began_s == 3.0


def test_loads_are_added_up_and_the_use_of_kv_caches_averaged() -> None:
    stats = {
        "a": WorkerStats(rows_in_flight=10, kv_used_fraction=0.25, running=6, waiting=4),
        "b": WorkerStats(rows_in_flight=30, kv_used_fraction=0.75, running=25, waiting=5),
    }
    now = Tally(1000, 0).snapshot(stats, 1.0)
    assert (now.replicas, now.rows_in_flight, now.running, now.waiting) == (2, 40, 31, 9)
    assert now.kv_used_fraction == 0.5


class Run:
    """A made-up run: its workers answer, write, lose a receipt's way, die, in any order."""

    def __init__(self, sizes: list[int], bad: int) -> None:
        self.sizes, self.bad = sizes, bad
        self.open: dict[str, dict[int, int]] = {"a": {}, "b": {}}
        self.written: list[int] = []
        self.told: set[int] = set()

    def stats(self) -> Mapping[str, WorkerStats]:
        return {
            name: WorkerStats(
                open_shards={
                    shard: Done(rows, {"bad": min(rows, self.bad)}, 10 * rows, 3 * rows)
                    for shard, rows in shards.items()
                }
            )
            for name, shards in self.open.items()
        }

    def step(self, kind: str, name: str, shard: int) -> Receipt | None:
        shards = self.open.get(name, {})
        if kind == "die":
            self.open.pop(name, None)
        elif kind == "answer" and shard not in self.written:
            self.open.setdefault(name, shards)[shard] = min(
                self.sizes[shard], shards.get(shard, 0) + 1 + self.sizes[shard] // 2
            )
        elif kind == "write" and shards.get(shard) == self.sizes[shard]:
            del shards[shard]
            self.written.append(shard)
        elif kind == "tell" and shard in self.written:
            return self.receipt(shard)
        return None

    def receipt(self, shard: int) -> Receipt:
        self.told.add(shard)
        return receipt(shard, self.sizes[shard], bad=min(self.sizes[shard], self.bad))


steps = st.lists(
    st.tuples(
        st.sampled_from(["answer", "answer", "write", "tell", "die"]),
        st.sampled_from(["a", "b"]),
        st.integers(0, 4),
    ),
    max_size=60,
)
sizes = st.lists(st.integers(1, 20), min_size=5, max_size=5)


@given(sizes, st.integers(0, 3), st.integers(0, 50), steps)
def test_rows_never_pass_the_total_and_add_up_exactly_in_the_end(
    sizes: list[int], bad: int, resumed: int, steps: list[tuple[str, str, int]]
) -> None:
    run, tally = Run(sizes, bad), Tally(sum(sizes) + resumed, resumed)
    for kind, name, shard in steps:
        if found := run.step(kind, name, shard):
            tally.add(found, 1.0)
        now = tally.snapshot(run.stats(), 1.0)
        assert resumed + sum(sizes[shard] for shard in run.told) <= now.rows_done
        assert now.rows_done <= now.rows_total
    receipts = [run.receipt(shard) for shard in range(5)]
    for each in receipts:
        tally.add(each, 2.0)
    now = tally.snapshot(run.stats(), 2.0)
    assert now.rows_done == now.rows_total
    assert now.error_rows == sum(each.error_rows for each in receipts)
    assert now.prompt_tokens == sum(each.prompt_tokens for each in receipts)
    assert now.completion_tokens == sum(each.completion_tokens for each in receipts)


@given(sizes, steps)
def test_rows_never_go_backwards_while_no_worker_is_lost(
    sizes: list[int], steps: list[tuple[str, str, int]]
) -> None:
    run, tally, before = Run(sizes, 0), Tally(sum(sizes), 0), 0
    for kind, name, shard in steps:
        if kind == "die":
            continue
        if found := run.step(kind, name, shard):
            tally.add(found, 1.0)
        now = tally.snapshot(run.stats(), 1.0).rows_done
        assert now >= before
        before = now


def test_a_real_run_adds_up_at_every_moment(tmp_path: Path) -> None:
    lines = [json.dumps({"prompt": f"prompt {row}"}) for row in range(300)]
    lines[::50] = ["{no json"] * 6
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    config = batch_config(
        {
            "input": [str(tmp_path / "rows.jsonl")],
            "output": str(tmp_path / "out"),
            "engine": {"kind": "fake", "model": "fake", "engine_args": {"latency_s": 0.002}},
            "shard_rows": 30,
        }
    )
    executor = InProcessExecutor()
    plan = obtain_plan(config, executor)
    tally, receipts, done = Tally(plan.rows, 0), [], [0]
    taken: list[tuple[WorkerStats, int]] = []
    for found in executor.run_shards(config, plan, range(len(plan.shards))):
        if found is not None:
            receipts.append(found)
            tally.add(found, 1.0)
        stats = executor.stats()
        for worker in stats.values():
            taken.append((worker, sum(done.rows for done in worker.open_shards.values())))
        done.append(tally.snapshot(stats, 1.0).rows_done)
    last = tally.snapshot(executor.stats(), 1.0)
    assert done == sorted(done)
    assert (last.rows_done, last.errors) == (300, {"invalid_json": 6})
    assert last.prompt_tokens == sum(each.prompt_tokens for each in receipts) > 0
    # What was taken from a worker does not change while the worker goes on.
    assert taken
    assert all(
        rows == sum(done.rows for done in worker.open_shards.values()) for worker, rows in taken
    )


def snapshot_with(tally: Tally, rows: int, **errors: int) -> Snapshot:
    return tally.snapshot({"a": WorkerStats(open_shards={9: Done(rows, errors)})}, 1.0)


@pytest.mark.parametrize(
    ("rows", "failed", "fraction", "final"),
    [
        (100, 20, 0.2, False),  # no more than allowed
        (99, 99, 0.2, False),  # too few rows to judge
        (100, 100, None, False),  # not asked for
        (10, 2, 0.2, True),
        (0, 0, 0.0, True),
    ],
)
def test_a_run_goes_on(rows: int, failed: int, fraction: float | None, final: bool) -> None:
    tally = Tally(1000, 500)
    now = snapshot_with(tally, rows, bad=failed)
    tally.check_errors(now, fraction, final=final)
    assert now.rows_done == 500 + rows


@pytest.mark.parametrize(
    ("rows", "failed", "fraction", "final"),
    [(100, 21, 0.2, False), (100, 1, 0.0, False), (10, 3, 0.2, True), (1, 1, 0.99, True)],
)
def test_too_many_errors_stop_a_run(rows: int, failed: int, fraction: float, final: bool) -> None:
    tally = Tally(1000, 500)
    with pytest.raises(TooManyErrorsError, match=f"{failed} of {rows} rows failed"):
        tally.check_errors(snapshot_with(tally, rows, bad=failed), fraction, final=final)


def test_the_reason_names_the_codes_of_written_and_open_rows_most_frequent_first() -> None:
    tally = Tally(5000, 0)
    tally.add(receipt(0, 1000, invalid_json=400, missing_prompt=900 - 400), 1.0)
    now = snapshot_with(tally, 1000, missing_prompt=800, timeout=1)
    with pytest.raises(TooManyErrorsError) as caught:
        tally.check_errors(now, 0.05)
    message = str(caught.value)
    assert "missing_prompt (1,300), invalid_json (400), timeout (1)" in message
    assert "max_error_fraction=0.05" in message
    assert "same command with a higher fraction" in message


def test_a_rewritten_part_counts_only_what_the_rerun_adds() -> None:
    tally = Tally(10, 6, {0: receipt(0, 10, timeout=4)})
    tally.add(receipt(0, 10, timeout=1), 1.0)
    snapshot = tally.snapshot({}, 1.0)
    assert (snapshot.rows_done, snapshot.error_rows) == (10, 1)
    assert (snapshot.prompt_tokens, snapshot.completion_tokens) == (30, 9)
