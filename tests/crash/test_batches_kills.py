"""A batch is answered exactly once, however often the process that runs it is SIGKILLed."""

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import openai
import pytest

from phi4ray.batches.store import Store
from tests.batch_service import (
    client_of,
    counts,
    create,
    ended,
    expected,
    line,
    listening,
    rows_of,
    service,
    texts_of,
    upload,
    wait,
)

ROOT = Path(__file__).parents[2]
ROWS, KILLS = 2400, 6
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


DYING = """
import os, sys
from phi4ray.storage.local import LocalStorage
left = int(sys.argv[2])
def dying(change):
    def dies(*args, **options):
        global left
        left -= 1
        if left < 0:
            os._exit(9)
        return change(*args, **options)
    return dies
LocalStorage.write = dying(LocalStorage.write)
LocalStorage.write_new = dying(LocalStorage.write_new)
LocalStorage.delete = dying(LocalStorage.delete)
""" + RUNNER.replace('"latency_s": 0.1', "")


def test_whichever_write_it_dies_at_a_batch_goes_on_and_ends_once(tmp_path: Path) -> None:
    """The first process dies at its first write, the second at its second, and so on."""
    root, store = str(tmp_path), Store(str(tmp_path))
    with listening(service(root)) as url:
        client = client_of(url)
        bad = line(30, body={"model": "m", "messages": []})
        batch_id = create(client, upload(client, *map(line, range(30)), bad)).id
        ids = set()
        for writes in range(40):
            runner = subprocess.Popen([sys.executable, "-c", DYING, root, str(writes)], cwd=ROOT)
            while runner.poll() is None and store.open_batches():
                time.sleep(0.05)
            if not store.open_batches():
                runner.kill()
                runner.wait()
                break
            assert runner.wait() == 9
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
