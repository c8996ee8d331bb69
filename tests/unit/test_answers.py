"""Rows of several open shards, and what a shard that is given up leaves to the others."""

import asyncio
from pathlib import Path

import pytest

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
