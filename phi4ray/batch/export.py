"""A finished part as OpenAI Batch output and error files.

The Parquet part stays the one receipt of its shard; the two JSONL objects are derived from it
after all parts are done, so that they cannot disagree about a row.
"""

import io
from typing import IO

from pydantic_core import from_json, to_json

from phi4ray.batch.parts import Result, read_table, receipt_of, results_of, row_name
from phi4ray.protocol import Json
from phi4ray.storage import join, storage_for


def export_part(output: str, name: str) -> tuple[str, ...]:
    """Write the OpenAI files of the part `name`; returns their names. An empty one is not written.

    The part's receipt says the rest. A plan is not asked: it grows with the job, and each part is
    a task that may run elsewhere.
    """
    table = read_table(join(output, name))
    receipt = receipt_of(table.schema)
    stem = f"part-{receipt.shard:06d}-{receipt.plan_id}"
    streams: tuple[IO[bytes], IO[bytes]] = io.BytesIO(), io.BytesIO()
    for number, row in enumerate(results_of(table)):
        line = batch_line(row, f"batch_req_{receipt.plan_id}_{receipt.shard:06d}_{number}")
        streams[row.error_code is not None].write(to_json(line) + b"\n")
    written = []
    for kind, stream in zip(("output", "errors"), streams, strict=True):
        uri = join(output, exported := f"{stem}.{kind}.jsonl")
        stream.seek(0)
        if data := stream.read():
            storage_for(uri).write(uri, data)
            written.append(exported)
        else:  # a rerun of failed rows may leave nothing to say here
            storage_for(uri).delete(uri)
    return tuple(written)


def batch_line(row: Result, request_id: str) -> Json:
    """One line of an OpenAI Batch output or error file.

    What the engine refused keeps its HTTP answer; what never reached it has only an `error`, which
    does not name the input: who asked need not know where it lies, and has the custom id.
    """
    error = None
    if row.error_code is not None:
        message = (row.error_message or "").removeprefix(
            f"{row_name(row.source_file, row.source_row)}: "
        )
        error = {"code": row.error_code, "message": message}
    response = None
    if row.response is not None:
        body = from_json(row.response)
        status = 200 if error is None else _status(body)
        response = {"status_code": status, "request_id": request_id, "body": body}
    return {"id": request_id, "custom_id": row.id, "response": response, "error": error}


def _status(body: Json) -> int:
    error = body.get("error")
    error = error if isinstance(error, dict) else {}
    if isinstance(code := error.get("code"), int):
        return code
    return 500 if error.get("type") == "server_error" else 400
