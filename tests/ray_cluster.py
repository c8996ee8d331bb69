"""A Ray cluster of one node, which others on this machine do not meet."""

import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.processes import kill_family
from tests.waiting import free_port, until

START_S = 120.0


@dataclass(frozen=True)
class RayCluster:
    """A running cluster: what RAY_ADDRESS is for it, and the process that all others are below."""

    address: str
    process: psutil.Popen


@contextmanager
def ray_cluster(*options: str, environment: Mapping[str, str]) -> Iterator[RayCluster]:
    """Have a cluster inside the block, started by `ray start --head` with further options.

    What would be the same for two clusters, folder and ports, it has of its own.
    When the block ends all of it is killed: `ray stop` would stop others' too.
    """
    # Ray adds up to 70 characters for its sockets, whose paths may have 107.
    with tempfile.TemporaryDirectory(prefix="ray-") as folder:
        command = [
            str(Path(sys.executable).with_name("ray")), "start", "--head", "--block",
            f"--temp-dir={folder}", "--port=0", "--dashboard-agent-listen-port=0",
            f"--ray-client-server-port={free_port()}", "--disable-usage-stats", *options,
        ]  # fmt: skip
        log, address = Path(folder, "log"), Path(folder, "ray_current_cluster")
        with log.open("wb") as stream:
            process = psutil.Popen(command, env=dict(environment), stdout=stream, stderr=stream)
        try:
            # Ray leaves its address there when everything has started.
            until(lambda: process.poll() is not None or os.path.exists(address), START_S)
            assert process.poll() is None, log.read_text(errors="replace")
            yield RayCluster(until(address.read_text, 5), process)
        finally:
            kill_family(process)
