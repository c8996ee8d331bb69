"""A service on a cluster of its own, as the tests of whole clusters start and ask it."""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import psutil
from ray.util import get_node_ip_address

from tests.processes import metrics_ports, replicas_below

ROOT = Path(__file__).parents[1]
PORT = 8189
# In a process of its own, because Ray Serve reads its environment when it is imported.
OPERATOR = """
import json, os, sys
from cluster.environment import SERVING
os.environ |= SERVING | {"RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "5"}
import ray
from cluster.deploying import deployed
from cluster.local import connected
from cluster.serve import application
from ray import serve
from phi4ray.serve.config import serve_config

with connected(num_cpus=4), deployed(serve_config(json.loads(sys.argv[2])), "127.0.0.1", int(sys.argv[1])):
    # In one piece and on a line of its own: workers' logs come here as well, whole or not.
    sys.stdout.write(f"\\naddress {ray.get_runtime_context().gcs_address}\\n")
    sys.stdout.flush()
    for line in sys.stdin:
        serve.run(application(serve_config(json.loads(line))), name="phi4", route_prefix="/")
        sys.stdout.write("\\nchanged\\n")
        sys.stdout.flush()
"""  # noqa: E501


class Service:
    """An application on a cluster of its own."""

    def __init__(self, config: dict[str, Any]) -> None:
        self._environment = {**os.environ, "RAY_AUTH_MODE": "disabled"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", OPERATOR, str(PORT), json.dumps(config)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=self._environment,
        )
        lines = (line for line in self.process.stdout or () if line.startswith("address "))
        self.address = next(lines, "").removeprefix("address ").strip()
        assert self.address, "the service did not start"
        self.url = f"http://127.0.0.1:{PORT}"

    def batch(self, *arguments: str) -> "subprocess.Popen[str]":
        command = [sys.executable, "jobs/batch_infer.py", "--serve", "phi4", *arguments]
        return subprocess.Popen(
            command,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**self._environment, "RAY_ADDRESS": self.address},
        )

    def change(self, config: dict[str, Any]) -> None:
        """Have it run with another configuration, and do not wait for that."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(config) + "\n")
        self.process.stdin.flush()

    def until_changed(self) -> None:
        """Wait until it runs so."""
        assert any(line == "changed\n" for line in self.process.stdout or ())

    def replicas(self) -> list[psutil.Process]:
        return replicas_below(psutil.Process(self.process.pid))

    def metric(self, name: str) -> float:
        text = httpx.get(f"{self.url}/metrics").text
        return next(float(line.split()[1]) for line in text.splitlines() if line.startswith(name))

    def stop(self) -> None:
        try:
            self.process.communicate(timeout=120)
        finally:
            self.process.kill()


def told(service: Service, name: str) -> dict[int, float]:
    """One of the replicas' own metrics, by the ports of their pages."""
    found = {}
    for port in [port for replica in service.replicas() for port in metrics_ports(replica)]:
        with contextlib.suppress(httpx.TransportError):
            page = httpx.get(f"http://{get_node_ip_address()}:{port}/metrics").text
            [line] = [line for line in page.splitlines() if line.startswith(f"{name} ")]
            found[port] = float(line.split()[1])
    return found
