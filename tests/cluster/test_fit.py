"""Jobs on a cluster whose cards are known: what cannot fit is refused before anything starts."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from cluster.gpus import cluster_gpus
from tests.small_jobs import write_lines

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A cluster of one node that says it has an L4."""
    context = ray.init(
        "local", num_cpus=2, num_gpus=1, resources={"accelerator_type:L4": 1},
        include_dashboard=False,
    )  # fmt: skip
    yield context.address_info["address"]
    ray.shutdown()


def run(address: str, *command: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "RAY_ADDRESS": address}
    return subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True
    )


def test_the_cards_of_a_cluster_are_those_of_its_nodes(address: str) -> None:
    assert cluster_gpus() == ("L4",)


def test_a_batch_job_that_cannot_fit_writes_nothing(address: str, tmp_path: Path) -> None:
    write_lines(tmp_path / "in.jsonl", [{"prompt": "hi"}])
    job = (
        "jobs/batch_infer.py", "--recipe", "phi4-bf16-h200",
        "--input", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "out"),
    )  # fmt: skip
    for flags in ((), ("--dry-run",)):
        refused = run(address, *job, *flags)
        assert refused.returncode == 2
        assert "cannot start on L4 24 GB: it does not fit" in refused.stderr
        assert "tensor_parallel_size=2" in refused.stderr
    planned = run(address, *job, "--dry-run", "--gpu", "h200", "--gpu-hour-price", "3")
    assert planned.returncode == 0, planned.stderr
    for told in ("memory of one GPU (h200)", "KV cache, tokens", "GPU hours", "cost"):
        assert told in planned.stdout
    assert not (tmp_path / "out").exists()


def test_a_service_that_cannot_fit_is_not_deployed(address: str) -> None:
    refused = run(address, "jobs/serve.py", "--recipe", "phi4-bf16-h200")
    assert refused.returncode == 2
    assert "cannot start on L4 24 GB: it does not fit" in refused.stderr
    assert "answers at" not in refused.stdout
