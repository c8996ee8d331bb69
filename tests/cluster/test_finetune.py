"""The fine-tune on Ray Train: lost workers are replaced, and errors come as they were raised."""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from cluster.local import connected
from cluster.train import RayHost
from phi4ray.errors import ConfigError, DivergedError, Phi4rayError
from phi4ray.train.config import FinetuneConfig
from phi4ray.train.curve import Point, decode_history
from phi4ray.train.finetune import finetune
from phi4ray.train.host import Host, InProcessHost
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
    steps = 100  # of which most are left when the worker dies
    config, host = small_finetune(tmp_path, max_steps=steps, dtype="float32"), Killer(9)
    finetune(config, host, Console(file=io.StringIO()))
    assert host.killed_at is not None
    assert host.killed_at < steps == host.shown[-1]
    assert host.shown.count(1) == 1
    points = decode_history((tmp_path / "out" / "_history.json").read_bytes())
    assert [point.step for point in points] == list(range(1, steps + 1))


def learned(
    config: FinetuneConfig, host: Host | None = None
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The losses of a run, on Ray if not elsewhere, and the weights that came of it."""
    finetune(config, host or RayHost(), Console(file=io.StringIO()))
    output = Path(config.output)
    points = decode_history((output / "_history.json").read_bytes())
    return [point.loss for point in points], load_file(output / "model" / "model.safetensors")


def test_two_workers_learn_what_one_does_from_batches_twice_as_large(tmp_path: Path) -> None:
    steps: dict[str, Any] = {"method": "full", "learning_rate": 1e-3, "max_steps": 2}
    two = small_finetune(tmp_path / "two", **steps, num_workers=2, per_device_batch_size=4)
    one = small_finetune(tmp_path / "one", **steps, num_workers=1, per_device_batch_size=8)
    (losses, made), (expected, whole) = learned(two), learned(one, InProcessHost())
    assert losses == pytest.approx(expected, rel=1e-3)
    for name, weights in made.items():
        torch.testing.assert_close(weights, whole[name], rtol=0.02, atol=2e-3)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="FSDP splits a model over 2 GPUs")
@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_split_model_learns_what_whole_copies_do(tmp_path: Path, method: str) -> None:
    split = {
        "fsdp": True,
        "fsdp_config": {
            "version": 2, "activation_checkpointing": True, "cpu_ram_efficient_loading": True,
        },
    }  # fmt: skip
    steps: dict[str, Any] = {
        "method": method, "learning_rate": 1e-3, "num_workers": 2, "gpus_per_worker": 1,
        "gradient_checkpointing": False, "training_args": split,
    }  # fmt: skip
    losses, made = learned(small_finetune(tmp_path / "split", **steps))
    expected, whole = learned(small_finetune(tmp_path / "copies", **steps | {"training_args": {}}))
    assert losses == pytest.approx(expected, rel=0.01)
    for name, weights in made.items():
        torch.testing.assert_close(weights, whole[name], rtol=0.05, atol=5e-3)


@pytest.mark.parametrize(
    ("changes", "kind", "why"),
    [
        (
            {"lora": {"target_modules": ("q_proj",)}},
            ConfigError,
            r"lora\.target_modules do not fit",
        ),
        ({"learning_rate": 1e38}, DivergedError, "a lower learning_rate"),
    ],
)
def test_an_error_that_would_come_again_comes_once_and_as_it_is(
    tmp_path: Path, changes: dict[str, Any], kind: type[Phi4rayError], why: str
) -> None:
    config = small_finetune(tmp_path, **changes)
    with pytest.raises(kind, match=why):
        finetune(config, RayHost(), Console(file=io.StringIO()))
