"""Ray's job API: batch jobs on a running cluster, from any machine that reaches its dashboard."""

import asyncio
import contextlib
import logging
import os
import queue
import time
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

import aiohttp
import requests
from ray.exceptions import AuthenticationError

from cluster.dashboard import TRIES, Client
from phi4ray.batch.executor import in_thread
from phi4ray.batch.submission import OUTPUT_KEY, Submission, entrypoint, is_ours, output_of
from phi4ray.errors import ClusterError, ConfigError

END_S = 60.0
"""A job that is stopped, or whose log has ended, is waited for so long."""


class Jobs:
    """The batch jobs of one cluster. Every method raises ClusterError when it does not answer."""

    def __init__(self, address: str | None = None) -> None:
        """Look the cluster up: at this address, or at Ray's variables', or on this machine.

        Raises:
            ClusterError: there is none.
        """
        self.address = address
        if address is not None:
            self.address = address if "://" in address else f"http://{address}"
            # Ray's client lets its variables win over an argument.
            os.environ["RAY_API_SERVER_ADDRESS"] = self.address
        for handler in logging.getLogger("ray").handlers:
            handler.setLevel(logging.WARNING)  # its modules tell of every upload and connection
        with self._translated():
            self._client = Client(self.address)
        self._client.tries = TRIES

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        place = f"at {self.address}" if self.address else "on this machine"
        try:
            yield
        except AuthenticationError as error:
            raise ClusterError(
                f"the cluster {place} asks for a token: set RAY_AUTH_MODE=token and "
                f"RAY_AUTH_TOKEN ({error})"
            ) from error
        except ConnectionError as error:
            raise ClusterError(
                f"no Ray cluster answers {place}: give its dashboard, --address http://HEAD:8265 "
                f"({error})"
            ) from error
        except (requests.ConnectionError, requests.Timeout) as error:
            raise ClusterError(
                f"the Ray cluster {place} does not answer ({error}). Its jobs may go on: look "
                "again with `phi4ray status`"
            ) from error
        except (OSError, RuntimeError, aiohttp.ClientError) as error:
            raise ClusterError(f"the Ray cluster {place} failed: {error}") from error

    def submit(
        self, submission_id: str, arguments: Sequence[str], output: str, working_dir: Path | None
    ) -> Submission:
        """Start a job; `working_dir`, if any, is uploaded and is where it runs.

        Raises:
            ClusterError: the cluster refuses it, as a name that is taken.
        """
        with self._translated():
            self._client.submit_job(
                entrypoint=entrypoint(arguments),
                submission_id=submission_id,
                runtime_env={} if working_dir is None else {"working_dir": str(working_dir)},
                metadata={OUTPUT_KEY: output},
            )
        return self.get(submission_id)

    def all(self) -> list[Submission]:
        """The batch jobs that the cluster knows of, the newest first."""
        with self._translated():
            details = self._client.list_jobs()
        found = (_submission(one) for one in details if one.submission_id is not None)
        ours = (job for job in found if job.output is not None or is_ours(job.entrypoint))
        return sorted(ours, key=lambda job: job.started_at or 0.0, reverse=True)

    def get(self, submission_id: str) -> Submission:
        """Look one job up.

        Raises:
            ConfigError: there is none of that name.
        """
        for job in self.all():
            if job.id == submission_id:
                return job
        raise ConfigError(
            f"the cluster has no batch job {submission_id!r}: `phi4ray status` lists those it has"
        )

    def stop(self, submission_id: str) -> Submission:
        """Stop a running job and wait for its end.

        Raises:
            ClusterError: it does not end.
        """
        with self._translated():
            self._client.stop_job(submission_id)
        return self._at_end(submission_id)

    def log(self, submission_id: str) -> str:
        """All that a job has printed."""
        with self._translated():
            text: str = self._client.get_job_logs(submission_id)
        return text

    def log_lines(self, submission_id: str) -> Generator[str | None]:
        """Follow a log from its start to the job's end: lines, and None at least each half second.

        Raises:
            ClusterError: the connection is lost; the job may well run on.
        """
        loop = asyncio.new_event_loop()
        lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        tail = loop.create_task(self._tail(submission_id, lines))

        def work() -> None:
            try:
                loop.run_until_complete(tail)
            finally:
                loop.close()

        def stop() -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: it has ended by itself
                loop.call_soon_threadsafe(tail.cancel)

        with self._translated():
            yield from in_thread(work, lines, stop)

    async def _tail(self, submission_id: str, lines: "queue.SimpleQueue[str]") -> None:
        rest = ""
        try:
            async for text in self._client.tail_job_logs(submission_id):
                *whole, rest = (rest + text).split("\n")
                for line in whole:
                    lines.put(line)
        except (OSError, aiohttp.ClientError) as error:
            raise ClusterError(
                f"the cluster does not answer any more ({error}). {submission_id} may go on: look "
                f"again with `phi4ray status {submission_id} --follow`"
            ) from error
        if rest:
            lines.put(rest)

    def ended(self, submission_id: str) -> Submission:
        """A job whose log has ended.

        Raises:
            ClusterError: the job has not: the connection was lost.
        """
        return self._at_end(submission_id)

    def _at_end(self, submission_id: str) -> Submission:
        until = time.monotonic() + END_S
        while not (job := self.get(submission_id)).ended:
            if time.monotonic() > until:
                raise ClusterError(
                    f"{submission_id} is still {job.status}: look again with `phi4ray status "
                    f"{submission_id}`"
                )
            time.sleep(0.5)
        return job


def _submission(details: Any) -> Submission:
    def seconds(milliseconds: int | None) -> float | None:
        return None if milliseconds is None else milliseconds / 1000

    return Submission(
        id=details.submission_id,
        status=details.status.value,
        entrypoint=details.entrypoint,
        output=(details.metadata or {}).get(OUTPUT_KEY) or output_of(details.entrypoint),
        started_at=seconds(details.start_time),
        ended_at=seconds(details.end_time),
        exit_code=details.driver_exit_code,
        message=details.message or "",
    )
