"""The fine-tune on Ray Train: lost workers are replaced, and errors come as they were raised."""

import io
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from rich.console import Console

from cluster.local import connected
from cluster.train import RayHost
from phi4ray.errors import ConfigError
from phi4ray.train.config import FinetuneConfig
from phi4ray.train.curve import Point, decode_history
from phi4ray.train.finetune import finetune
from tests.chat_models import small_finetune

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]


@pytest.fixture(scope="module", autouse=True)
def ray() -> Iterator[None]:
    with connected(num_cpus=2, worker_logs=False):
        yield


class Killer(RayHost):
    """Kills the worker once, at a step."""

    def __init__(self, step: int) -> None:
        self.shown: list[int] = []
        self.killed_at: int | None = None
        self._step = step

    def train(self, config: FinetuneConfig) -> Iterator[Point | None]:
        for point in super().train(config):
            yield point
            if point is not None:
                self.shown.append(point.step)
                if self.killed_at is None and point.step >= self._step:
                    self.killed_at = point.step
                    worker().kill()


def worker() -> psutil.Process:
    [found] = [
        process
        for process in psutil.Process().children(recursive=True)
        if "RayTrainWorker" in " ".join(process.cmdline())
    ]
    return found


def test_a_killed_worker_is_replaced_and_goes_on_from_the_last_checkpoint(tmp_path: Path) -> None:
    config, host = small_finetune(tmp_path, max_steps=200, dtype="float32"), Killer(9)
    finetune(config, host, Console(file=io.StringIO()))
    assert host.killed_at is not None
    assert host.killed_at < 200 == host.shown[-1]
    assert host.shown.count(1) == 1
    points = decode_history((tmp_path / "out" / "_history.json").read_bytes())
    assert [point.step for point in points] == list(range(1, 201))


def test_an_error_that_would_come_again_comes_once_and_as_it_is(tmp_path: Path) -> None:
    config = small_finetune(tmp_path, lora={"target_modules": ("q_proj",)})
    with pytest.raises(ConfigError, match=r"lora\.target_modules do not fit"):
        finetune(config, RayHost(), Console(file=io.StringIO()))
