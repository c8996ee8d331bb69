"""A checkpoint of the same name is told from another, and a copy of it is not."""

import os
import shutil
from pathlib import Path

import pytest

from phi4ray.config import EngineConfig
from phi4ray.fingerprint import SAMPLE_BYTES, SAMPLES, fingerprint
from phi4ray.storage import join, storage_for

WEIGHTS = os.urandom(SAMPLES * SAMPLE_BYTES + 1000)


def of(model: object) -> str | None:
    return fingerprint(EngineConfig(model=str(model)))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"hidden_size": 8}')
    (folder / "model.safetensors").write_bytes(WEIGHTS)
    (folder / "README.md").write_text("a card")
    return folder


def test_a_copy_is_the_same_whatever_its_place_times_and_card(model: Path, tmp_path: Path) -> None:
    first = of(model)
    assert first is not None
    assert of(f"{model}/") == first
    copy = shutil.copytree(model, tmp_path / "elsewhere" / "copy")
    os.utime(copy / "model.safetensors", (0, 0))
    (copy / "README.md").write_text("a longer card")
    (copy / ".cache").mkdir()
    (copy / ".cache" / "state.json").write_text("{}")
    assert of(copy) == first


@pytest.mark.parametrize("at", [0, len(WEIGHTS) // 2, len(WEIGHTS) - SAMPLE_BYTES])
def test_weights_that_were_trained_on_are_others(model: Path, at: int) -> None:
    first = of(model)
    changed = WEIGHTS[:at] + os.urandom(SAMPLE_BYTES) + WEIGHTS[at + SAMPLE_BYTES :]
    (model / "model.safetensors").write_bytes(changed)
    assert of(model) != first


def test_other_settings_and_other_files_are_others(model: Path) -> None:
    found = {of(model)}
    (model / "config.json").write_text('{"hidden_size": 9}')
    found.add(of(model))
    (model / "tokenizer.json").write_text("{}")
    found.add(of(model))
    (model / "tokenizer.json").rename(model / "vocab.json")
    found.add(of(model))
    assert len(found) == 4


def test_a_single_file_is_a_model_too(tmp_path: Path) -> None:
    file = tmp_path / "phi.gguf"
    file.write_bytes(b"one")
    first = of(file)
    file.write_bytes(b"two")
    assert None is not first != of(file)


def test_what_is_not_here_is_not_known(tmp_path: Path) -> None:
    assert of("microsoft/phi-4") is None
    assert of(tmp_path / "none") is None
    assert of(tmp_path) is None
    assert fingerprint(EngineConfig(model=str(tmp_path), kind="fake")) is None


@pytest.mark.slow
def test_objects_of_a_bucket_that_were_replaced_are_others(s3_prefix: str) -> None:
    model = join(s3_prefix, "model")
    assert of(model) is None
    storage_for(model).write(join(model, "model.safetensors"), b"one")
    first = of(model)
    storage_for(model).write(join(model, "README.md"), b"a card")
    assert first is not None
    assert of(f"{model}/") == of(model) == first
    storage_for(model).write(join(model, "model.safetensors"), b"two")
    assert of(model) != first
