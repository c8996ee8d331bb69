"""How a batch goes from state to state. Pure: times are given, in Unix seconds.

validating ─▶ in_progress ─▶ finalizing ─▶ completed | expired | failed
    │  └──────────┬─▶ cancelling ─▶ cancelled
    └─▶ failed ◀──┘
"""

from collections.abc import Sequence

from phi4ray.batches.records import STOPS, BatchRequest, BatchState, LineError
from phi4ray.protocol import RowError


def validated(state: BatchState, rows: int, now_s: float) -> BatchState:
    """Its file is good: it may be answered."""
    status = "in_progress" if state.stop != "batch_cancelled" else state.status
    return state.model_copy(
        update={
            "status": status,
            "validated": True,
            "total": rows,
            "in_progress_at": int(now_s),
        }
    )


def failed(state: BatchState, errors: Sequence[LineError], now_s: float) -> BatchState:
    """It cannot be answered, whoever tries: it ends `failed`, if it was not stopped before."""
    return ended(refused(state, errors), None, None, now_s)


def refused(state: BatchState, errors: Sequence[LineError]) -> BatchState:
    """No more of its rows can be answered: it ends `failed`, with the answers that it has."""
    return state if state.errors else state.model_copy(update={"errors": tuple(errors)})


def stopping(state: BatchState) -> RowError | None:
    """What its rows without an answer get; None while they are to be answered."""
    if state.stop is not None:
        return STOPS[state.stop]
    if state.errors:
        return RowError(state.errors[0].code, state.errors[0].message)
    return None


def looked_at(
    state: BatchState, request: BatchRequest, cancel_at: int | None, now_s: float
) -> BatchState:
    """The state after a look at the clock and at what the client wants: it may be stopped now.

    A batch that is finalizing has all its answers already, and one that is stopped stays so.
    """
    if state.stop is not None or state.finalizing_at is not None or state.ended:
        return state
    if cancel_at is not None:
        return cancelled(state, cancel_at)
    if now_s >= request.expires_at and not state.errors:
        return state.model_copy(update={"stop": "batch_expired"})
    return state


def cancelled(state: BatchState, cancel_at: int | None) -> BatchState:
    """It is to be cancelled, if anybody asked for that: also when its last row has its answer."""
    if cancel_at is None or state.stop is not None:
        return state
    status = "cancelling" if state.finalizing_at is None else state.status
    return state.model_copy(
        update={"status": status, "stop": "batch_cancelled", "cancelling_at": cancel_at}
    )


def counted(state: BatchState, completed: int, failed: int) -> BatchState:
    """With so many rows done."""
    return state.model_copy(update={"completed": completed, "failed": failed})


def finalizing(state: BatchState, now_s: float) -> BatchState:
    """All rows have their answers or errors; the files are being made."""
    if state.finalizing_at is not None:
        return state
    status = "finalizing" if state.stop != "batch_cancelled" else state.status
    return state.model_copy(update={"status": status, "finalizing_at": int(now_s)})


def ended(
    state: BatchState, output_file_id: str | None, error_file_id: str | None, now_s: float
) -> BatchState:
    """The files are there."""
    status = {
        None: "failed" if state.errors else "completed",
        "batch_cancelled": "cancelled",
        "batch_expired": "expired",
    }[state.stop]
    return state.model_copy(
        update={
            "status": status,
            f"{status}_at": int(now_s),
            "output_file_id": output_file_id,
            "error_file_id": error_file_id,
        }
    )
