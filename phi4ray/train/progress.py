"""Showing how a fine-tune goes: one live line in a terminal, plain lines elsewhere."""

from collections import deque
from datetime import timedelta

from rich.console import Console

from phi4ray.live import LiveLine
from phi4ray.train.curve import Point

WINDOW_S = 60.0
"""Rates are means over so long."""

INTERVAL_S = 10.0
"""Between lines off a terminal."""


class Progress(LiveLine):
    """Shows points of the loss curve until the block ends."""

    def __init__(self, console: Console) -> None:
        super().__init__(console, INTERVAL_S)
        self._recent: deque[tuple[float, Point]] = deque()

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
        self.show(line, point.step, point.steps_total, now)

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
