"""The two files of a batch that ended, made of the objects that its job exported."""

from collections.abc import Mapping
from typing import Literal

from phi4ray.batch.plan import Plan
from phi4ray.batches.records import FileRecord, result_file_id
from phi4ray.batches.store import Key, Store

Kind = Literal["output", "error"]

_ENDINGS: Mapping[Kind, str] = {"output": "output.jsonl", "error": "errors.jsonl"}


def result_file(
    store: Store, key: Key, plan: Plan, kind: Kind, made: int, life_s: float | None
) -> str | None:
    """Make a batch's file of answers or of errors known; gives its id, and None were it empty.

    `made` is when its batch was finalized, in Unix seconds.
    """
    pieces = store.pieces(key, f"-{plan.plan_id}.{_ENDINGS[kind]}")
    if not pieces:
        return None
    record = FileRecord(
        id=result_file_id(key.id, kind, made),
        filename=f"{key.id}_{kind}.jsonl",
        purpose="batch_output",
        created_at=made,
        expires_at=None if life_s is None else int(made + life_s),
        pieces=pieces,
    )
    store.write_file(key.owner, record)
    return record.id
