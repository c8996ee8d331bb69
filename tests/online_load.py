"""Clients of a service that answers as the fake engine does, and what became of their requests.

aiohttp's, because ten thousand requests of httpx take more of two cores than the service does.
"""

import asyncio
import itertools
import json
from collections import Counter
from collections.abc import Callable

import aiohttp

AT_ONCE = 64


async def load(
    url: str,
    outcomes: Counter[str],
    requests: int,
    streams: bool,
    more: Callable[[], bool] = lambda: False,
) -> None:
    """Chats, every second one streamed; counts `ok` and what else became of them.

    At least so many, and as long as `more` says so.
    """
    numbers = itertools.count()

    async def one_after_the_other(session: aiohttp.ClientSession) -> None:
        while (number := next(numbers)) < requests or more():
            try:
                outcomes[await ask(session, number, streams)] += 1
            except (aiohttp.ClientError, TimeoutError) as error:
                outcomes[repr(error)] += 1

    connector = aiohttp.TCPConnector(limit=AT_ONCE)
    timeout = aiohttp.ClientTimeout(total=60)
    async with aiohttp.ClientSession(url, connector=connector, timeout=timeout) as session:
        await asyncio.gather(*(one_after_the_other(session) for _ in range(AT_ONCE)))


async def ask(session: aiohttp.ClientSession, number: int, streams: bool) -> str:
    streamed = streams and number % 2 == 0
    messages = [{"role": "user", "content": f"{number}"}]
    body = {"model": "m", "messages": messages, "stream": streamed}
    async with session.post("/v1/chat/completions", json=body) as answer:
        text = await answer.text()
        if not answer.ok:
            return f"{answer.status} {text}"
    if not streamed:
        return "ok"
    lines = [line for line in text.splitlines() if line]
    if lines[-1] != "data: [DONE]":
        return "a stream was cut off"
    choices = [json.loads(line.removeprefix("data: "))["choices"][0] for line in lines[:-1]]
    text = "".join(choice["delta"]["content"] for choice in choices)
    return "ok" if text.startswith("fake:") and len(text) == 21 else f"the answer {text!r}"
