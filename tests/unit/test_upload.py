"""What goes along with a submitted job: a checkout, a folder, or the file of --config alone."""

from pathlib import Path

import pytest

from jobs.upload import uploaded
from phi4ray.errors import ConfigError


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "here"
    folder.mkdir()
    (folder / "job.yaml").write_text("limit: 1\n")
    monkeypatch.chdir(folder)
    return folder


def checkout(folder: Path) -> None:
    (folder / "jobs").mkdir()
    (folder / "jobs" / "batch_infer.py").touch()


def test_nothing_goes_along_where_there_is_no_checkout() -> None:
    with uploaded(None, None) as found:
        assert found == (None, None)


def test_a_config_file_goes_alone() -> None:
    with uploaded(None, "../here/job.yaml") as (folder, file):
        assert folder is not None
        assert file == "job.yaml"
        assert [path.name for path in folder.iterdir()] == ["job.yaml"]
        assert (folder / file).read_text() == "limit: 1\n"
    assert not folder.exists()


def test_a_checkout_goes_whole_with_the_file_in_it(here: Path) -> None:
    checkout(here)
    with uploaded(None, None) as (folder, _):
        assert folder is not None
        assert folder.resolve() == here
    with uploaded(None, str(here / "job.yaml")) as (folder, file):
        assert (folder, file) == (Path(), "job.yaml")


def test_a_folder_that_is_named_goes(here: Path) -> None:
    inner = here / "inner"
    inner.mkdir()
    (inner / "other.yaml").touch()
    with uploaded(inner, "inner/other.yaml") as found:
        assert found == (inner, "other.yaml")


def test_a_file_that_would_not_go_along_is_refused(here: Path) -> None:
    inner = here / "inner"
    inner.mkdir()
    with pytest.raises(ConfigError, match="is not below the folder"), uploaded(inner, "job.yaml"):
        pass
