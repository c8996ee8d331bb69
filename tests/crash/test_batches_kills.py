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
ROWS, KILLS = 900, 8
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


@pytest.mark.parametrize("ends", [3, 8])
def test_killed_at_any_write_of_its_end_a_batch_still_ends_once(tmp_path: Path, ends: int) -> None:
    """The process dies at its n-th write, again and again, until it gets through."""
    config = service(str(tmp_path))
    dying = f"""
import os
from phi4ray.storage.local import LocalStorage
write, left = LocalStorage.write, [{ends}]
def dies(self, uri, data, **options):
    left[0] -= 1
    if left[0] < 0:
        os._exit(9)
    write(self, uri, data, **options)
LocalStorage.write = dies
""" + RUNNER.replace('"latency_s": 0.1', "")
    with listening(config) as url:
        client = client_of(url)
        batch_id = create(client, upload(client, *map(line, range(30)))).id
        codes = []
        while client.batches.retrieve(batch_id).status != "completed":
            runner = subprocess.Popen([sys.executable, "-c", dying, str(tmp_path)], cwd=ROOT)
            while runner.poll() is None and Store(str(tmp_path)).open_batches():
                time.sleep(0.05)
            runner.kill()
            codes.append(runner.wait())
            assert len(codes) < 12
        assert 9 in codes
        check_small(client, client.batches.retrieve(batch_id).output_file_id)


def check_small(client: openai.OpenAI, output_file_id: str | None) -> None:
    answers = rows_of(client, output_file_id)
    assert len(answers) == 30
    assert texts_of(answers) == expected(*range(30))
