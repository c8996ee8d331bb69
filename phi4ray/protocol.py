"""What a replica is, whoever runs it: the shapes that batch, serving and engines share."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from phi4ray.config import Endpoint

Json = dict[str, Any]
"""A JSON object, decoded."""


def has_more_values(text: bytes, most: int) -> bool:
    """Whether JSON text may decode to more values than that: by its commas and brackets.

    A list that costs two bytes to write costs sixty to hold.
    """
    return len(text) > most and sum(map(text.count, (b",", b"[", b"{"))) > most


@dataclass(frozen=True, slots=True)
class RowError:
    """Why a row has no answer. `code` is stable and meant for programs, `message` for people."""

    code: str
    message: str


@dataclass(frozen=True, slots=True)
class Answer:
    """What an OpenAI server would have sent: an HTTP status and the decoded JSON body.

    Status 200 carries the OpenAI response object; any other an object with an `error` member.
    """

    status: int
    body: Json


def refusal(code: str, message: str, status: int = 400) -> Answer:
    """An error in OpenAI's shape, for what no OpenAI server was asked or what one lets pass."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return Answer(status, {"error": {"message": message, "type": kind, "code": code}})


@dataclass(frozen=True, slots=True)
class KVState:
    """The engine's KV cache and queue, in tokens and requests, as the engine reports them.

    `capacity_tokens` is fixed after start; the rest is a snapshot of the last engine step.
    """

    capacity_tokens: int
    used_tokens: int
    running: int
    waiting: int
    max_num_seqs: int
    max_model_len: int


class Replica(Protocol):
    """One engine behind one OpenAI application.

    Contract, checked by `tests/contract/test_replica.py` against every implementation:
    `complete` never raises for a bad request (it answers 4xx); it raises `EngineDeadError` when
    the engine is gone, and nothing after that works. Cancelling `complete` frees its KV tokens;
    asked again as the same `phi4ray.preemption.Preemptible`, it gives the same answer as if it had
    not been, and sooner where it can.
    """

    async def start(self) -> None:
        """Load the model and be ready to answer.

        Raises:
            EngineStartError: the engine cannot start; the message holds the cause.
        """
        ...

    async def complete(self, endpoint: Endpoint, body: Json) -> Answer:
        """Answer one OpenAI request.

        Raises:
            EngineDeadError: the engine died before or while answering.
        """
        ...

    def kv(self) -> KVState:
        """The current state of the KV cache; costs microseconds, never blocks."""
        ...

    async def stop(self) -> None:
        """Abort what runs and free the device. Idempotent."""
        ...


class OnlineReplica(Replica, Protocol):
    """A replica that has its OpenAI application, to be put behind an HTTP server."""

    app: Any
    """The ASGI application, once started."""
    on_begun: Callable[[str], None] | None
    """Told of each sequence that the engine is given, in the context of who asks: its id. Choices
    of one prompt share an id."""
    on_finished: Callable[[str, int, int], None] | None
    """Told of each sequence that the engine finished: its id, prompt and completion tokens."""
    on_aborted: Callable[[str, int, int], None] | None
    """Told instead of each that was given up: what it had come to, and all of its prompt."""
    on_step: Callable[[int, float | None, int], None] | None
    """Told of each step of the engine when its tokens are here: the sequences in it, the seconds
    since the step before was told of (None if no sequence waited for its next token), and how many
    got their first one."""

    def alive(self) -> bool:
        """Whether the engine runs; costs microseconds, never blocks."""
        ...

    async def abort(self, ids: Iterable[str]) -> None:
        """End what the engine still has of these, as `on_begun` named them; others are no error."""
        ...

    @property
    def can_sleep(self) -> bool:
        """Whether the engine, once started, can give its device's memory back and go on later."""
        ...

    async def sleep(self) -> None:
        """Give the device's memory back; nothing may be asked until `wake`.

        Raises:
            EngineDeadError: the engine died.
        """
        ...

    async def wake(self) -> None:
        """Be as before `sleep`, with an empty KV cache.

        Raises:
            EngineDeadError: the engine died.
        """
        ...
