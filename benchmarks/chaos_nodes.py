"""A Ray cluster of several nodes on one machine, whose processes are killed and come back.

Each node is a `ray start --block` of its own session, restarted when it ends, as Kubernetes
restarts a pod: nothing of a node outlives it.
"""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path

import psutil

NODE = "PHI4RAY_CHAOS_NODE"
"""Environment variable by which the processes of one life of a node are known."""

PORT = 6390
RESTART_S = 1.0
START_S = 120.0


class Node:
    """One node, kept running until it is closed."""

    def __init__(
        self, number: int, arguments: list[str], environment: Mapping[str, str], log: Path
    ) -> None:
        self.number, self.starts = number, 0
        self._arguments, self._environment, self._log = arguments, environment, log
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._keep_running, daemon=True)
        self._thread.start()

    def processes(self) -> list[psutil.Process]:
        """Everything that belongs to the node's present life."""
        mark, found = f"{self.number}.{self.starts}", []
        for process in psutil.process_iter():
            try:
                if process.environ().get(NODE) == mark:
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def kill(self, name: str) -> bool:
        """SIGKILL a process of the node by its name, or by a part of its command line."""
        for process in self.processes():
            try:
                if process.name() == name or name in " ".join(process.cmdline()[:1]):
                    process.kill()
                    return True
            except psutil.Error:
                continue
        return False

    def close(self) -> None:
        """End the node and all it started."""
        self._closed.set()
        self._kill_all()
        self._thread.join()

    def _kill_all(self) -> None:
        for process in self.processes():
            try:
                process.kill()
            except psutil.Error:
                continue

    def _keep_running(self) -> None:
        command = [str(Path(sys.executable).with_name("ray")), "start", "--block"]
        while not self._closed.is_set():
            self.starts += 1
            mark = {NODE: f"{self.number}.{self.starts}"}
            with self._log.open("ab") as log:
                process = subprocess.Popen(
                    [*command, *self._arguments],
                    env={**self._environment, **mark},
                    stdout=log,
                    stderr=log,
                    stdin=subprocess.DEVNULL,
                    start_new_session=True,
                )
                process.wait()
            self._kill_all()
            self._closed.wait(RESTART_S)


class Nodes:
    """The head, which runs no worker, and so many nodes of one CPU each."""

    def __init__(self, count: int, folder: Path, temporary: Path) -> None:
        self.address = f"127.0.0.1:{PORT}"
        environment = {
            **os.environ,
            # A GCS that is gone is noticed in seconds, not in a minute; one that is slow is not.
            "RAY_gcs_rpc_server_reconnect_timeout_s": "15",
            "RAY_USAGE_STATS_ENABLED": "0",
            # What else this machine does would starve engines while they start.
            "RAY_worker_niceness": "0",
        }
        # Where S3 is, workers are told by the job.
        for name in ("RAY_ADDRESS", "AWS_ENDPOINT_URL"):
            environment.pop(name, None)
        common = [
            f"--object-store-memory={100 << 20}",
            "--disable-usage-stats",
            # Another cluster of this machine may have the port that is Ray's default.
            "--dashboard-agent-listen-port=0",
        ]
        head = ["--head", f"--port={PORT}", f"--ray-client-server-port={PORT + 1}",
                "--num-cpus=0", "--node-ip-address=127.0.0.1",
                "--include-dashboard=false", f"--temp-dir={temporary}/0"]  # fmt: skip
        self.head = Node(0, [*head, *common], environment, folder / "node-0.log")
        wait_for(self.head)
        self.others = [
            Node(
                number,
                [
                    f"--address={self.address}",
                    "--num-cpus=1",
                    f"--node-ip-address=127.0.0.{number + 1}",
                    f"--temp-dir={temporary}/{number}",
                    *common,
                ],
                environment,
                folder / f"node-{number}.log",
            )
            for number in range(1, count + 1)
        ]

    @property
    def starts(self) -> int:
        """How often nodes were started."""
        return sum(node.starts for node in (self.head, *self.others))

    def close(self) -> None:
        """End all nodes."""
        for node in (*self.others, self.head):
            node.close()


def wait_for(head: Node) -> None:
    """Wait until a head node runs: others would lose a minute by asking too early."""
    deadline = time.monotonic() + START_S
    while not any(process.name() == "raylet" for process in head.processes()):
        if time.monotonic() > deadline:
            raise SystemExit("the head node did not start: --logs keeps what it said")
        time.sleep(0.5)
