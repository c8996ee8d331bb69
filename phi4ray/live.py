"""One line that says how something long goes: live in a terminal, else printed now and then."""

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column


class LiveLine:
    """Shows the newest line until the block ends, with a bar before it where there is a terminal.

    Elsewhere lines are printed with the time of day: the first at once, others `interval_s` after
    the one before, and the last.
    """

    def __init__(self, console: Console, interval_s: float) -> None:
        self._console = console
        self._interval_s = interval_s
        self._last = self._printed = ""
        self._printed_at: float | None = None
        self._bar: Progress | None = None
        if console.is_terminal and not console.is_dumb_terminal:
            # In a narrow terminal the text goes over two lines, and is not cut off.
            text = TextColumn("{task.description}", table_column=Column(overflow="fold"))
            self._bar = Progress(BarColumn(bar_width=20), text, console=console)

    def __enter__(self) -> Self:
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
        elif self._last != self._printed:
            self._print()

    def show(self, line: str, done: int, total: int, now: float) -> None:
        """Take the newest line; `now` is in seconds, on any clock that does not go back."""
        self._last = line
        if self._bar is not None:
            self._bar.update(self._task, description=line, total=total, completed=done)
        elif self._printed_at is None or now - self._printed_at >= self._interval_s:
            self._printed_at = now
            self._print()

    def _print(self) -> None:
        self._printed = self._last
        at = self._console.get_datetime()
        self._console.print(f"{at:%H:%M:%S} {self._last}", soft_wrap=True)
