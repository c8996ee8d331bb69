"""Showing how a run goes: one live line in a terminal, plain lines elsewhere."""

import re
from collections import deque
from dataclasses import dataclass
from datetime import timedelta
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar
from rich.table import Column

from phi4ray.batch.tally import Snapshot

WINDOW_S = 20.0
"""Rates are means over so long, or over the whole run while it is younger."""

MAX_SAMPLES = 1000

PROGRESS_LINE = re.compile(r"\d\d:\d\d:\d\d rows [\d,]+/[\d,]+ \(")
"""How the lines begin that `Progress` prints off a terminal."""


@dataclass(frozen=True, slots=True)
class Sample:
    """A point of a run's time series; rates are tokens a second."""

    elapsed_s: float
    prompt_rate: float
    completion_rate: float
    kv_used_fraction: float
    running: int
    waiting: int
    replicas: int


@dataclass(frozen=True, slots=True)
class Window:
    """A run's newest snapshot, and the oldest one that its rates are taken from."""

    first: Snapshot
    last: Snapshot

    def rates(self) -> tuple[float, float, float]:
        """Prompt tokens, completion tokens and rows a second."""
        first, last = self.first, self.last
        seconds = last.elapsed_s - first.elapsed_s
        if seconds <= 0:
            return 0.0, 0.0, 0.0
        # A killed worker's unfinished shards are counted again: that is no negative speed.
        return (
            max(0.0, (last.prompt_tokens - first.prompt_tokens) / seconds),
            max(0.0, (last.completion_tokens - first.completion_tokens) / seconds),
            max(0.0, (last.rows_done - first.rows_done) / seconds),
        )

    def eta(self) -> timedelta | None:
        """How long the rest will take at this speed; None where there is none."""
        row_rate = self.rates()[2]
        left = self.last.rows_total - self.last.rows_done
        if not row_rate or left / row_rate > timedelta.max.total_seconds():
            return None
        return timedelta(seconds=round(left / row_rate))

    def line(self) -> str:
        """Say in one line how the run stands."""
        last = self.last
        percent = 100 * last.rows_done // max(1, last.rows_total)  # 100 only when all are
        rows = f"rows {last.rows_done:,}/{last.rows_total:,} ({percent}%)"
        if last.starting:
            return f"{rows} starting replicas… {last.elapsed_s:.0f} s"
        prompt_rate, completion_rate, _ = self.rates()
        return (
            f"{rows} errors {last.error_rows:,} | prompt {prompt_rate:,.0f} tok/s output "
            f"{completion_rate:,.0f} tok/s | in flight {last.rows_in_flight:,} KV "
            f"{last.kv_used_fraction:.0%} replicas {last.replicas} | ETA {self.eta() or '?'}"
        )


class Progress:
    """Shows snapshots until the block ends, and keeps their time series for the report."""

    def __init__(self, console: Console, interval_s: float) -> None:
        self.history: list[Sample] = []
        self._console = console
        self._interval_s = interval_s
        self._recent: deque[Snapshot] = deque()
        self._last: Snapshot | None = None
        self._printed: Snapshot | None = None
        self._spacing_s = 0.5
        self._bar: Bar | None = None
        if console.is_terminal and not console.is_dumb_terminal:
            # In a narrow terminal the text goes over two lines, and is not cut off.
            text = TextColumn("{task.description}", table_column=Column(overflow="fold"))
            self._bar = Bar(BarColumn(bar_width=20), text, console=console)

    def __enter__(self) -> "Progress":
        if self._bar is not None:
            self._bar.start()
            self._task = self._bar.add_task("starting")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif self._last is not None and self._last != self._printed:
            self._print(self._last)

    def update(self, snapshot: Snapshot) -> None:
        """Take the newest snapshot; shown at once in a terminal, else when its line is due."""
        self._last = snapshot
        if snapshot.starting:
            self._recent.clear()  # no speed is known before a replica is ready
        self._recent.append(snapshot)
        while len(self._recent) > 1 and self._recent[1].elapsed_s <= snapshot.elapsed_s - WINDOW_S:
            self._recent.popleft()
        self._sample(snapshot)
        if self._bar is not None:
            line, total, done = self.window.line(), snapshot.rows_total, snapshot.rows_done
            self._bar.update(self._task, description=line, total=total, completed=done)
        elif (
            self._printed is None
            or snapshot.elapsed_s - self._printed.elapsed_s >= self._interval_s
        ):
            self._print(snapshot)

    def _print(self, snapshot: Snapshot) -> None:
        self._printed = snapshot
        line = f"{self._console.get_datetime():%H:%M:%S} {self.window.line()}"
        self._console.print(line, soft_wrap=True)

    def _sample(self, snapshot: Snapshot) -> None:
        if self.history and snapshot.elapsed_s - self.history[-1].elapsed_s < self._spacing_s:
            return
        prompt_rate, completion_rate, _ = self.window.rates()
        self.history.append(
            Sample(
                snapshot.elapsed_s,
                prompt_rate,
                completion_rate,
                snapshot.kv_used_fraction,
                snapshot.running,
                snapshot.waiting,
                snapshot.replicas,
            )
        )
        if len(self.history) > MAX_SAMPLES:
            self.history = self.history[::2]
            first, last = self.history[0].elapsed_s, self.history[-1].elapsed_s
            self._spacing_s = (last - first) / (len(self.history) - 1)

    @property
    def window(self) -> Window:
        """The newest snapshot, and the one that rates are counted from."""
        return Window(self._recent[0], self._recent[-1])


def last_progress_line(log: str) -> str | None:
    """The newest line of a run's progress in its log."""
    return next((line for line in reversed(log.splitlines()) if PROGRESS_LINE.match(line)), None)
