"""What a job has written so far, read from its output alone: no cluster is needed."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from phi4ray.batch.manifest import Manifest, count_errors, list_parts, read_receipts
from phi4ray.batch.parts import COLUMNS, read_part
from phi4ray.batch.plan import (
    MANIFEST_NAME,
    PLAN_NAME,
    REPORT_NAME,
    SUCCESS_NAME,
    Plan,
)
from phi4ray.batch.planning import stored_plan
from phi4ray.errors import InputError, ObjectNotFoundError
from phi4ray.storage import join, storage_for


@dataclass(frozen=True, slots=True)
class Results:
    """A job's output. Rows, errors and tokens are of the parts that are written.

    `error_rows` counts those of each written part, by shard. `started_at` and `finished_at` are
    the first part's start and the last one's end in Unix seconds, over all runs of the job.
    """

    output: str
    plan: Plan
    finished: bool
    rows: int
    errors: Mapping[str, int]
    prompt_tokens: int
    completion_tokens: int
    started_at: float | None
    finished_at: float | None
    error_rows: Mapping[int, int]

    def figures(self) -> dict[str, Any]:
        """All there is to tell, for JSON; `duration_s` counts pauses between runs too."""
        times = (self.started_at, self.finished_at)
        duration_s = None if None in times else self.finished_at - self.started_at  # type: ignore[operator]
        return {
            "output": self.output,
            "plan_id": self.plan.plan_id,
            "finished": self.finished,
            "rows_total": self.plan.rows,
            "rows": self.rows,
            "parts_total": len(self.plan.shards),
            "parts": len(self.error_rows),
            "error_rows": sum(self.errors.values()),
            "errors": dict(sorted(self.errors.items())),
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "duration_s": duration_s,
            "manifest": join(self.output, MANIFEST_NAME) if self.finished else None,
            "report": join(self.output, REPORT_NAME) if self.finished else None,
        }


def read_results(output: str) -> Results:
    """Add up what is there; of a job that is not finished, that costs one footer a part.

    Raises:
        InputError: no job has written there.
        ConfigError: its plan is of another version of phi4ray.
        StorageError: the store cannot be read.
    """
    try:
        plan = stored_plan(output)
    except ObjectNotFoundError as error:
        raise InputError(
            f"no job has written to {output}: {PLAN_NAME} is not there. Give the --output of a "
            "job, as this machine names it"
        ) from error
    manifest = _manifest(output, plan)
    if manifest is not None:
        return Results(
            output=output,
            plan=plan,
            finished=True,
            rows=manifest.rows,
            errors=manifest.errors,
            prompt_tokens=manifest.prompt_tokens,
            completion_tokens=manifest.completion_tokens,
            started_at=manifest.started_at,
            finished_at=manifest.finished_at,
            error_rows={part.shard: sum(part.errors.values()) for part in manifest.parts},
        )
    receipts = read_receipts(output, plan, sorted(list_parts(output, plan)))
    return Results(
        output=output,
        plan=plan,
        finished=False,
        rows=sum(receipt.rows for receipt in receipts),
        errors=count_errors(receipts),
        prompt_tokens=sum(receipt.prompt_tokens for receipt in receipts),
        completion_tokens=sum(receipt.completion_tokens for receipt in receipts),
        started_at=min((receipt.started_at for receipt in receipts), default=None),
        finished_at=max((receipt.finished_at for receipt in receipts), default=None),
        error_rows={receipt.shard: receipt.error_rows for receipt in receipts},
    )


def _manifest(output: str, plan: Plan) -> Manifest | None:
    """The manifest of a finished job: `_SUCCESS` says that it holds."""
    storage = storage_for(output)
    try:
        storage.head(join(output, SUCCESS_NAME))
        manifest = Manifest.model_validate_json(storage.read(join(output, MANIFEST_NAME)))
    except (ObjectNotFoundError, ValueError):
        return None
    return manifest if manifest.plan_id == plan.plan_id else None


def rows_of(results: Results, *, errors_only: bool = False) -> Iterator[dict[str, Any]]:
    """The answer columns of written rows, in the order of the parts; parts are read as needed.

    Raises:
        StorageError: a part cannot be read.
    """
    for shard, error_rows in sorted(results.error_rows.items()):
        if errors_only and not error_rows:
            continue
        part = read_part(results.output, results.plan, shard).select(COLUMNS.names)
        for batch in part.to_batches(max_chunksize=64):
            for row in batch.to_pylist():
                if not errors_only or row["error_code"] is not None:
                    yield row
