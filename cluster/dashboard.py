"""The HTTP client of a cluster's dashboard, which may vanish without a word."""

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import requests
from ray.job_submission import JobSubmissionClient

TIMEOUT_S = (5.0, 30.0)
"""To connect, and from one byte of an answer to the next."""

CHANGE_TIMEOUT_S = (5.0, 120.0)
"""The same of what changes something there: a folder may be large."""

TRIES = 3
"""Of a question to a cluster that has answered before, and of following a log."""

RETRY_S = 2.0

HEARTBEAT_S = 20.0
"""A log's connection is asked so often whether it lives, and has half of that to answer."""


class Client(JobSubmissionClient):
    """Ray's, which would wait for ever."""

    tries = 1

    def _do_request(self, method: str, endpoint: str, **options: Any) -> Any:
        asks = method == "GET"
        options.setdefault("timeout", TIMEOUT_S if asks else CHANGE_TIMEOUT_S)
        for left in reversed(range(self.tries if asks else 1)):
            try:
                return super()._do_request(method, endpoint, **options)
            except (requests.ConnectionError, requests.Timeout):
                if not left:
                    raise
                time.sleep(RETRY_S)

    async def tail_job_logs(self, job_id: str) -> AsyncIterator[str]:
        """A job's log as it comes, to the job's end. A connection that is lost is made again.

        Raises:
            aiohttp.ClientError, OSError: it is lost `TRIES` times with nothing new between.
        """
        told = failures = 0
        while True:
            known = told  # each connection begins with the log
            try:
                async for text in self._tail(job_id):
                    new, known = text[known:], max(0, known - len(text))
                    if new:
                        told, failures = told + len(new), 0
                        yield new
                return
            except (OSError, aiohttp.ClientError):
                failures += 1
                if failures >= TRIES:
                    raise
                await asyncio.sleep(RETRY_S)

    async def _tail(self, job_id: str) -> AsyncIterator[str]:
        async with (
            aiohttp.ClientSession(
                cookies=self._cookies,
                headers=self._headers,
                timeout=aiohttp.ClientTimeout(total=sum(TIMEOUT_S)),
            ) as session,
            session.ws_connect(
                f"{self._address}/api/jobs/{job_id}/logs/tail",
                ssl=True if self._ssl_context is None else self._ssl_context,
                heartbeat=HEARTBEAT_S,
            ) as connection,
        ):
            async for message in connection:
                if message.type == aiohttp.WSMsgType.TEXT:
                    yield message.data
                elif message.type == aiohttp.WSMsgType.ERROR:
                    raise ConnectionResetError(str(message.data))
            if connection.close_code != aiohttp.WSCloseCode.OK:
                raise ConnectionResetError(f"it ended with code {connection.close_code}")
