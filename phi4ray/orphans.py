"""Leave no engine behind: kill what a process started, even when that process is SIGKILLed.

vLLM's engine is a child process and does not notice that its parent was killed; it would keep
the GPU's memory, and the replacement actor could not start. Linux's PR_SET_PDEATHSIG fires when
the *thread* that started the child ends, so it does not fit either. A watcher does: a process of
its own session that waits for the end of a pipe and then kills every process that carries the
owner's mark in its environment. Children must be spawned to carry the mark, or forked by one that
was, and must not write their title over it, as vLLM's do by setproctitle unless SPT_NOENV is set.

The watcher itself is nobody's child: Ray kills the children of a worker that ends, and theirs are
left (`RAY_kill_child_processes_on_worker_exit`), an engine forked by Python's fork server among
them.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator

import psutil

MARK = "PHI4RAY_ORPHANS_OF"
LONGEST_EXIT_S = 60.0
"""A process with tens of GiB on a GPU takes seconds to exit; after a minute it hangs."""


@contextlib.contextmanager
def kill_orphans() -> Iterator[None]:
    """Kill every process started inside the block when it ends, however this process ends.

    Waits first until such processes of dead owners are gone, and their memory with them.
    """
    _await_watchers_of_the_dead()
    mark = uuid.uuid4().hex
    watcher = subprocess.Popen(
        [sys.executable, os.path.abspath(__file__), mark, str(os.getpid())],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    watcher.wait()  # until it is no child any more
    marks = {MARK: mark, "SPT_NOENV": "1"}
    before = {name: os.environ.get(name) for name in marks}
    os.environ.update(marks)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        assert watcher.stdin is not None
        assert watcher.stdout is not None
        watcher.stdin.close()
        watcher.stdout.read()  # until it ends
        watcher.stdout.close()


def _await_watchers_of_the_dead() -> None:
    deadline = time.monotonic() + LONGEST_EXIT_S
    while time.monotonic() < deadline and any(_watched_owners_that_died()):
        time.sleep(0.1)


def _watched_owners_that_died() -> Iterator[int]:
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, ValueError):
            command = process.cmdline()
            if os.path.abspath(__file__) in command and not psutil.pid_exists(int(command[-1])):
                yield int(command[-1])


def kill_marked(mark: str) -> None:
    """SIGKILL every process of this user that has the mark in its environment; wait for the end."""
    killed = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.pid != os.getpid() and process.environ().get(MARK) == mark:
                process.kill()
                killed.append(process)
    deadline = time.monotonic() + LONGEST_EXIT_S
    while time.monotonic() < deadline and any(_holds_memory(process) for process in killed):
        time.sleep(0.05)


def _holds_memory(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def main() -> None:
    """Wait until the owner closes our stdin, by intent or by dying; then kill what it left."""
    if os.fork():
        os._exit(0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.stdin.buffer.read()
    kill_marked(sys.argv[1])


if __name__ == "__main__":
    main()
