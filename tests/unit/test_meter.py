"""Tokens that the engine counted, brought to the request that they are of."""

import asyncio
import time

from phi4ray.serve.meter import Meter, Usage


async def answered(meter: Meter, request_id: str, *sequences: tuple[str, int, int]) -> Usage:
    """A request that has the engine answer these: their ids, prompt and completion tokens."""
    with meter.request(request_id) as usage:
        for engine_id, _, _ in sequences:
            meter.begun(engine_id)
        await asyncio.sleep(0)  # others have their turn
        for engine_id, prompt_tokens, completion_tokens in sequences:
            asyncio.get_running_loop().call_soon(
                meter.finished, engine_id, prompt_tokens, completion_tokens
            )
        assert await usage.settled()
    return usage


def test_choices_share_their_prompt() -> None:
    choices = [("chatcmpl-a", 100, tokens) for tokens in (1, 2, 3)]
    usage = asyncio.run(answered(Meter(), "a", *choices))
    assert (usage.prompt_tokens, usage.completion_tokens) == (100, 6)


def test_each_prompt_counts_whatever_the_engine_calls_it() -> None:
    for ids in (
        ("cmpl-a-0", "cmpl-a-1"),
        ("chatcmpl-a_0", "chatcmpl-a_1"),
        ("resp_1234_0", "resp_1234_1"),
    ):
        usage = asyncio.run(answered(Meter(), "a", *((one, 10, 5) for one in ids)))
        assert (usage.prompt_tokens, usage.completion_tokens) == (20, 10)


def test_requests_at_once_have_each_their_own() -> None:
    async def scenario() -> None:
        meter = Meter()
        both = await asyncio.gather(
            answered(meter, "a", ("cmpl-a-0", 10, 1)), answered(meter, "b", ("resp_0", 20, 2))
        )
        assert [usage.prompt_tokens for usage in both] == [10, 20]

    asyncio.run(scenario())


def test_all_sequences_are_waited_for_and_none_where_there_are_none() -> None:
    async def scenario() -> None:
        meter = Meter()
        with meter.request("a") as usage:
            began = time.perf_counter()
            assert not await usage.settled()
            assert time.perf_counter() - began < 0.1
            for _ in range(2):
                meter.begun("chatcmpl-a")
            meter.finished("chatcmpl-a", 5, 1)
            asyncio.get_running_loop().call_later(0.01, meter.finished, "chatcmpl-a", 5, 1)
            assert await usage.settled()
            assert usage.completion_tokens == 2

    asyncio.run(scenario())


def test_nothing_is_kept_of_a_request_that_was_hung_up() -> None:
    async def scenario() -> None:
        meter = Meter()
        later = asyncio.Event()

        async def background() -> None:
            await later.wait()
            meter.begun("resp_1")

        with meter.request("a"):
            meter.begun("resp_0")
            task = asyncio.create_task(background())
            await asyncio.sleep(0)
        later.set()
        await task
        meter.finished("resp_0", 5, 5)
        assert not meter._open

    asyncio.run(scenario())


def test_beams_are_not_counted_and_nobody_passes_for_one() -> None:
    async def scenario() -> None:
        meter = Meter()
        with meter.request("x-beam-1") as usage:
            meter.begun("chatcmpl-x-beam-1-0123-beam-0")
            assert not usage.running
            meter.begun("chatcmpl-x-beam-1")
            assert usage.running == 1

    asyncio.run(scenario())


def test_what_was_aborted_is_counted_and_marked() -> None:
    async def scenario() -> None:
        meter = Meter()
        with meter.request("a") as usage:
            for _ in range(2):
                meter.begun("chatcmpl-a")
            meter.finished("chatcmpl-a", 5, 3)
            assert not usage.aborted
            meter.aborted("chatcmpl-a", 5, 7)
            assert await usage.settled()
        assert (usage.prompt_tokens, usage.completion_tokens, usage.aborted) == (5, 10, True)
        meter.aborted("chatcmpl-a", 5, 7)
        assert usage.completion_tokens == 10

    asyncio.run(scenario())
