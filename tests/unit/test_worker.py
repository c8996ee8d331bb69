"""A worker: each row asked until it is answered or cannot be, each shard written once and whole."""

import asyncio
import gzip
import json
import time
import types
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from phi4ray.batch import answers as answers_module
from phi4ray.batch import lines as lines_module
from phi4ray.batch import parts as parts_module
from phi4ray.batch import worker as worker_module
from phi4ray.batch.answers import Done
from phi4ray.batch.executor import InProcessExecutor
from phi4ray.batch.parts import (
    PACK_FROM_BYTES,
    Receipt,
    Result,
    encode_part,
    part_reader,
    read_receipt,
)
from phi4ray.batch.plan import Plan
from phi4ray.batch.planning import obtain_plan
from phi4ray.batch.worker import REWRITTEN_AT_ONCE, ShardWorker
from phi4ray.config import BatchConfig, Endpoint
from phi4ray.errors import (
    AccessDeniedError,
    EngineDeadError,
    InputChangedError,
    StorageError,
    TransientStorageError,
)
from phi4ray.fake import FakeReplica, fake_text
from phi4ray.protocol import Answer, Json, RowError, refusal
from phi4ray.storage.local import LocalStorage
from tests.small_jobs import answers, job, parts, prompts, write_lines, write_parquet


class Engine(FakeReplica):
    """A fake engine that a test can see into, and whose answers it can replace."""

    def __init__(self, answer: Callable[[str, int], Answer | None] | None = None, **knobs: Any):
        config = job(Path()).engine.model_copy(update={"engine_args": knobs})
        super().__init__(config)
        self.asked: list[str] = []
        self._answer = answer

    async def complete(self, endpoint: Endpoint, body: Json) -> Answer:
        prompt = body["messages"][-1]["content"]
        self.asked.append(prompt)
        if self._answer and (found := self._answer(prompt, self.asked.count(prompt))):
            return found
        return await super().complete(endpoint, body)


def planned(folder: Path, **changes: Any) -> tuple[BatchConfig, Plan]:
    config = job(folder, **changes)
    return config, obtain_plan(config, InProcessExecutor())


def run(config: BatchConfig, plan: Plan, engine: FakeReplica, *shards: int) -> ShardWorker:
    """Run shards in one worker, all at once."""

    async def all_shards() -> ShardWorker:
        worker = ShardWorker(config, plan, engine)
        await asyncio.gather(*(worker.run(index) for index in shards or range(len(plan.shards))))
        return worker

    return asyncio.run(all_shards())


