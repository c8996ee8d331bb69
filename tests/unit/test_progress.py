"""What a run shows while it goes on, in a terminal and in a log."""

import io
import itertools
from datetime import datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from phi4ray.batch.progress import MAX_SAMPLES, WINDOW_S, Progress
from phi4ray.batch.tally import Snapshot


def at(
    elapsed_s: float,
    rows_done: int = 0,
    prompt_tokens: int = 0,
    completion_tokens: int = 0,
    rows_total: int = 10_000,
    replicas: int = 1,
    errors: int = 0,
) -> Snapshot:
    return Snapshot(
        rows_total=rows_total,
        rows_resumed=0,
        rows_done=rows_done,
        errors={"invalid_json": errors} if errors else {},
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        rows_in_flight=256 * replicas,
        kv_used_fraction=0.43 * replicas,
        running=200 * replicas,
        waiting=56 * replicas,
        replicas=replicas,
        elapsed_s=elapsed_s,
    )


class Log:
    """A console that is no terminal, 80 columns wide, at one moment of the day."""

    def __init__(self) -> None:
        self.file = io.StringIO()
        noon = datetime(2026, 1, 31, 12, 0, 10)
        self.console = Console(file=self.file, width=80, get_datetime=lambda: noon)

    @property
    def lines(self) -> list[str]:
        return self.file.getvalue().splitlines()


def fail(console: Console, error: type[BaseException]) -> None:
    with Progress(console, interval_s=10) as progress:
        progress.update(at(0.0, 0))
        progress.update(at(1.0, 40))
        raise error


def test_a_line_tells_all_there_is_to_know_and_is_not_broken() -> None:
    log = Log()
    with Progress(log.console, interval_s=10) as progress:
        progress.update(at(0.0))
        progress.update(at(10.0, 1_200, 12_340, 5_670, errors=3))
    assert log.lines[-1] == (
        "12:00:10 rows 1,200/10,000 (12%) errors 3 | prompt 1,234 tok/s output 567 tok/s | "
        "in flight 256 KV 43% replicas 1 | ETA 0:01:13"
    )


def test_until_a_replica_is_ready_the_line_says_how_long_that_takes() -> None:
    log = Log()
    with Progress(log.console, interval_s=10) as progress:
        progress.update(at(23.4, replicas=0))
    assert log.lines == ["12:00:10 rows 0/10,000 (0%) starting replicas… 23 s"]


def test_the_first_line_comes_at_once_and_others_when_due() -> None:
    log = Log()
    counts = []
    with Progress(log.console, interval_s=10) as progress:
        for second in (0, 5, 9, 10, 15, 19, 20, 45):
            progress.update(at(second, second))
            counts.append(len(log.lines))
    assert counts == [1, 1, 1, 2, 2, 2, 3, 4]


def test_a_line_reaches_the_log_when_it_is_printed() -> None:
    class Unflushed(io.StringIO):
        def flush(self) -> None:
            self.flushed = self.getvalue()

    file = Unflushed()
    with Progress(Console(file=file), interval_s=10) as progress:
        progress.update(at(0.0, 17))
        assert "rows 17/10,000" in file.flushed


def test_the_last_line_tells_how_it_ended() -> None:
    log = Log()
    with Progress(log.console, interval_s=10) as progress:
        progress.update(at(0.0, 0))
        progress.update(at(1.0, 10_000))
    assert len(log.lines) == 2
    assert "rows 10,000/10,000 (100%)" in log.lines[1]


def test_a_last_line_that_was_printed_is_not_printed_again() -> None:
    log = Log()
    with Progress(log.console, interval_s=10) as progress:
        progress.update(at(0.0, 10_000))
    assert len(log.lines) == 1


def test_a_failed_run_shows_how_far_it_came() -> None:
    log = Log()
    with pytest.raises(RuntimeError):
        fail(log.console, RuntimeError)
    assert "rows 40/10,000" in log.lines[-1]


def test_nothing_is_printed_of_a_run_that_did_not_begin() -> None:
    log = Log()
    with Progress(log.console, interval_s=10):
        pass
    assert log.lines == []


def test_a_hundred_percent_are_all_rows() -> None:
    progress = Progress(Log().console, interval_s=10)
    progress.update(at(0.0, 9_999))
    assert "(99%)" in progress.window.line()
    progress.update(at(1.0, 10_000))
    assert "(100%)" in progress.window.line()


