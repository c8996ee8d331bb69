"""The board: which workers have an engine, who takes the shards of those without, and the end."""

import pytest

from cluster import board as board_module
from cluster.board import LOST_S, MAX_FRUITLESS, MAX_UNFINISHED, SETTLE_S, Board, Idle
from phi4ray.batch.answers import Done
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


def lives(board: Board, done: Done | None = None, most: int = 50) -> int:
    """How often a worker may start that is killed each time once its engine is up."""
    for count in range(most):
        if not board.starting("a", "node"):
            return count
        board.started("a")
        board.report("a", WorkerStats(open_shards={} if done is None else {0: done}))
    return most


def test_a_process_that_is_killed_at_its_first_rows_is_not_started_for_ever(clock: Clock) -> None:
    assert lives(new(clock)) == MAX_FRUITLESS
    # Rows that are errors before they reach the engine show nothing of it.
    assert lives(new(clock), Done(rows=2, errors={"invalid_json": 2})) == MAX_FRUITLESS


def test_a_life_that_answered_rows_counts_less_and_not_for_nothing(clock: Clock) -> None:
    assert MAX_FRUITLESS < MAX_UNFINISHED
    assert lives(new(clock), Done(rows=1)) == MAX_UNFINISHED


def test_a_finished_shard_makes_up_for_all_lives_before_it(clock: Clock) -> None:
    board = new(clock)
    for _ in range(50):
        assert board.starting("a")
        board.started("a")
        board.shard_finished("a")


def test_an_engine_that_dies_on_one_node_while_others_work_is_not_started_for_ever(
    clock: Clock,
) -> None:
    board = new(clock, expected=2)
    board.starting("b")
    board.started("b")
    for _ in range(MAX_FRUITLESS):
        assert board.starting("a")
        board.started("a")
        assert board.engine_died("a", "the engine died")
        board.shard_finished("b")
    assert not board.starting("a")
    board.idles("a", idle(4))  # and others have its shards
    assert board.shard_finished("b") == 4


def test_the_only_engine_dies_as_often_as_a_worker_may_live_and_says_itself_why(
    clock: Clock,
) -> None:
    board = new(clock)
    died = []
    for _ in range(MAX_FRUITLESS):
        assert board.starting("a")
        board.started("a")
        died.append(board.engine_died("a", "the engine died"))
    assert died == [True] * (MAX_FRUITLESS - 1) + [False]


def test_each_restart_is_told(clock: Clock) -> None:
    board = new(clock)
    board.starting("a", "one")
    assert board.news() == []
    board.starting("a", "one")
    (killed,) = board.news()
    assert "a worker's process on one ended" in killed
    assert "memory" in killed
    board.starting("a", "two")
    (moved,) = board.news()
    assert "its node is gone" in moved
    assert moved.endswith("on two")
    board.engine_died("a", "it died")
    board.starting("a", "two")
    assert board.news() == ["it died; Ray starts another"]
