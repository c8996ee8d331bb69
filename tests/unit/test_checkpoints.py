"""A checkpoint is whole or not there, on every kind of store."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from phi4ray.storage import join, storage_for
from phi4ray.train.checkpoints import checkpoints, last_checkpoint, prune, seal, upload

pytestmark = pytest.mark.slow


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What a worker has to write."""
    made = tmp_path / "local"
    (made / "inner").mkdir(parents=True)
    (made / "weights").write_bytes(b"w" * 1000)
    (made / "inner" / "state").write_bytes(b"s")
    return made


def test_without_any_there_is_none(prefix: str) -> None:
    assert last_checkpoint(prefix) is None


def test_the_newest_whole_one_comes_back_as_it_was(
    prefix: str, folder: Path, tmp_path: Path
) -> None:
    for step in (5, 100, 20):
        upload(prefix, step, folder)
        seal(prefix, step)
    assert [found.step for found in checkpoints(prefix)] == [5, 20, 100]
    found = last_checkpoint(prefix)
    assert found is not None
    copy = found.download(tmp_path)
    assert copy == tmp_path / "checkpoint-100"
    assert (copy / "weights").read_bytes() == b"w" * 1000
    assert (copy / "inner" / "state").read_bytes() == b"s"


def test_one_that_was_not_sealed_is_none(prefix: str, folder: Path) -> None:
    upload(prefix, 5, folder)
    seal(prefix, 5)
    upload(prefix, 10, folder)
    found = last_checkpoint(prefix)
    assert found is not None
    assert found.step == 5


def test_one_that_lost_a_file_or_a_part_of_it_is_none(prefix: str, folder: Path) -> None:
    for step in (5, 10):
        upload(prefix, step, folder)
        seal(prefix, step)
    storage = storage_for(prefix)
    lost = join(prefix, "_checkpoints/step-00000010/inner/state")
    storage.delete(lost)
    assert [found.step for found in checkpoints(prefix)] == [5]
    storage.write(lost, b"other")
    assert [found.step for found in checkpoints(prefix)] == [5]


def test_only_the_newest_are_kept_and_nothing_half(prefix: str, folder: Path) -> None:
    for step in (5, 10, 15, 20):
        upload(prefix, step, folder)
        if step != 10:
            seal(prefix, step)
    prune(prefix, 2)
    assert [found.step for found in checkpoints(prefix)] == [15, 20]
    uris = [item.uri for item in storage_for(prefix).list(join(prefix, "_checkpoints"))]
    assert {uri.split("/step-")[1][:8] for uri in uris} == {"00000015", "00000020"}


def test_looking_for_one_while_a_run_goes_on_finds_one(prefix: str, folder: Path) -> None:
    upload(prefix, 1, folder)
    seal(prefix, 1)

    def go_on() -> None:
        for step in range(2, 30):
            upload(prefix, step, folder)
            seal(prefix, step)
            prune(prefix, 2)

    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(go_on)
        seen = [1]
        while not running.done():
            # It may be that all that were listed are gone by now, but not that an older one is new.
            if found := last_checkpoint(prefix):
                assert found.step >= seen[-1]
                seen.append(found.step)
        running.result()
    found = last_checkpoint(prefix)
    assert found is not None
    assert found.step == 29


def test_what_several_workers_write_makes_one(prefix: str, folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "rng_state_1").write_bytes(b"r")
    upload(prefix, 5, folder)
    upload(prefix, 5, other)
    seal(prefix, 5)
    found = last_checkpoint(prefix)
    assert found is not None
    names = {path.name for path in found.download(tmp_path).iterdir()}
    assert {"weights", "inner", "rng_state_1"} <= names
