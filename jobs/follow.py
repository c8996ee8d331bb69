"""Watching a submitted job: its log as it comes, and in a terminal its progress, live."""

import contextlib
import math
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from rich.console import Console

from phi4ray.batch.plan import PLAN_NAME
from phi4ray.batch.progress import PROGRESS_LINE, Progress
from phi4ray.batch.progress_file import WRITE_S, RunProgress, read_progress
from phi4ray.batch.submission import Submission
from phi4ray.errors import ObjectNotFoundError, Phi4rayError, TransientStorageError
from phi4ray.storage import join, storage_for

if TYPE_CHECKING:  # Ray takes seconds to import, and an output is read without it
    from cluster.jobs import Jobs

PATIENCE_S = 5.0
"""An object store that takes longer, as one that cannot be reached does, is not waited for."""

WAIT_S = 0.25
"""Of it, what a display waits at a time."""

T = TypeVar("T")


class Watch:
    """Reads a job's progress from its output, now and then.

    Raises Phi4rayError at a look where this machine cannot read the output.
    """

    def __init__(self, job: Submission) -> None:
        self._output = job.output
        # What an earlier job left under the same output is not this one's.
        self._since = job.started_at or 0.0
        self._looked_at = -math.inf
        self._reading: Future[RunProgress | None] | None = None

    def look(self) -> RunProgress | None:
        """What the job told last, if it has told anything new to ask for."""
        self._reading = None  # what began before may know less
        self._begin()
        return self._taken(PATIENCE_S)

    def look_when_due(self) -> RunProgress | None:
        """As `look`, but None while the last look is not long ago, or the store takes its time."""
        if self._reading is None and time.monotonic() - self._looked_at < WRITE_S:
            return None
        self._begin()
        return self._taken(WAIT_S)

    def _begin(self) -> None:
        if self._reading is None and self._output is not None:
            self._looked_at = time.monotonic()
            self._reading = _in_background(partial(read_progress, self._output))

    def _taken(self, wait_s: float) -> RunProgress | None:
        if self._reading is None:
            return None
        try:
            found = self._reading.result(wait_s)
        except TimeoutError:
            if time.monotonic() - self._looked_at < PATIENCE_S:
                return None
            raise _silent(self._output) from None
        self._reading = None
        return found if found is not None and found.updated_at >= self._since else None


def check_answers(output: str) -> None:
    """Look whether a job's output can be read: what there is to read may take longer than that.

    Raises:
        TransientStorageError: the store is silent.
        StorageError: it refuses.
    """
    uri = join(output, PLAN_NAME)
    try:
        _in_background(lambda: storage_for(uri).head(uri)).result(PATIENCE_S)
    except TimeoutError:
        raise _silent(output) from None
    except ObjectNotFoundError:
        pass  # it answers


def _silent(output: str | None) -> TransientStorageError:
    return TransientStorageError(f"{output} does not answer within {PATIENCE_S:.0f} s")


def _in_background(work: Callable[[], T]) -> Future[T]:
    """Have work done in a thread that nobody need wait for, not even at the process's end."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except Exception as error:
            future.set_exception(error)

    threading.Thread(target=run, name="phi4ray-look", daemon=True).start()
    return future


def follow(jobs: "Jobs", job: Submission, console: Console) -> Submission:
    """Show a job until it ends; returns how it ended.

    Off a terminal that is its log. In a terminal its progress lines become one live line; where
    this machine cannot read the job's output, they stay lines.

    Raises:
        ClusterError: the connection is lost; the job may well run on.
    """
    with contextlib.closing(jobs.log_lines(job.id)) as lines:
        if console.is_terminal and not console.is_dumb_terminal:
            show_live(lines, Watch(job), console)
        else:
            for line in lines:
                if line is not None:
                    console.print(line, soft_wrap=True)
    return jobs.ended(job.id)


def show_live(lines: Iterator[str | None], watch: Watch, console: Console) -> None:
    """Show log lines, and progress as one live line, until the lines end."""
    readable, shown = True, False
    with Progress(console, interval_s=WRITE_S) as progress:

        def look(*, last: bool = False) -> None:
            nonlocal readable, shown
            try:
                found = watch.look() if last else watch.look_when_due()
            except Phi4rayError as error:
                readable = shown = False
                console.print(f"progress comes from the log: {error}", style="yellow")
                return
            if found is not None:
                if not shown:
                    progress.update(found.window.first)  # or no speed would be known at first
                progress.update(found.window.last)
                shown = True

        for line in lines:
            if line is not None and not (shown and PROGRESS_LINE.match(line)):
                console.print(line, soft_wrap=True)
            if readable:
                look()
        if readable:
            look(last=True)