def test_rates_are_means_over_the_last_seconds_and_not_over_the_run() -> None:
    progress = Progress(Log().console, interval_s=10)
    for second in range(100):
        progress.update(at(second, 100 * second, 1_000 * second, 10 * second))
    for second in range(100, 100 + int(WINDOW_S) + 1):
        progress.update(at(second, 10_000, 100_000, 1_000 + 50 * (second - 100)))
    assert progress.window.rates() == (0.0, 50.0, 0.0)


def test_the_time_that_replicas_take_to_start_is_not_in_the_rates() -> None:
    progress = Progress(Log().console, interval_s=10)
    progress.update(at(0.0, replicas=0))
    progress.update(at(8.0, replicas=0))
    progress.update(at(10.0, 10, 200, 20))
    assert progress.window.rates() == (100.0, 10.0, 5.0)


def test_rates_after_a_pause_are_means_over_the_pause() -> None:
    progress = Progress(Log().console, interval_s=10)
    progress.update(at(0.0))
    progress.update(at(2 * WINDOW_S, 80, 4_000, 400))
    assert progress.window.rates() == (100.0, 10.0, 2.0)


def test_work_that_is_lost_is_no_negative_speed() -> None:
    progress = Progress(Log().console, interval_s=10)
    progress.update(at(0.0, 500, 5_000, 500))
    progress.update(at(5.0, 400, 4_000, 400))
    assert progress.window.rates() == (0.0, 0.0, 0.0)
    assert progress.window.line().endswith("ETA ?")


def test_the_history_holds_what_the_report_draws() -> None:
    progress = Progress(Log().console, interval_s=10)
    progress.update(at(0.0, replicas=0))
    progress.update(at(10.0, 100, 1_000, 500, replicas=2))
    first, second = progress.history
    assert (first.elapsed_s, first.replicas, first.prompt_rate) == (0.0, 0, 0.0)
    assert (second.elapsed_s, second.prompt_rate, second.completion_rate) == (10.0, 100.0, 50.0)
    assert (second.running, second.waiting, second.replicas) == (400, 112, 2)
    assert second.kv_used_fraction == 0.86


@pytest.mark.slow
@given(st.integers(1, 5 * MAX_SAMPLES), st.sampled_from([0.1, 0.5, 3.0]))
def test_the_history_stays_small_and_spans_the_run(updates: int, step_s: float) -> None:
    progress = Progress(Console(file=io.StringIO(), quiet=True), interval_s=1e9)
    for number in range(updates):
        progress.update(at(number * step_s, replicas=0))
    times = [sample.elapsed_s for sample in progress.history]
    assert len(times) <= MAX_SAMPLES
    assert times[0] == 0.0
    gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert max(gaps, default=0.0) < 2 * min(gaps, default=0.0) + step_s
    assert (updates - 1) * step_s - times[-1] <= max(gaps, default=0.5) + step_s
    taken_before_thinning = updates * min(1.0, step_s / 0.5)
    assert len(times) >= min(taken_before_thinning, MAX_SAMPLES) // 2


class Terminal:
    """A console that is a terminal."""

    def __init__(self, width: int = 200, kind: str = "xterm") -> None:
        self.file = io.StringIO()
        self.console = Console(
            file=self.file, force_terminal=True, width=width, _environ={"TERM": kind}
        )

    @property
    def text(self) -> str:
        return self.file.getvalue()


def test_a_terminal_shows_one_live_bar() -> None:
    terminal = Terminal()
    with Progress(terminal.console, interval_s=10) as progress:
        progress.update(at(0.0, replicas=0))
        progress.update(at(1.0, 5_000))
    assert "━" in terminal.text
    assert "rows 5,000/10,000 (50%)" in terminal.text
    assert terminal.text.count("\n") == 1


def test_a_narrow_terminal_shows_the_end_of_the_line_too() -> None:
    terminal = Terminal(width=80)
    with Progress(terminal.console, interval_s=10) as progress:
        progress.update(at(0.0))
        progress.update(at(10.0, 1_000))
    assert "0:01:30" in terminal.text


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_terminal_is_left_as_it_was_when_the_run_fails(error: type[BaseException]) -> None:
    terminal = Terminal()
    with pytest.raises(error):
        fail(terminal.console, error)
    hidden, shown = "\x1b[?25l", "\x1b[?25h"
    assert terminal.text.count(hidden) == terminal.text.count(shown) == 1
    assert terminal.text.rindex(shown) > terminal.text.rindex("rows 40/10,000")


def test_a_dumb_terminal_gets_plain_lines() -> None:
    terminal = Terminal(kind="dumb")
    with Progress(terminal.console, interval_s=10) as progress:
        progress.update(at(0.0, 40))
    assert "\x1b[?25" not in terminal.text
    assert "rows 40/10,000" in terminal.text
