"""What the store holds of files and batches, and how OpenAI's API shows it. Pure.

Each record has one writer: the HTTP door writes files' and batches' records once, the runner
alone writes a batch's state.
"""

import hashlib
import re
import secrets
from collections.abc import Mapping
from typing import Literal

from phi4ray.config import Config, Endpoint
from phi4ray.protocol import Json, RowError

Purpose = Literal["batch", "batch_output"]
Status = Literal[
    "validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelling",
    "cancelled",
]  # fmt: skip
Stop = Literal["batch_cancelled", "batch_expired"]

ENDED: frozenset[Status] = frozenset({"failed", "completed", "expired", "cancelled"})

STOPS: Mapping[Stop, RowError] = {
    "batch_cancelled": RowError("batch_cancelled", "The batch was cancelled before this request."),
    "batch_expired": RowError(
        "batch_expired",
        "This request could not be executed before the completion window expired.",
    ),
}
"""Why a batch ends before all its rows are answered, and what the rest of them get."""

FILE_ID = re.compile(r"file-[0-9a-f]{32}")
BATCH_ID = re.compile(r"batch_[0-9a-f]{32}")


def new_file_id(now_s: float) -> str:
    """An id for a file; ids sort by time."""
    return f"file-{_ms(now_s)}{secrets.token_hex(10)}"


def new_batch_id(now_s: float) -> str:
    """An id for a batch; ids sort by time."""
    return f"batch_{_ms(now_s)}{secrets.token_hex(10)}"


def result_file_id(batch_id: str, kind: Literal["output", "error"], now_s: float) -> str:
    """The id of a batch's file: the same however often the end of the batch is run again."""
    return f"file-{_ms(now_s)}{_digest(batch_id, kind)}"


def is_result(file_id: str, batch_id: str) -> bool:
    """Whether a file is a batch's, by its id."""
    return file_id.endswith((_digest(batch_id, "output"), _digest(batch_id, "error")))


def _digest(batch_id: str, kind: str) -> str:
    return hashlib.sha256(f"{batch_id} {kind}".encode()).hexdigest()[:20]


def _ms(now_s: float) -> str:
    return f"{int(now_s * 1000):012x}"


def age_s(identifier: str, now_s: float) -> float:
    """How long ago an id was made."""
    return now_s - int(re.split("[-_]", identifier)[1][:12], 16) / 1000


class Piece(Config):
    """One object of a file's content; `name` is below the store's root."""

    name: str
    size: int


class FileRecord(Config):
    """A file. Its content is its pieces, one after the other. Times are Unix seconds."""

    id: str
    filename: str
    purpose: Purpose
    created_at: int
    expires_at: int | None = None
    pieces: tuple[Piece, ...]

    @property
    def size(self) -> int:
        """The content's size in bytes."""
        return sum(piece.size for piece in self.pieces)

    def expired(self, now_s: float) -> bool:
        """Whether its time is over."""
        return self.expires_at is not None and now_s >= self.expires_at

    def shown(self) -> Json:
        """OpenAI's file object."""
        return {
            "id": self.id,
            "object": "file",
            "bytes": self.size,
            "created_at": self.created_at,
            "expires_at": self.expires_at,
            "filename": self.filename,
            "purpose": self.purpose,
            "status": "processed",
            "status_details": None,
        }


class BatchRequest(Config):
    """What a client asked for, as it was taken. Times are Unix seconds."""

    id: str
    endpoint: Endpoint
    input_file_id: str
    completion_window: str
    created_at: int
    expires_at: int
    metadata: Mapping[str, str] | None = None
    output_expires_after_s: float | None = None


class LineError(Config):
    """Why a batch's file is refused; `line` counts from 1."""

    code: str
    message: str
    param: str | None = None
    line: int | None = None


class BatchState(Config):
    """How far a batch is. `total` counts its rows once it is `validated`; times are Unix seconds.

    `stop` is decided once, and then holds however often the batch is taken up again.
    """

    status: Status = "validating"
    validated: bool = False
    total: int = 0
    completed: int = 0
    failed: int = 0
    errors: tuple[LineError, ...] = ()
    stop: Stop | None = None
    output_file_id: str | None = None
    error_file_id: str | None = None
    in_progress_at: int | None = None
    finalizing_at: int | None = None
    cancelling_at: int | None = None
    completed_at: int | None = None
    failed_at: int | None = None
    expired_at: int | None = None
    cancelled_at: int | None = None

    @property
    def ended(self) -> bool:
        """Whether nothing will change any more."""
        return self.status in ENDED


def shown_batch(
    request: BatchRequest, state: BatchState, cancel_at: int | None, model: str
) -> Json:
    """OpenAI's batch object. `cancel_at`: when its cancelling was asked for."""
    status, cancelling_at = state.status, state.cancelling_at
    open_to_it = status in ("validating", "in_progress") and state.stop is None
    if cancel_at is not None and open_to_it:
        status, cancelling_at = "cancelling", cancel_at
    errors = [error.model_dump() for error in state.errors]
    return {
        "id": request.id,
        "object": "batch",
        "endpoint": request.endpoint,
        "model": model,
        "errors": {"object": "list", "data": errors} if errors else None,
        "input_file_id": request.input_file_id,
        "completion_window": request.completion_window,
        "status": status,
        "output_file_id": state.output_file_id,
        "error_file_id": state.error_file_id,
        "created_at": request.created_at,
        "in_progress_at": state.in_progress_at,
        "expires_at": request.expires_at,
        "finalizing_at": state.finalizing_at,
        "completed_at": state.completed_at,
        "failed_at": state.failed_at,
        "expired_at": state.expired_at,
        "cancelling_at": cancelling_at,
        "cancelled_at": state.cancelled_at,
        "request_counts": {
            "total": state.total, "completed": state.completed, "failed": state.failed,
        },
        "metadata": None if request.metadata is None else dict(request.metadata),
    }  # fmt: skip
