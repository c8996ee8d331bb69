"""The board: which workers have an engine, who takes the shards of those without, and the end."""

import pytest

from cluster import board as board_module
from cluster.board import LOST_S, MAX_FRUITLESS, SETTLE_S, Board, Idle
from phi4ray.batch.worker import WorkerStats
from phi4ray.errors import EngineStartError


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(board_module, "time", clock)
    return clock


def new(clock: Clock, expected: int = 1) -> Board:
    board = Board(expected)
    clock.now += SETTLE_S + 1
    return board


NO_DEVICE = EngineStartError("no device")


def idle(*shards: int) -> Idle:
    return Idle("node", "id", NO_DEVICE, frozenset(shards))


def test_a_worker_without_an_engine_waits_while_another_has_one(clock: Clock) -> None:
    board = new(clock)
    for worker in ("a", "b"):
        assert board.starting(worker)
    board.idles("a", idle())
    assert not board.hopeless()  # b may come up
    board.started("b")
    assert not board.hopeless()
    clock.now += LOST_S - 1
    board.report("b", WorkerStats())
    clock.now += LOST_S - 1
    assert not board.hopeless()
    assert board.idle() == {"a": idle()}
    clock.now += 2  # b was not heard of for so long
    assert board.hopeless()
    assert board.idle() == {}


def test_where_the_only_engine_cannot_start_there_is_no_hope_at_once(clock: Clock) -> None:
    board = new(clock)
    board.starting("a")
    board.idles("a", idle())
    assert board.hopeless()


def test_workers_that_are_about_to_come_are_waited_for_but_not_for_ever(clock: Clock) -> None:
    board = new(clock, expected=2)
    board.starting("a")
    board.idles("a", idle())
    assert not board.hopeless()
    assert board.idle() == {}  # nor is it told that the job goes on
    board.starting("b")
    assert board.idle() == {"a": idle()}
    board.idles("b", idle())
    assert board.hopeless()
    board = new(clock, expected=2)
    board.idles("a", idle())
    clock.now += LOST_S
    assert board.hopeless()


def test_an_engine_that_died_is_about_to_come_back(clock: Clock) -> None:
    board = new(clock)
    board.starting("a")
    board.idles("a", idle())
    board.started("b")
    assert board.engine_died("b", "the engine died")
    assert [board.news(), board.news()] == [["the engine died; Ray starts another"], []]
    clock.now += 2 * LOST_S
    assert not board.hopeless()
    board.starting("b")
    board.idles("b", idle())
    assert board.hopeless()


def test_a_board_that_was_restarted_hears_of_all_before_it_judges(clock: Clock) -> None:
    board = Board(1)
    board.idles("a", idle())
    assert not board.hopeless()


def test_a_shard_of_a_worker_without_an_engine_is_taken_once(clock: Clock) -> None:
    board = new(clock)
    assert board.shard_finished("b") is None
    board.idles("a", idle(4, 7))
    assert [board.shard_finished(by) for by in ("b", "c", "b")] == [4, 7, None]


def test_what_a_worker_had_taken_is_taken_by_another_when_it_died(clock: Clock) -> None:
    board = new(clock)
    board.idles("a", idle(4))
    assert board.shard_finished("b") == 4
    board.starting("b")
    assert board.shard_finished("c") == 4


def test_a_worker_that_was_restarted_elsewhere_answers_its_shards_itself(clock: Clock) -> None:
    board = new(clock)
    board.idles("a", idle(4))
    board.starting("a")
    board.started("a")
    assert board.shard_finished("b") is None


def test_a_process_that_dies_at_every_start_is_not_started_for_ever(clock: Clock) -> None:
    board = new(clock)
    assert [board.starting("a") for _ in range(MAX_FRUITLESS + 1)] == [True] * MAX_FRUITLESS + [
        False
    ]
