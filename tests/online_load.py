"""Clients of a service that answers as the fake engine does, and what became of their requests."""

import asyncio
import json
from collections import Counter

import httpx

AT_ONCE = 64


async def load(url: str, outcomes: Counter[str], requests: int, streams: bool) -> None:
    """Chats, every second one streamed; counts `ok` and what else became of them."""
    places = asyncio.Semaphore(AT_ONCE)

    async with httpx.AsyncClient(
        base_url=url, timeout=60, limits=httpx.Limits(max_connections=AT_ONCE)
    ) as client:

        async def one(number: int) -> None:
            async with places:
                try:
                    outcomes[await ask(client, number, streams)] += 1
                except httpx.HTTPError as error:
                    outcomes[repr(error)] += 1

        await asyncio.gather(*(one(number) for number in range(requests)))


async def ask(client: httpx.AsyncClient, number: int, streams: bool) -> str:
    body = {"model": "m", "messages": [{"role": "user", "content": f"{number}"}]}
    if number % 2 or not streams:
        answer = await client.post("/v1/chat/completions", json=body)
        return "ok" if answer.is_success else f"{answer.status_code} {answer.text}"
    body["stream"] = True
    async with client.stream("POST", "/v1/chat/completions", json=body) as stream:
        if not stream.is_success:
            return f"{stream.status_code} {(await stream.aread()).decode()}"
        lines = [line async for line in stream.aiter_lines() if line]
    if lines[-1] != "data: [DONE]":
        return "a stream was cut off"
    choices = [json.loads(line.removeprefix("data: "))["choices"][0] for line in lines[:-1]]
    text = "".join(choice["delta"]["content"] for choice in choices)
    return "ok" if text.startswith("fake:") and len(text) == 21 else f"the answer {text!r}"
