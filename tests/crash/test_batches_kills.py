"""A batch is answered exactly once, however often the process that runs it is SIGKILLed."""

import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
import pytest

from phi4ray.batches.store import Store
from phi4ray.storage.local import LocalStorage
from tests.batch_service import (
    client_of,
    counts,
    create,
    ended,
    expected,
    line,
    listening,
    rows_of,
    runner_of,
    service,
    texts_of,
    upload,
    wait,
)
from tests.bounded import forks
from tests.soak import at_length

ROOT = Path(__file__).parents[2]
ROWS, KILLS = at_length((1000, 2), (2400, 6))
RUNNER = """
import sys
from tests.batch_service import runner_of, service
knobs = {"latency_s": 0.1}
config = service(sys.argv[1], knobs, engine={"max_num_seqs": 10}, batches={"shard_rows": 20})
runner_of(config).run()
"""
pytestmark = [pytest.mark.crash, pytest.mark.timeout(300)]


def test_every_row_has_one_answer_and_what_is_finished_is_not_answered_again(
    s3_prefix: str,
) -> None:
    random_ = random.Random(int(os.environ.get("PHI4RAY_CRASH_SEED", "0")))
    store = Store(s3_prefix)
    with listening(service(s3_prefix)) as url:
        client = client_of(url)
        batch_id = create(client, upload(client, *map(line, range(ROWS)))).id
        seen: dict[str, str] = {}
        for _ in range(KILLS):
            runner = subprocess.Popen([sys.executable, "-c", RUNNER, s3_prefix], cwd=ROOT)
            try:
                done = len(parts(store))
                while len(parts(store)) <= done:
                    assert runner.poll() is None
                    time.sleep(0.1)
                time.sleep(random_.uniform(0, 1))
            finally:
                runner.kill()
                runner.wait()
            now = parts(store)
            assert seen.items() <= now.items(), "a finished part was written again"
            seen = now
            assert client.batches.retrieve(batch_id).status == "in_progress"
        runner = subprocess.Popen([sys.executable, "-c", RUNNER, s3_prefix], cwd=ROOT)
        try:
            batch = ended(client, batch_id)
            check(client, batch.output_file_id)
            wait(client, batch_id, lambda _: not store.open_batches())
        finally:
            runner.kill()
            runner.wait()
    assert batch.status == "completed"
    assert counts(batch) == (ROWS, ROWS, 0)
    assert len(seen) > KILLS


def parts(store: Store) -> dict[str, str]:
    """The finished parts, and their etags."""
    found = store.storage.list(store.uri("answers/"))
    return {item.uri: item.etag for item in found if item.uri.endswith(".parquet")}


def check(client: openai.OpenAI, output_file_id: str | None) -> None:
    answers = rows_of(client, output_file_id)
    assert len(answers) == ROWS
    assert texts_of(answers) == expected(*range(ROWS))


def answer_until_write(root: str, left: int) -> None:
    """Be the service's runner, and die at the write after so many."""
    lock = threading.Lock()

    def dying(change: Callable[..., Any]) -> Callable[..., Any]:
        def dies(*args: Any, **options: Any) -> Any:
            nonlocal left
            with lock:
                left -= 1
                if left < 0:
                    os._exit(9)
            return change(*args, **options)

        return dies

    with pytest.MonkeyPatch.context() as patch:
        for name in ("write", "write_new", "delete"):
            patch.setattr(LocalStorage, name, dying(getattr(LocalStorage, name)))
        engine, batches = {"max_num_seqs": 10}, {"shard_rows": 20}
        runner_of(service(root, engine=engine, batches=batches)).run()


def test_whichever_write_it_dies_at_a_batch_goes_on_and_ends_once(tmp_path: Path) -> None:
    """The first process dies at its first write, the second at its second, and so on."""
    root, store = str(tmp_path), Store(str(tmp_path))
    with listening(service(root)) as url:
        client = client_of(url)
        bad = line(30, body={"model": "m", "messages": []})
        batch_id = create(client, upload(client, *map(line, range(30)), bad)).id
        ids = set()
        for writes in range(40):
            runner = forks.Process(target=answer_until_write, args=(root, writes))
            runner.start()
            while runner.is_alive() and store.open_batches():
                time.sleep(0.05)
            if not store.open_batches():
                runner.kill()
                runner.join()
                break
            runner.join()
            assert runner.exitcode == 9
            batch = client.batches.retrieve(batch_id)
            if batch.status == "completed":
                ids.add((batch.output_file_id, batch.error_file_id))
        assert writes > 10
        batch = client.batches.retrieve(batch_id)
        ids.add((batch.output_file_id, batch.error_file_id))
        assert len(ids) == 1
        assert (batch.status, counts(batch)) == ("completed", (31, 30, 1))
        assert texts_of(rows_of(client, batch.output_file_id)) == expected(*range(30))
        assert [row["custom_id"] for row in rows_of(client, batch.error_file_id)] == ["r30"]
        assert len(client.files.list().data) == 3
