"""The Batch API's runner: several batches and tenants, dying engines, failing stores, sweeping."""

import time
from pathlib import Path
from typing import Any

import openai
import pytest

from phi4ray.batches import states
from phi4ray.batches.records import BatchRequest, BatchState, new_batch_id, new_file_id
from phi4ray.batches.store import Key, Store
from phi4ray.batches.sweep import sweep
from phi4ray.storage.local import LocalStorage
from tests.batch_service import (
    CHAT,
    Clock,
    client_of,
    counts,
    create,
    ended,
    expected,
    keys,
    line,
    listening,
    rows_of,
    runner_of,
    running,
    service,
    texts_of,
    upload,
    wait,
)

pytestmark = pytest.mark.slow

SLOW = {"latency_s": 0.2}


def test_an_engine_that_dies_is_started_again(tmp_path: Any) -> None:
    # Each engine answers forty rows: a shard is ten.
    config = service(str(tmp_path), {"die_after": 40}, batches={"shard_rows": 10})
    with listening(config) as url, running(config):
        client = client_of(url)
        batch = ended(client, create(client, upload(client, *map(line, range(100)))).id)
        assert batch.status == "completed"
        assert texts_of(rows_of(client, batch.output_file_id)) == expected(*range(100))


def test_a_clock_that_is_set_back_delays_no_batch(tmp_path: Any) -> None:
    config = service(str(tmp_path), {"die_after": 40}, batches={"shard_rows": 10})
    clock = Clock()

    def back() -> float:
        clock.forward_s -= 60
        return clock()

    with listening(config) as url, running(config, back):
        client = client_of(url)
        batch = ended(client, create(client, upload(client, *map(line, range(100)))).id)
        assert batch.status == "completed"


def test_several_batches_run_at_once_and_no_more_than_so_many(tmp_path: Any) -> None:
    config = service(str(tmp_path), SLOW, batches={"max_concurrent_batches": 2})
    with listening(config) as url, running(config) as runner:
        client = client_of(url)
        ids = [create(client, upload(client, *map(line, range(20)))).id for _ in range(5)]
        most = 0
        while any(client.batches.retrieve(one).status != "completed" for one in ids):
            most = max(most, runner.answering())
            time.sleep(0.01)
        assert most == 2


def test_expired_files_are_gone_and_then_swept(tmp_path: Any) -> None:
    clock = Clock()
    config = service(str(tmp_path))
    store = Store(str(tmp_path))
    with listening(config, clock) as url, running(config, clock) as runner:
        client = client_of(url)
        short = client.files.create(
            file=b"{}", purpose="batch", expires_after={"anchor": "created_at", "seconds": 3600}
        )
        assert short.expires_at == short.created_at + 3600
        file_id = upload(client, line(1))
        batch = ended(
            client,
            create(
                client, file_id, output_expires_after={"anchor": "created_at", "seconds": 7200}
            ).id,
        )
        clock.forward_s = 3601
        with pytest.raises(openai.NotFoundError):
            client.files.retrieve(short.id)
        assert {one.id for one in client.files.list()} == {file_id, batch.output_file_id}
        clock.forward_s = 7300
        assert [one.id for one in client.files.list()] == [file_id]
        runner.sweep()
        assert list(store.all_files()[0]) == [Key("everyone", file_id)]
        assert store.contents() == [("everyone", file_id)]
        assert list(store.storage.list(store.uri("answers/"))) == []


def test_an_upload_that_never_became_a_file_is_swept(tmp_path: Any) -> None:
    clock = Clock()
    config = service(str(tmp_path))
    store = Store(str(tmp_path))
    young = store.content_name("everyone", new_file_id(clock()))
    store.storage.write(store.uri(young), b"")
    with running(config, clock) as runner:
        runner.sweep()
        assert len(store.contents()) == 1
        clock.forward_s = 25 * 3600
        runner.sweep()
        assert store.contents() == []


def test_an_upload_that_a_kill_cut_off_is_swept_when_nobody_can_be_writing_it(
    tmp_path: Any,
) -> None:
    clock, store = Clock(), Store(str(tmp_path))
    name = store.content_name("everyone", new_file_id(clock()))
    with store.storage.create(store.uri(name)) as writer:
        writer.write(b"x")
        (cut_off,) = store.unfinished()
        sweep(store, clock())
        Path(f"{cut_off.uri}0").hardlink_to(cut_off.uri)  # a kill would have left it
    assert [item.uri for item in store.unfinished()] == [f"{cut_off.uri}0"]
    clock.forward_s = 25 * 3600
    sweep(store, clock())
    assert store.unfinished() == []


def test_two_runners_at_once_do_no_harm(tmp_path: Any) -> None:
    config = service(str(tmp_path), {"latency_s": 0.02}, batches={"shard_rows": 5})
    with listening(config) as url, running(config), running(config):
        client = client_of(url)
        ids = [create(client, upload(client, *map(line, range(60)))).id for _ in range(3)]
        for one in ids:
            batch = ended(client, one)
            assert batch.status == "completed"
            answers = rows_of(client, batch.output_file_id)
            assert len(answers) == 60
            assert texts_of(answers) == expected(*range(60))


