"""Servers of OpenAI's API, run as processes of their own for as long as a benchmark asks them."""

import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import httpx

START_S = 600
STOP_S = 120


@contextmanager
def answering(command: list[str], url: str, environment: dict[str, str]) -> Iterator[None]:
    """Have a server run; it answers at this address inside the block."""
    with tempfile.TemporaryFile() as log:
        # A group, to be killed as one, and no session: Linux's autogroups give each session as much
        # of a core, and beside a server whose engine spins while it waits its client would starve.
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log, process_group=0)
        try:
            deadline = time.monotonic() + START_S
            while True:
                with suppress(httpx.TransportError):
                    if httpx.get(f"{url}/v1/models").is_success:
                        break
                if server.poll() is not None or time.monotonic() > deadline:
                    log.seek(0)
                    said = log.read()[-3000:].decode()
                    raise SystemExit(f"{command[1]} did not start:\n{said}")
                time.sleep(0.5)
            yield
        finally:
            server.send_signal(signal.SIGINT)
            try:
                server.wait(STOP_S)
            except subprocess.TimeoutExpired:
                os.killpg(server.pid, signal.SIGKILL)
