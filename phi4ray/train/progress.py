"""Showing how a fine-tune goes: one live line in a terminal, plain lines elsewhere."""

from collections import deque
from datetime import timedelta
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar
from rich.table import Column

from phi4ray.train.curve import Point

WINDOW_S = 60.0
"""Rates are means over so long."""

INTERVAL_S = 10.0
"""Between lines off a terminal."""


class Progress:
    """Shows points of the loss curve until the block ends."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._recent: deque[tuple[float, Point]] = deque()
        self._printed_at: float | None = None
        self._bar: Bar | None = None
        if console.is_terminal and not console.is_dumb_terminal:
            text = TextColumn("{task.description}", table_column=Column(overflow="fold"))
            self._bar = Bar(BarColumn(bar_width=20), text, console=console)

    def __enter__(self) -> "Progress":
        if self._bar is not None:
            self._bar.start()
            self._task = self._bar.add_task("starting", total=None)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, point: Point, now: float) -> None:
        """Take the newest point; shown at once in a terminal, else when its line is due.

        `now` is in seconds, on any clock that does not go back.
        """
        if self._recent and point.step < self._recent[-1][1].step:
            self._recent.clear()  # a lost worker was replaced, and began at its last checkpoint
        self._recent.append((now, point))
        while len(self._recent) > 2 and self._recent[1][0] < now - WINDOW_S:
            self._recent.popleft()
        line = line_of(point, *self._rates())
        if self._bar is not None:
            total, done = point.steps_total, point.step
            self._bar.update(self._task, description=line, total=total, completed=done)
            return
        last = point.step == point.steps_total
        if last or self._printed_at is None or now - self._printed_at >= INTERVAL_S:
            self._printed_at = now
            at = self._console.get_datetime()
            self._console.print(f"{at:%H:%M:%S} {line}", soft_wrap=True)

    def _rates(self) -> tuple[float, float]:
        """Steps and tokens a second."""
        (began, first), (now, last) = self._recent[0], self._recent[-1]
        seconds = now - began
        if seconds <= 0:
            return 0.0, 0.0
        return (last.step - first.step) / seconds, (last.tokens - first.tokens) / seconds


def line_of(point: Point, steps_a_second: float, tokens_a_second: float) -> str:
    """Say in one line how the training stands."""
    left = point.steps_total - point.step
    eta = str(timedelta(seconds=round(left / steps_a_second))) if steps_a_second else "?"
    return (
        f"step {point.step:,}/{point.steps_total:,} "
        f"({100 * point.step // point.steps_total}%) loss {point.loss:.4f} | lr "
        f"{point.learning_rate:.2e} grad {point.grad_norm:.2f} | {tokens_a_second:,.0f} tok/s "
        f"{steps_a_second:.2f} steps/s | ETA {eta}"
    )