def test_no_late_write_of_another_runner_undoes_an_end(tmp_path: Any) -> None:
    config = service(str(tmp_path))
    store = Store(str(tmp_path))
    with listening(config) as url:
        client = client_of(url)
        with running(config):
            batch = ended(client, create(client, upload(client, line(1))).id)
            wait(client, batch.id, lambda _: not store.open_batches())
        key = Key("everyone", batch.id)
        store.write_state(key, BatchState(status="in_progress", validated=True, total=1))
        assert client.batches.retrieve(batch.id) == batch
        with running(config):
            assert client.batches.retrieve(batch.id) == batch


def test_a_batch_that_an_earlier_version_ended_has_ended(tmp_path: Any) -> None:
    store, key = Store(str(tmp_path)), Key("everyone", new_batch_id(0))
    store.write_state(key, BatchState(status="completed", completed_at=1))
    assert store.state(key).ended


def test_a_runner_goes_on_from_where_another_one_is(tmp_path: Any) -> None:
    """It had the batch in hand when the other one began to finalize it."""
    config = service(str(tmp_path), {"latency_s": 0.2}, batches={"poll_interval_s": 0.01})
    store = Store(str(tmp_path))
    with listening(config) as url, running(config):
        client = client_of(url)
        batch_id = create(client, upload(client, line(1))).id
        key = Key("everyone", batch_id)
        wait(client, batch_id, lambda batch: batch.status == "in_progress")
        since = int(time.time()) - 60
        store.write_state(key, states.finalizing(store.state(key), since))
        batch = ended(client, batch_id)
        assert batch.finalizing_at == since
        assert texts_of(rows_of(client, batch.output_file_id)) == expected(1)
        assert len(client.files.list().data) == 2


def test_a_batch_outlives_a_change_of_the_engine_and_not_one_of_the_model(tmp_path: Any) -> None:
    root = str(tmp_path)
    held = service(root, {"latency_s": 60}, batches={"shard_rows": 2})
    store = Store(root)

    def planned(batch: Any) -> bool:
        return any(store.storage.list(store.answers(Key("everyone", batch.id))))

    with listening(held) as url:
        client = client_of(url)
        ids = [create(client, upload(client, *map(line, range(5)))).id for _ in range(3)]
        with running(held):
            for one in ids:
                wait(client, one, planned)
        client.batches.cancel(ids[1])
        with running(service(root, engine={"max_model_len": 1000}, batches={"shard_rows": 7})):
            batch = ended(client, ids[0])
            assert (batch.status, counts(batch)) == ("completed", (5, 5, 0))
            assert ended(client, ids[1]).status == "cancelled"
            ended(client, ids[2])

        another = create(client, upload(client, line(1))).id
        with running(held):
            wait(client, another, planned)
        with running(service(root, engine={"served_model_name": "other"})):
            batch = ended(client, another)
        assert batch.status == "failed"
        assert batch.errors is not None
        assert [error.code for error in batch.errors.data or ()] == ["model_not_found"]


def test_a_broken_record_holds_nobody_else_up(tmp_path: Any, caplog: Any) -> None:
    config = service(str(tmp_path))
    store = Store(str(tmp_path))
    with listening(config) as url:
        client = client_of(url)
        broken, whole = (create(client, upload(client, line(1))).id for _ in range(2))
        store.storage.write(store.uri(f"requests/everyone/{broken}.json"), b"{")
        with running(config):
            assert ended(client, whole).status == "completed"
        with pytest.raises(openai.InternalServerError, match="store failed"):
            client.batches.retrieve(broken)
        assert "no record" in caplog.text
        assert Key("everyone", broken) in store.open_batches()


def test_a_store_that_fails_for_a_while_costs_only_time(tmp_path: Any) -> None:
    config = service(f"{tmp_path}/store")
    with listening(config) as url:
        client = client_of(url)
        batch_id = create(client, upload(client, line(1))).id
        states = tmp_path / "store" / "states"
        states.write_text("a file where a folder should be")
        with running(config):
            time.sleep(0.3)
            states.unlink()
            assert ended(client, batch_id).status == "completed"


def test_one_tenants_long_queue_is_not_before_anothers_batch(tmp_path: Any) -> None:
    config = service(
        f"{tmp_path}/store", {"latency_s": 0.1}, gate=keys(tmp_path),
        batches={"max_concurrent_batches": 2}, engine={"max_num_seqs": 10},
    )  # fmt: skip
    with listening(config) as url:
        many, one = client_of(url, "one"), client_of(url, "two")
        file_id = upload(many, *map(line, range(20)))
        queue = [create(many, file_id).id for _ in range(6)]
        last = create(one, upload(one, line(1))).id
        with running(config):
            ended(one, last)
            assert many.batches.retrieve(queue[-1]).status == "in_progress"
            assert all(ended(many, batch_id).status == "completed" for batch_id in queue)


