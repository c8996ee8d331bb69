"""The process that engines are forked from: it imports vLLM while its owner does.

vLLM starts its engine as a new Python process, which imports vLLM, torch and the rest once more
after its owner did (a third of a second start on an H200, benchmarks/RESULTS.md), because to fork
a process with threads, as a Ray worker is one, is not safe. Python's fork server is a process for
that: it has one thread and no device, imports, and is forked.

Not on CPUs, where vLLM has the engine's process load other allocators by LD_PRELOAD.
"""

import ctypes
import os
from collections.abc import Mapping
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext, ForkServerProcess

IMPORTS = (
    "vllm.v1.engine.core",
    "vllm.v1.worker.gpu_worker",
    "vllm.v1.attention.backends.flash_attn",
    "vllm.compilation.backends",
    "vllm.model_executor.models.phi3",
)
"""What the engine's process needs, with all that these import. One that a version of vLLM lacks is
imported when needed."""

NVIDIA = "libnvidia-ml.so.1"
"""The library by which vLLM, too, finds out that it is on NVIDIA's cards."""


def serves() -> bool:
    """Whether engines are forked on this machine: those on NVIDIA's cards are."""
    try:
        ctypes.CDLL(NVIDIA)
    except OSError:
        return False
    return True


class _Process(ForkServerProcess):
    """A fork with the environment that its owner has by then, as a new process would have.

    What was imported saw that of the server's start.
    """

    _environment: Mapping[str, str]

    def start(self) -> None:
        self._environment = dict(os.environ)
        super().start()

    def run(self) -> None:
        # Only what differs: a process's title is written where its first environment lies.
        for name in os.environ.keys() - self._environment.keys():
            del os.environ[name]
        os.environ.update(self._environment.items() - os.environ.items())
        super().run()


class Context(ForkServerContext):
    """What starts processes as forks of the server."""

    Process = _Process


def start() -> Context:
    """Start the server, unless it runs; gives what starts its forks."""
    context = Context()
    context.set_forkserver_preload(list(IMPORTS))
    forkserver.ensure_running()
    return context
