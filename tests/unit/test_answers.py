"""Rows of several open shards, and what a shard that is given up leaves to the others."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from phi4ray.batch import answers as answers_module
from phi4ray.batch.answers import Answers
from phi4ray.batch.parts import Result
from phi4ray.batch.rows import Request
from phi4ray.config import Endpoint
from phi4ray.errors import EngineDeadError
from phi4ray.fake import FakeReplica
from phi4ray.protocol import Answer, Json
from tests.small_jobs import job
from tests.waiting import settle

ROOM = 2
"""Rows that have room at once: the engine's one sequence, and one in its queue."""


class Held(FakeReplica):
    """Answers rows when it is told to; rows of the prompt "dies" end it."""

    def __init__(self, folder: Path) -> None:
        self.settings = job(folder, engine={"max_num_seqs": 1})
        super().__init__(self.settings.engine)
        self.asked: list[str] = []
        self.go = asyncio.Event()

    async def complete(self, endpoint: Endpoint, body: Json) -> Answer:
        self.asked.append(body["prompt"])
        await self.go.wait()
        if body["prompt"] == "dies":
            raise EngineDeadError("it died")
        return Answer(200, {"choices": [{"text": body["prompt"]}], "usage": {}})

    async def full(self) -> None:
        """Until it has all the rows that there is room for."""
        while len(self.asked) < ROOM:
            await asyncio.sleep(0)


def shard(*prompts: str) -> tuple[list[Result], list[Request | None]]:
    results = [Result(prompt, "file", at) for at, prompt in enumerate(prompts)]
    return results, [Request("/v1/completions", {"prompt": prompt}) for prompt in prompts]


@pytest.mark.parametrize("at", range(12))
def test_a_shard_that_is_cancelled_at_any_moment_takes_no_room_with_it(
    tmp_path: Path, at: int
) -> None:
    async def scenario() -> None:
        engine = Held(tmp_path)
        answers = Answers(engine.settings, engine)
        first, _ = kept = shard("a", "b")
        one = asyncio.create_task(answers.answer(0, *kept))
        other = asyncio.create_task(answers.answer(1, *shard("c", "d", "e")))
        await engine.full()
        engine.go.set()
        await settle(at)
        other.cancel()
        await asyncio.wait([one, other], timeout=5)
        await settle()
        assert [row.text for row in first] == ["a", "b"]
        assert (answers.pacer.rows, answers.pacer.tokens) == (0, 0)
        last, requests = shard("f", "g", "h")
        await asyncio.wait_for(answers.answer(2, last, requests), 5)
        assert [row.text for row in last] == ["f", "g", "h"]

    asyncio.run(scenario())


def test_rows_of_a_shard_that_failed_do_not_begin(tmp_path: Path) -> None:
    async def scenario() -> None:
        engine = Held(tmp_path)
        answers = Answers(engine.settings, engine)
        failing = asyncio.create_task(answers.answer(0, *shard("dies", "a", "b", "c")))
        await engine.full()
        engine.go.set()
        with pytest.raises(EngineDeadError):
            await failing
        await settle()
        assert engine.asked == ["dies", "a"]
        assert (answers.pacer.rows, answers.pacer.tokens) == (0, 0)

    asyncio.run(scenario())


def test_a_row_is_let_go_of_when_its_turn_comes(tmp_path: Path) -> None:
    """Of a shard in work, only what waits is held: the requests are the larger part of it."""

    async def scenario() -> None:
        engine = Held(tmp_path)
        answers = Answers(engine.settings, engine)
        results, requests = shard("a", "b", "c")
        task = asyncio.create_task(answers.answer(0, results, requests))
        await engine.full()
        assert [request is None for request in requests] == [True, True, False]
        engine.go.set()
        await task
        assert requests == [None] * 3

    asyncio.run(scenario())


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": list(range(1000, 9000))},
        {"prompt": "a", "tools": [{"type": "function", "description": "x" * 32_000}]},
        {"prompt": "a", "system": "x" * 32_000},
    ],
)
def test_all_that_a_row_gives_its_engine_counts_as_what_it_holds(
    tmp_path: Path, body: Json
) -> None:
    async def scenario() -> None:
        engine = Held(tmp_path)
        answers = Answers(engine.settings, engine)
        results, _ = shard("a")
        task = asyncio.create_task(
            answers.answer(0, results, [Request("/v1/completions", body | {"max_tokens": 1})])
        )
        while not engine.asked:
            await asyncio.sleep(0)
        assert answers.pacer.tokens == pytest.approx(8000, rel=0.1)
        engine.go.set()
        await task

    asyncio.run(scenario())


@pytest.mark.parametrize(("room", "at_first"), [(0, 1), (1 << 30, 3)])
def test_a_shard_waits_until_there_is_room_for_its_answers_and_one_always_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int, at_first: int
) -> None:
    async def scenario() -> None:
        engine = Held(tmp_path)
        answers = Answers(engine.settings, engine)
        written = asyncio.Event()

        async def work(index: int) -> None:
            with answers.closing(index):
                await answers.answer(index, *shard("a", "b"))
                await written.wait()

        tasks = [asyncio.create_task(work(index)) for index in range(3)]
        await engine.full()
        engine.go.set()
        await settle()
        assert list(answers.open) == list(range(at_first))  # answered, and held
        tasks[0].cancel()  # as good as written: it is held no longer
        await settle()
        assert list(answers.open) == [1, 2][: max(1, at_first - 1)]
        written.set()
        await asyncio.wait(tasks, timeout=5)
        assert all(task.done() for task in tasks)
        assert answers.open == {}

    monkeypatch.setattr(answers_module, "HELD_BYTES", room)
    asyncio.run(scenario())


def test_logprobs_are_expected_before_the_first_answer_and_then_what_was_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else all shards would be begun before anything is known."""

    async def scenario(**asked: Any) -> int:
        engine = Held(tmp_path)
        answers = Answers(engine.settings, engine)
        for index in range(4):
            results, requests = shard(*"abcdefgh")
            for request in requests:
                assert request is not None
                request.body.update(max_tokens=1000, **asked)
            tasks.append(asyncio.create_task(answers.answer(index, results, requests)))
        await settle()
        begun = len(answers.open)
        engine.go.set()  # and they are short
        await settle(2000)
        assert len(answers.open) > begun or begun == 4
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        return begun

    tasks: list[asyncio.Task[None]] = []
    monkeypatch.setattr(answers_module, "HELD_BYTES", 8 << 20)
    monkeypatch.setattr(answers_module, "GUESSES", 1)
    assert asyncio.run(scenario()) == 4
    tasks.clear()
    assert asyncio.run(scenario(logprobs=True, top_logprobs=20)) < 4
    tasks.clear()
    assert asyncio.run(scenario(logprobs="x", top_logprobs=None)) == 4  # the engine's to refuse