def test_one_tenants_long_batches_are_not_before_anothers(tmp_path: Any) -> None:
    """Both were at work when it came: one of them waits meanwhile, and ends as it should."""
    config = service(
        f"{tmp_path}/store", {"latency_s": 0.05}, gate=keys(tmp_path),
        batches={"max_concurrent_batches": 2, "shard_rows": 2}, engine={"max_num_seqs": 2},
    )  # fmt: skip
    with listening(config) as url, running(config) as runner:
        many, one = client_of(url, "one"), client_of(url, "two")
        file_id = upload(many, *map(line, range(100)))
        long = [create(many, file_id).id for _ in range(2)]
        for batch_id in long:
            wait(many, batch_id, lambda batch: counts(batch)[1] > 0)
        assert runner.answering() == 2
        assert ended(one, create(one, upload(one, line(1))).id).status == "completed"
        for batch_id in long:
            assert many.batches.retrieve(batch_id).status == "in_progress"
        for batch_id in long:
            batch = ended(many, batch_id)
            assert (batch.status, counts(batch)) == ("completed", (100, 100, 0))
            assert texts_of(rows_of(many, batch.output_file_id)) == expected(*range(100))


def test_a_start_does_not_read_hundreds_of_batches_one_by_one(
    tmp_path: Any, monkeypatch: Any
) -> None:
    config = service(str(tmp_path), {"start_error": "no GPU"})
    store, read = Store(str(tmp_path)), LocalStorage.read
    at_once = [0, 0]  # now, and at most

    def slow(self: LocalStorage, *args: Any, **options: Any) -> bytes:
        at_once[0] += 1
        at_once[1] = max(at_once)
        time.sleep(0.005)
        at_once[0] -= 1
        return read(self, *args, **options)

    for number in range(100):
        request = BatchRequest(
            id=new_batch_id(number), endpoint=CHAT, input_file_id=new_file_id(0),
            completion_window="24h", created_at=0, expires_at=int(time.time()) + 1000,
        )  # fmt: skip
        store.create_batch("everyone", request)
    monkeypatch.setattr(LocalStorage, "read", slow)
    runner_of(config).look()
    assert at_once[1] > 4


# Sweeping


def test_what_is_of_no_batch_and_no_file_is_swept_from_the_answers(tmp_path: Any) -> None:
    """As a runner leaves it that wrote after another one had ended the batch."""
    clock = Clock()
    config = service(str(tmp_path))
    store = Store(str(tmp_path))

    def left() -> set[str]:
        return {name for names in store.all_answers().values() for name in names}

    with listening(config) as url, running(config):
        client = client_of(url)
        kept, deleted = (
            ended(client, create(client, upload(client, line(number))).id) for number in range(2)
        )
        wait(client, deleted.id, lambda _: not store.open_batches())
        output = left()
        waiting = new_batch_id(time.time())
        for batch_id in (kept.id, deleted.id, waiting):
            store.storage.write(store.uri(f"answers/everyone/{batch_id}/_parts/late"), b"")
        assert deleted.output_file_id
        store.storage.delete(store.uri(f"files/everyone/{deleted.output_file_id}.json"))
    store.storage.write(store.uri(f"open/everyone/{waiting}"), b"")
    store.cancel(Key("everyone", deleted.id), 0)
    before = left()
    sweep(store, clock())
    assert left() == before  # a runner may be at it yet
    clock.forward_s = 25 * 3600
    sweep(store, clock())
    assert left() == {name for name in output if kept.id in name} | {
        f"answers/everyone/{waiting}/_parts/late"
    }
    assert store.cancels() == set()


def test_a_record_that_cannot_be_read_stops_no_sweep(tmp_path: Any) -> None:
    clock = Clock()
    config = service(str(tmp_path))
    store = Store(str(tmp_path))
    with listening(config) as url, running(config):
        client = client_of(url)
        batch = ended(client, create(client, upload(client, line(1))).id)
        wait(client, batch.id, lambda _: not store.open_batches())
    store.storage.write(store.uri(f"files/everyone/{batch.output_file_id}.json"), b"{")
    lost = store.content_name("everyone", new_file_id(0))
    store.storage.write(store.uri(lost), b"")
    clock.forward_s = 31 * 24 * 3600
    sweep(store, clock())
    files, unreadable = store.all_files()
    assert files == {}
    assert [key.id for key in unreadable] == [batch.output_file_id]
    assert store.contents() == []
    assert list(store.all_answers()) == [Key("everyone", batch.id)]


def test_while_a_request_cannot_be_read_its_owners_inputs_stay(tmp_path: Any) -> None:
    clock = Clock()
    store = Store(str(tmp_path))
    with listening(service(str(tmp_path))) as url:
        client = client_of(url)
        file_id = upload(client, line(1))
        batch_id = create(client, file_id).id
    store.storage.write(store.uri(f"requests/everyone/{batch_id}.json"), b"{")
    clock.forward_s = 31 * 24 * 3600
    sweep(store, clock())
    assert list(store.all_files()[0]) == [Key("everyone", file_id)]
