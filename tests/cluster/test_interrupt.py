"""`jobs/serve.py` is interrupted: what runs is finished, what others run on the cluster goes on."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest
import ray
from ray import serve

from tests.processes import kill_family, lives
from tests.waiting import free_port, until, until_ready

ROOT = Path(__file__).parents[2]
DONE, INTERRUPTED = 0, 130
AT_ONCE_S = 20.0
"""What ending a whole cluster takes on a busy machine, with nothing to wait for."""
pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]


class Service:
    """`jobs/serve.py` with fake replicas, as a shell runs it: the head of a group of processes."""

    def __init__(self, folder: Path, port: int, *engine: str, **environment: str) -> None:
        self.port = port
        self._log = folder / "log"
        command = [
            sys.executable, "jobs/serve.py", "--recipe", "fake", "--port", str(port),
            "--engine-arg", *engine,
        ]  # fmt: skip
        with self._log.open("wb") as log:
            self.process = psutil.Popen(
                command, cwd=ROOT, stdout=log, stderr=log, start_new_session=True,
                env={**os.environ, **environment},
            )  # fmt: skip

    def said(self) -> str:
        return self._log.read_text(errors="replace")

    def ready(self) -> None:
        until_ready(f"http://127.0.0.1:{self.port}", self.process, self._log, 120)
        until(lambda: "answers at http" in self.said(), 10, self.said)

    def interrupt(self, number: int = signal.SIGINT) -> None:
        """As a terminal does, whose Ctrl-C goes to the whole group; SIGTERM is sent to the one."""
        if number == signal.SIGINT:
            os.killpg(self.process.pid, number)
        else:
            self.process.send_signal(number)

    def ended(self, code: int, seconds: float) -> None:
        try:
            assert self.process.wait(seconds) == code, self.said()
        except psutil.TimeoutExpired:
            pytest.fail(f"it runs on: {self.said()}")
        # Its own lines: Ray's HAProxy manager may be told of a change while Serve ends it.
        own = [line for line in self.said().splitlines() if " pid=" not in line]
        assert not any("Traceback" in line for line in own), self.said()


class Stream:
    """A chat that is being streamed, in a thread."""

    def __init__(self, port: int) -> None:
        self._url = f"http://127.0.0.1:{port}/v1/chat/completions"
        self._begun = threading.Event()
        self.text = ""
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()
        assert self._begun.wait(30)

    def _read(self) -> None:
        body = {"model": "fake", "messages": [{"role": "user", "content": "hi"}], "stream": True}
        try:
            with httpx.stream("POST", self._url, json=body, timeout=60) as answer:
                for chunk in answer.iter_text():
                    self.text += chunk
                    self._begun.set()
        except httpx.TransportError as error:
            self.text += repr(error)

    def whole(self) -> bool:
        """Whether its end came; waits for that, or for it to be cut off."""
        self._thread.join(60)
        return self.text.rstrip().endswith("data: [DONE]")


@pytest.fixture
def started(tmp_path: Path) -> Iterator[list[Service]]:
    """Those that a test starts, none of which outlives it."""
    services: list[Service] = []
    yield services
    for service in services:
        kill_family(service.process)


def test_a_stream_that_is_running_is_received_whole(started: list[Service], tmp_path: Path) -> None:
    service = Service(tmp_path, free_port(), "chunk_s=0.5")
    started.append(service)
    service.ready()
    stream = Stream(service.port)
    service.interrupt()
    assert stream.whole(), stream.text
    service.ended(DONE, AT_ONCE_S)
    assert "running answers finish first" in service.said()


def test_a_second_interrupt_waits_for_nothing_and_leaves_nothing(
    started: list[Service], tmp_path: Path
) -> None:
    service = Service(tmp_path, free_port(), "chunk_s=5")
    started.append(service)
    service.ready()
    stream = Stream(service.port)
    below = service.process.children(recursive=True)
    service.interrupt()
    until(lambda: "running answers finish first" in service.said(), 5)
    service.interrupt(signal.SIGTERM)
    service.ended(INTERRUPTED, AT_ONCE_S)
    assert not stream.whole()
    until(lambda: not any(map(lives, below)), 10)


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A cluster that is others' too."""
    context = ray.init("local", num_cpus=4, include_dashboard=False)
    yield context.address_info["address"]
    ray.shutdown()


def test_of_a_cluster_without_serve_nothing_of_serve_is_left(
    started: list[Service], tmp_path: Path, address: str
) -> None:
    service = Service(tmp_path, free_port(), "chunk_s=0", RAY_ADDRESS=address)
    started.append(service)
    service.ready()
    service.interrupt()
    service.ended(DONE, 60)
    with pytest.raises(ValueError, match="SERVE_CONTROLLER"):
        ray.get_actor("SERVE_CONTROLLER_ACTOR", "serve")


@serve.deployment(ray_actor_options={"num_cpus": 0})
class Other:
    def __call__(self) -> str:
        return "still here"


@pytest.fixture(scope="module")
def others(address: str) -> Iterator[int]:
    """An application that others run on it; gives the port of Serve's."""
    port = free_port()
    serve.start(http_options={"port": port})
    serve.run(Other.bind(), name="other", route_prefix="/other")
    yield port
    serve.shutdown()


def test_others_applications_go_on(
    started: list[Service], tmp_path: Path, address: str, others: int
) -> None:
    # Once it may finish, once its replica is being started.
    service = Service(tmp_path, free_port(), "chunk_s=0.5", RAY_ADDRESS=address)
    started.append(service)
    service.port = others
    service.ready()
    assert f"answers at http://127.0.0.1:{others}/v1" in service.said()
    stream = Stream(others)
    service.interrupt(signal.SIGTERM)
    assert stream.whole(), stream.text
    service.ended(DONE, 60)
    assert set(serve.status().applications) == {"other"}

    service = Service(tmp_path, others, "start_s=200", RAY_ADDRESS=address)
    started.append(service)
    until(lambda: "phi4" in serve.status().applications, 60)
    time.sleep(1)
    service.interrupt()
    service.ended(INTERRUPTED, AT_ONCE_S)
    until(lambda: set(serve.status().applications) == {"other"}, 60)
    assert httpx.get(f"http://127.0.0.1:{others}/other").text == "still here"


@pytest.mark.usefixtures("others")
def test_an_application_of_the_same_name_is_not_ours(tmp_path: Path, address: str) -> None:
    (tmp_path / "serve.yaml").write_text("name: other")
    refused = subprocess.run(
        [
            sys.executable, "jobs/serve.py", "--recipe", "fake",
            "--config", str(tmp_path / "serve.yaml"),
        ],
        cwd=ROOT, env={**os.environ, "RAY_ADDRESS": address}, capture_output=True, text=True,
    )  # fmt: skip
    assert refused.returncode == 1
    assert "'other' runs on this cluster already" in refused.stderr
    assert set(serve.status().applications) == {"other"}
