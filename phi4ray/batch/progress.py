"""Showing how a run goes: one live line in a terminal, plain lines elsewhere."""

import re
from collections import deque
from dataclasses import dataclass
from datetime import timedelta

from rich.console import Console

from phi4ray.batch.tally import Snapshot
from phi4ray.live import LiveLine

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


class Progress(LiveLine):
    """Shows snapshots until the block ends, and keeps their time series for the report."""

    def __init__(self, console: Console, interval_s: float) -> None:
        super().__init__(console, interval_s)
        self.history: list[Sample] = []
        self._recent: deque[Snapshot] = deque()
        self._spacing_s = 0.5

    def update(self, snapshot: Snapshot) -> None:
        """Take the newest snapshot; shown at once in a terminal, else when its line is due."""
        if snapshot.starting:
            self._recent.clear()  # no speed is known before a replica is ready
        self._recent.append(snapshot)
        while len(self._recent) > 1 and self._recent[1].elapsed_s <= snapshot.elapsed_s - WINDOW_S:
            self._recent.popleft()
        self._sample(snapshot)
        done, total = snapshot.rows_done, snapshot.rows_total
        self.show(self.window.line(), done, total, snapshot.elapsed_s)

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
