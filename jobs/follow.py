"""Watching a submitted job: its log as it comes, and in a terminal its progress, live."""

import contextlib
import time
from collections.abc import Iterator

from rich.console import Console

from cluster.jobs import Jobs
from phi4ray.batch.progress import PROGRESS_LINE, Progress
from phi4ray.batch.progress_file import WRITE_S, RunProgress, read_progress
from phi4ray.batch.submission import Submission
from phi4ray.errors import Phi4rayError


class Watch:
    """Reads a job's progress from its output, now and then.

    Raises Phi4rayError at a look where this machine cannot read the output.
    """

    def __init__(self, job: Submission) -> None:
        self._output = job.output
        # What an earlier job left under the same output is not this one's.
        self._since = job.started_at or 0.0
        self._looked_at = 0.0

    def look(self) -> RunProgress | None:
        """What the job told last, if it has told anything new to ask for."""
        if self._output is None:
            return None
        found = read_progress(self._output)
        return found if found is not None and found.updated_at >= self._since else None

    def look_when_due(self) -> RunProgress | None:
        """As `look`, but None while the last look is not long ago."""
        now = time.monotonic()
        if now - self._looked_at < WRITE_S:
            return None
        self._looked_at = now
        return self.look()


def follow(jobs: Jobs, job: Submission, console: Console) -> Submission:
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