def rows_of(config: BatchConfig) -> list[dict[str, Any]]:
    return [row for path in parts(config).values() for row in pq.read_table(path).to_pylist()]


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Waiting for a store that is away takes no time; what would have been waited is kept."""
    pauses: list[float] = []
    monkeypatch.setattr(answers_module, "BACKOFF_S", 0.0)
    monkeypatch.setattr("tenacity.nap.time", types.SimpleNamespace(sleep=pauses.append))
    return pauses


# Rows


def test_rows_keep_the_order_of_their_source_whatever_order_they_are_answered_in(
    tmp_path: Path,
) -> None:
    rows = [
        {"id": str(n), "prompt": f"p{n * 7 % 50}", "sampling": {"max_tokens": 1 + n * 13 % 40}}
        for n in range(50)
    ]
    write_lines(tmp_path / "in" / "a.jsonl", rows)
    config, plan = planned(tmp_path)
    engine = Engine()
    run(config, plan, engine)
    found = rows_of(config)
    assert [row["source_row"] for row in found] == list(range(50))
    assert [(row["id"], row["text"]) for row in found] == [
        (row["id"], fake_text(row["prompt"])) for row in rows
    ]
    assert engine.asked != [row["prompt"] for row in rows]  # long answers went first


def test_a_row_is_known_by_file_and_row_where_it_has_no_id(tmp_path: Path) -> None:
    path = write_lines(
        tmp_path / "in" / "a.jsonl", [{"prompt": "x"}, {"id": 7, "prompt": "y"}, b"{"]
    )
    config, plan = planned(tmp_path)
    run(config, plan, Engine())
    assert [row["id"] for row in rows_of(config)] == [f"{path}#0", "7", f"{path}#2"]


def test_a_row_of_parquet_that_is_an_error_for_its_other_columns_keeps_its_id(
    tmp_path: Path,
) -> None:
    table = pa.table(
        {
            "id": ["a", "b", "c", "d"],
            "prompt": pa.array([b"x", b"\xff", b"x", b"x" * 3000]).view(pa.string()),
            "note": pa.array([b"x", b"x", b"\xfe", b"x"]).view(pa.string()),
        }
    )
    write_parquet(tmp_path / "in" / "a.parquet", table)
    config, plan = planned(tmp_path, max_row_mib=1 / 1024)
    run(config, plan, Engine())
    assert [(row["id"], row["error_code"]) for row in rows_of(config)] == [
        ("a", None),
        ("b", "invalid_utf8"),
        ("c", "invalid_utf8"),
        ("d", "row_too_long"),
    ]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_an_id_beside_a_custom_id_is_carried(tmp_path: Path, kind: str) -> None:
    rows = [{"custom_id": "c", "id": 17, "prompt": "x"}]
    if kind == "jsonl":
        write_lines(tmp_path / "in" / "a.jsonl", rows)
    else:
        write_parquet(tmp_path / "in" / "a.parquet", pa.Table.from_pylist(rows))
    config, plan = planned(tmp_path)
    run(config, plan, Engine())
    assert [(row["id"], row["input_id"]) for row in rows_of(config)] == [("c", 17)]


def test_rows_without_a_request_are_errors_that_no_engine_sees(tmp_path: Path) -> None:
    bad = [b"{", b"\xff", b"[]", {"id": "a"}, {"prompt": 1}, {"messages": []}]
    path = write_lines(tmp_path / "in" / "a.jsonl", [*bad, {"prompt": "good"}])
    config, plan = planned(tmp_path)
    engine = Engine()
    run(config, plan, engine)
    assert engine.asked == ["good"]
    *errors, good = rows_of(config)
    assert [row["error_code"] for row in errors] == [
        "invalid_json",
        "invalid_utf8",
        "invalid_type",
        "missing_prompt",
        "invalid_type",
        "empty_messages",
    ]
    for number, row in enumerate(errors):
        assert row["error_message"].startswith(f"{path}#{number}: ")
        assert (row["attempts"], row["text"], row["response"]) == (0, None, None)
    assert (good["text"], good["error_code"], good["attempts"]) == (fake_text("good"), None, 1)


def test_a_row_that_the_engine_refuses_is_an_error_after_one_try(tmp_path: Path) -> None:
    write_lines(tmp_path / "in" / "a.jsonl", [{"prompt": "x" * 100_000}, {"prompt": "fits"}])
    config, plan = planned(tmp_path, engine={"max_model_len": 100})
    engine = FakeReplica(config.engine)
    run(config, plan, engine)
    long, fits = rows_of(config)
    assert (long["error_code"], long["attempts"]) == ("context_length_exceeded", 1)
    assert json.loads(long["response"])["error"]["code"] == "context_length_exceeded"
    assert (fits["error_code"], fits["attempts"]) == (None, 1)


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens", "top_logprobs"])
def test_a_number_of_any_size_is_the_engines_to_refuse_and_costs_no_other_row(
    tmp_path: Path, name: str
) -> None:
    row = {"prompt": "b", "sampling": {name: 10**400}}
    write_lines(tmp_path / "in" / "a.jsonl", [{"prompt": "a"}, row])
    config, plan = planned(tmp_path)
    engine = Engine(lambda prompt, _: refusal("too_many", "no", 400) if prompt == "b" else None)
    run(config, plan, engine)
    assert [row["error_code"] for row in rows_of(config)] == [None, "too_many"]


@pytest.mark.parametrize("status", sorted(answers_module.RETRY_STATUS))
def test_a_transient_failure_is_tried_again_until_it_is_answered(
    tmp_path: Path, status: int
) -> None:
    write_lines(tmp_path / "in" / "a.jsonl", prompts(3))
    config, plan = planned(tmp_path, max_attempts=4)
    failing = refusal("engine_error", "not now", status)
    run(config, plan, Engine(lambda prompt, time: failing if time < 3 else None))
    assert [(row["attempts"], row["error_code"]) for row in rows_of(config)] == [(3, None)] * 3


def test_a_failure_that_stays_is_an_error_after_max_attempts(tmp_path: Path) -> None:
    write_lines(tmp_path / "in" / "a.jsonl", prompts(2))
    config, plan = planned(tmp_path, max_attempts=3)
    engine = Engine(fail_times=99)
    run(config, plan, engine)
    assert [(row["attempts"], row["error_code"]) for row in rows_of(config)] == [
        (3, "engine_error")
    ] * 2
    assert len(engine.asked) == 6


def test_pauses_between_tries_double_up_to_a_bound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_lines(tmp_path / "in" / "a.jsonl", prompts(1))
    config, plan = planned(tmp_path, max_attempts=7)
    pauses: list[float] = []

    async def sleep(seconds: float) -> None:
        pauses.append(seconds)

    monkeypatch.setattr(answers_module, "BACKOFF_S", 0.5)
    monkeypatch.setattr(answers_module.random, "uniform", lambda low, high: high)
    monkeypatch.setattr(asyncio, "sleep", sleep)
    run(config, plan, Engine(fail_times=99))
    assert pauses == [1, 2, 4, 8, 10, 10]


def test_a_row_that_takes_too_long_is_tried_again_and_then_an_error(tmp_path: Path) -> None:
    write_lines(tmp_path / "in" / "a.jsonl", prompts(2))
    config, plan = planned(tmp_path, max_attempts=2, request_timeout_s=0.01)
    engine = Engine(latency_s=30)
    run(config, plan, engine)
    assert [(row["error_code"], row["attempts"]) for row in rows_of(config)] == [("timeout", 2)] * 2
    assert engine.kv().running == 0  # what timed out does not go on


# Shards


def test_the_next_shards_rows_do_not_wait_for_the_last_ones(tmp_path: Path) -> None:
    write_lines(tmp_path / "in" / "a.jsonl", prompts(30))
    config, plan = planned(tmp_path, shard_rows=10)
    others_done = asyncio.Event()

    class Slow(Engine):
        async def complete(self, endpoint: Endpoint, body: Json) -> Answer:
            if body["messages"][-1]["content"] == "prompt 3":
                await others_done.wait()  # for ever, were there a barrier between shards
            answer = await super().complete(endpoint, body)
            if len(self.asked) == 29:
                others_done.set()
            return answer

    run(config, plan, Slow())
    assert len(rows_of(config)) == 30


def test_shards_hand_their_rows_over_one_after_the_other(tmp_path: Path) -> None:
    write_lines(tmp_path / "in" / "a.jsonl", prompts(40))
    config, plan = planned(tmp_path, shard_rows=10, engine={"max_num_seqs": 2})
    engine = Engine(latency_s=0.0001)
    engine.config = config.engine
    run(config, plan, engine)
    asked = [int(prompt.split()[1]) // 10 for prompt in engine.asked]
    assert len(asked) == 40
    turns = [shard for at, shard in enumerate(asked) if at == 0 or asked[at - 1] != shard]
    assert len(turns) == 4  # no two shards take turns


def test_rows_that_may_take_longest_go_first_whatever_their_shard(tmp_path: Path) -> None:
    limits = [[10, 10, 1000], [10, 10, 500], [10, 10, 2000]]
    rows = [
        {"prompt": f"prompt {shard} {limit}", "sampling": {"max_tokens": limit}}
        for shard, its in enumerate(limits)
        for limit in its
    ]
    write_lines(tmp_path / "in" / "a.jsonl", rows)
    config, plan = planned(tmp_path, shard_rows=3, engine={"max_num_seqs": 1})
    all_read = asyncio.Event()

    class Filled(Engine):
        """Its room is taken until every shard is read."""

        async def complete(self, endpoint: Endpoint, body: Json) -> Answer:
            await all_read.wait()
            return await super().complete(endpoint, body)

    engine = Filled()
    engine.config = config.engine

    async def all_shards() -> None:
        worker = ShardWorker(config, plan, engine)
        running = [asyncio.create_task(worker.run(index)) for index in range(len(plan.shards))]
        while len(worker.stats().open_shards) < len(plan.shards):
            await asyncio.sleep(0.01)
        all_read.set()
        await asyncio.gather(*running)

    asyncio.run(all_shards())
    then = [int(prompt.split()[2]) for prompt in engine.asked[2:]]  # two had gone before
    assert len(then) == 7
    assert then == sorted(then, reverse=True)


def test_no_more_rows_are_with_the_engine_than_it_has_room_for(tmp_path: Path) -> None:
    write_lines(tmp_path / "in" / "a.jsonl", prompts(100))
    config, plan = planned(tmp_path, shard_rows=10)
    most = 0

    class Watched(Engine):
        async def complete(self, endpoint: Endpoint, body: Json) -> Answer:
            nonlocal most
            most = max(most, self.kv().running + 1)
            return await super().complete(endpoint, body)

    engine = Watched(latency_s=0.001)
    engine.config = config.engine.model_copy(update={"max_num_seqs": 4})
    run(config, plan, engine)
    assert most == 5  # a quarter more, so that its queue never runs dry


def test_shards_of_a_compressed_file_that_begin_at_once_cost_one_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "in" / "a.jsonl.gz"
    path.parent.mkdir()
    path.write_bytes(gzip.compress(b'{"prompt": "x"}\n' * 3000))
    config, plan = planned(tmp_path, shard_rows=200)
    opened: list[str] = []

    class Counting(LocalStorage):
        def open(self, uri: str, *, etag: str | None = None) -> BinaryIO:
            opened.append(uri)
            return super().open(uri, etag=etag)

    monkeypatch.setattr(lines_module, "storage_for", lambda uri: Counting())
    run(config, plan, Engine(), *reversed(range(15)))
    assert opened == [str(path)]


def test_a_shard_that_is_done_is_not_asked_again(tmp_path: Path) -> None:
    write_lines(tmp_path / "in" / "a.jsonl", prompts(20))
    config, plan = planned(tmp_path, shard_rows=10)
    run(config, plan, Engine(), 0)
    before = (tmp_path / "out" / plan.part_name(0)).read_bytes()
    engine = Engine()
    run(config, plan, engine)
    assert sorted(engine.asked) == sorted(f"prompt {n}" for n in range(10, 20))
    assert (tmp_path / "out" / plan.part_name(0)).read_bytes() == before


def test_a_dead_engine_ends_its_shards_and_nothing_of_them_is_written(tmp_path: Path) -> None:
    write_lines(tmp_path / "in" / "a.jsonl", prompts(20))
    config, plan = planned(tmp_path, shard_rows=10)
    with pytest.raises(EngineDeadError, match="died"):
        run(config, plan, Engine(die_after=7), 0)
    assert parts(config) == {}


def test_an_input_that_changed_ends_the_shard(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "in" / "a.jsonl", prompts(20))
    config, plan = planned(tmp_path)
    write_lines(path, prompts(20, start=1))
    with pytest.raises(InputChangedError, match="changed after it was planned"):
        run(config, plan, Engine())


def test_stats_tell_what_open_shards_have_finished(tmp_path: Path) -> None:
    write_lines(tmp_path / "in" / "a.jsonl", [*prompts(9), b"{"])
    config, plan = planned(tmp_path)
    seen: list[Done] = []

    class Looking(Engine):
        async def complete(self, endpoint: Endpoint, body: Json) -> Answer:
            answer = await super().complete(endpoint, body)
            seen.append(worker.stats().open_shards[0])
            return answer

    async def shard() -> None:
        nonlocal worker
        worker = ShardWorker(config, plan, Looking())
        await worker.run(0)

    worker: Any = None
    asyncio.run(shard())
    assert [done.rows for done in seen] == list(range(1, 10))
    assert seen[-1].errors == {"invalid_json": 1}
    assert seen[-1].completion_tokens == 4 * 8
    assert worker.stats().open_shards == {}


def test_a_wall_clock_that_is_set_back_does_not_change_how_long_a_shard_took(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_lines(tmp_path / "in" / "a.jsonl", prompts(3))
    config, plan = planned(tmp_path)

    def set_back(prompt: str, times: int) -> None:
        now = time.time()
        monkeypatch.setattr(time, "time", lambda: now - 86400.0)

    run(config, plan, Engine(set_back))
    receipt = read_receipt(config.output, plan, 0)
    assert 0 <= receipt.finished_at - receipt.started_at < 3600


# Failed rows again


def test_a_rerun_asks_only_failed_rows_and_adds_their_attempts(tmp_path: Path) -> None:
    write_lines(tmp_path / "in" / "a.jsonl", prompts(10))
    config, plan = planned(tmp_path, max_attempts=2)
    bad = {"prompt 3", "prompt 8"}
    broken = refusal("engine_error", "not now", 500)
    run(config, plan, Engine(lambda prompt, _: broken if prompt in bad else None))
    first = rows_of(config)
    again = config.model_copy(update={"retry_errors": True})
    engine = Engine()
    run(again, plan, engine)
    second = rows_of(config)
    assert set(engine.asked) == bad
    assert [row["attempts"] for row in second] == [3 if n in (3, 8) else 1 for n in range(10)]
    assert [row["text"] for row in second] == [fake_text(f"prompt {n}") for n in range(10)]
    assert [new for new in second if new["n"] not in (3, 8)] == [
        old for old in first if old["n"] not in (3, 8)
    ]


def test_a_shard_has_more_categories_than_one_file_and_so_may_a_rerun_of_an_old_part(
    tmp_path: Path,
) -> None:
    few = pa.dictionary(pa.int8(), pa.string())
    for name in "ab":
        table = pa.table(
            {
                "prompt": [f"{name}{at}" for at in range(100)],
                "kind": pa.array([f"kind {name}{at}" for at in range(100)], few),
            }
        )
        write_parquet(tmp_path / "in" / f"{name}.parquet", table)
    config, plan = planned(tmp_path, max_attempts=1)
    broken = refusal("engine_error", "not now", 500)
    run(config, plan, Engine(lambda prompt, _: broken if prompt == "a3" else None))
    kinds = [f"kind {name}{at}" for name in "ab" for at in range(100)]
    assert [row["kind"] for row in rows_of(config)] == kinds

    (path,) = parts(config).values()
    table = pq.read_table(path)
    at = table.schema.get_field_index("kind")
    old = table.schema.set(at, pa.field("kind", few))
    with pq.ParquetWriter(path, old) as writer:
        for piece in (table[:100], table[100:]):
            writer.write_table(
                piece.set_column(at, "kind", pa.array(piece["kind"].to_pylist(), few))
            )
    run(config.model_copy(update={"retry_errors": True}), plan, Engine())
    assert [(row["kind"], row["error_code"]) for row in rows_of(config)] == [
        (kind, None) for kind in kinds
    ]


def test_a_rerun_leaves_what_another_worker_answered_meanwhile(tmp_path: Path) -> None:
    write_lines(tmp_path / "in" / "a.jsonl", prompts(10))
    config, plan = planned(tmp_path, max_attempts=1)
    broken = refusal("engine_error", "not now", 500)
    run(config, plan, Engine(lambda prompt, _: broken if prompt == "prompt 3" else None))
    again = config.model_copy(update={"retry_errors": True})

    def slow(prompt: str, _: int) -> Answer:
        with ThreadPoolExecutor(1) as pool:  # asyncio.run wants a thread without a loop
            pool.submit(run, again, plan, Engine()).result()
        return broken

    run(again, plan, Engine(slow))
    row = rows_of(config)[3]
    assert (row["text"], row["error_code"], row["attempts"]) == (fake_text("prompt 3"), None, 2)


def test_a_rerun_that_is_run_once_more_leaves_the_part_alone(tmp_path: Path) -> None:
    write_lines(tmp_path / "in" / "a.jsonl", prompts(10))
    config, plan = planned(tmp_path)
    run(config, plan, Engine())
    path = tmp_path / "out" / plan.part_name(0)
    before = path.read_bytes()
    engine = Engine()
    run(config.model_copy(update={"retry_errors": True}), plan, engine)
    assert (engine.asked, path.read_bytes()) == ([], before)


def test_a_rerun_leaves_a_part_its_start_and_tells_its_own(tmp_path: Path) -> None:
    write_lines(tmp_path / "in" / "a.jsonl", prompts(3))
    config, plan = planned(tmp_path, max_attempts=1)
    broken = refusal("engine_error", "not now", 500)
    run(config, plan, Engine(lambda prompt, _: broken if prompt == "prompt 1" else None))
    first = read_receipt(config.output, plan, 0)
    again = time.time()
    run(config.model_copy(update={"retry_errors": True}), plan, Engine())
    second = read_receipt(config.output, plan, 0)
    assert (second.started_at, second.error_rows) == (first.started_at, 0)
    assert second.rerun_at is not None
    assert again - 0.1 <= second.rerun_at <= second.finished_at
    assert second.took_s == second.finished_at - second.rerun_at


def test_of_many_parts_that_are_rerun_few_are_held_whole_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_lines(tmp_path / "in" / "a.jsonl", prompts(100))
    config, plan = planned(tmp_path, max_attempts=1, shard_rows=5)
    broken = refusal("engine_error", "not now", 500)
    run(config, plan, Engine(lambda prompt, _: broken if int(prompt[7:]) % 5 == 3 else None))
    held: set[int] = set()
    most = 0

    def read(output: str, plan: Plan, shard: int) -> pa.Table:
        nonlocal most
        held.add(shard)
        most = max(most, len(held))
        return parts_module.read_part(output, plan, shard)

    def put(output: str, plan: Plan, receipt: Receipt, data: bytes, **how: Any) -> Receipt:
        time.sleep(0.002)
        held.discard(receipt.shard)
        return parts_module.put_part(output, plan, receipt, data, **how)

    monkeypatch.setattr(worker_module, "read_part", read)
    monkeypatch.setattr(worker_module, "put_part", put)
    run(config.model_copy(update={"retry_errors": True}), plan, Engine(latency_s=0.01))
    assert [row["text"] for row in rows_of(config)] == [
        fake_text(f"prompt {n}") for n in range(100)
    ]
    assert 1 <= most <= REWRITTEN_AT_ONCE


# The store's faults


class Store(LocalStorage):
    """Writes parts; the first calls fail, before or after they did their work."""

    def __init__(self, fails: int, error: StorageError, *, after: bool = False) -> None:
        self.fails, self.error, self.after = fails, error, after
        self.calls = 0

    def write_new(self, uri: str, data: bytes, *, sha256: str | None = None) -> None:
        self.calls += 1
        failing = self.calls <= self.fails
        if not failing or self.after:
            super().write_new(uri, data, sha256=sha256)
        if failing:
            raise self.error


def test_answers_outlast_an_outage_of_the_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_pauses: list[float]
) -> None:
    write_lines(tmp_path / "in" / "a.jsonl", prompts(10))
    config, plan = planned(tmp_path)
    store, engine = Store(5, TransientStorageError("the store is away")), Engine()
    monkeypatch.setattr(parts_module, "storage_for", lambda uri: store)
    run(config, plan, engine)
    assert len(rows_of(config)) == len(engine.asked) == 10
    assert (store.calls, len(no_pauses)) == (6, 5)


def test_a_write_that_was_done_though_it_seemed_to_fail_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_lines(tmp_path / "in" / "a.jsonl", prompts(10))
    config, plan = planned(tmp_path)
    store = Store(1, TransientStorageError("no reply"), after=True)
    monkeypatch.setattr(parts_module, "storage_for", lambda uri: store)
    run(config, plan, Engine())
    assert store.calls == 2
    assert len(rows_of(config)) == 10


def test_a_store_that_refuses_ends_the_shard_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_lines(tmp_path / "in" / "a.jsonl", prompts(10))
    config, plan = planned(tmp_path)
    store = Store(1, AccessDeniedError("no"))
    monkeypatch.setattr(parts_module, "storage_for", lambda uri: store)
    with pytest.raises(AccessDeniedError):
        run(config, plan, Engine())
    assert store.calls == 1


def test_an_input_that_cannot_be_read_for_a_while_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_pauses: list[float]
) -> None:
    write_lines(tmp_path / "in" / "a.jsonl", prompts(10))
    config, plan = planned(tmp_path)

    class Away(LocalStorage):
        calls = 0

        def read(
            self, uri: str, start: int = 0, end: int | None = None, *, etag: str | None = None
        ) -> bytes:
            self.calls += 1
            if self.calls < 4:
                raise TransientStorageError("the store is away")
            return super().read(uri, start, end, etag=etag)

    store = Away()
    monkeypatch.setattr("phi4ray.batch.files.storage_for", lambda uri: store)
    run(config, plan, Engine())
    assert len(rows_of(config)) == 10
    assert len(no_pauses) == 3


# Being told to stop

CANCELLED = RowError("batch_cancelled", "it was cancelled")


def test_a_worker_that_is_stopped_keeps_answers_and_gives_the_rest_an_error(
    tmp_path: Path,
) -> None:
    write_lines(tmp_path / "in" / "a.jsonl", prompts(10))
    config, plan = planned(tmp_path, shard_rows=5, engine={"max_num_seqs": 3})
    held = asyncio.Event()

    class Held(Engine):
        async def complete(self, endpoint: Endpoint, body: Json) -> Answer:
            if len(self.asked) >= 2:
                self.asked.append("held")
                held.set()
                await asyncio.Event().wait()  # for ever
            return await super().complete(endpoint, body)

    engine = Held()
    engine.config = config.engine

    async def scenario() -> None:
        worker = ShardWorker(config, plan, engine)
        shards = [asyncio.create_task(worker.run(index)) for index in range(2)]
        await held.wait()
        worker.stop(CANCELLED)
        worker.stop(RowError("too_late", "the first one counts"))
        receipts = await asyncio.gather(*shards)
        assert sum(receipt.rows for receipt in receipts) == 10
        assert sum(receipt.errors.get("batch_cancelled", 0) for receipt in receipts) == 8
        assert worker.stats().rows_in_flight == 0

    asyncio.run(scenario())
    rows = answers(config)
    assert [row["id"] for row in rows] == [f"r{number}" for number in range(10)]
    answered = [row for row in rows if row["error_code"] is None]
    assert len(answered) == 2
    assert all(row["text"] == fake_text(f"prompt {row['id'][1:]}") for row in answered)
    assert {row["error_message"] for row in rows} == {None, "it was cancelled"}


def test_a_shard_that_is_cancelled_from_outside_is_not_taken_for_stopped(tmp_path: Path) -> None:
    write_lines(tmp_path / "in" / "a.jsonl", prompts(3))
    config, plan = planned(tmp_path)

    async def scenario() -> None:
        worker = ShardWorker(config, plan, Engine(latency_s=60.0))
        shard = asyncio.create_task(worker.run(0))
        while worker.stats().rows_in_flight < 3:
            await asyncio.sleep(0.01)
        shard.cancel()
        await asyncio.sleep(0)
        worker.stop(CANCELLED)
        with pytest.raises(asyncio.CancelledError):
            await shard

    asyncio.run(scenario())
    assert parts(config) == {}


def test_parts_are_made_one_at_a_time_and_large_answers_wait_compressed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_lines(tmp_path / "in" / "a.jsonl", prompts(8))
    config, plan = planned(tmp_path, shard_rows=2)
    making, most, held = 0, 0, set()

    def make(table: pa.RecordBatchReader) -> bytes:
        nonlocal making, most
        making += 1
        most = max(most, making)
        time.sleep(0.005)
        data = encode_part(table)
        making -= 1
        return data

    def hold(results: list[Result], *others: Any) -> pa.RecordBatchReader:
        held.update((row.response, row.packed is None) for row in results)
        return part_reader(results, *others)

    monkeypatch.setattr(worker_module, "encode_part", make)
    monkeypatch.setattr(worker_module, "part_reader", hold)
    text = "x" * PACK_FROM_BYTES
    answer = Answer(200, {"choices": [{"text": text}], "usage": {}})
    run(config, plan, Engine(lambda *_: answer))
    assert most == 1
    assert held == {(None, False)}
    assert [row["text"] for row in rows_of(config)] == [text] * 8
    assert all(json.loads(row["response"]) == answer.body for row in rows_of(config))
