"""The end of a job: receipts added up against the plan, then `_manifest.json`, then `_SUCCESS`."""

from collections.abc import Mapping, Sequence
from functools import partial

from phi4ray.batch.executor import Executor, threaded
from phi4ray.batch.export import export_part
from phi4ray.batch.parts import Receipt, read_receipt
from phi4ray.batch.plan import MANIFEST_NAME, SUCCESS_NAME, Plan
from phi4ray.config import BatchConfig, Config
from phi4ray.errors import IncompleteOutputError
from phi4ray.storage import ObjectInfo, join, storage_for


class PartEntry(Config):
    """One part as it stands in the store. `exports` are the OpenAI files made from it."""

    name: str
    shard: int
    rows: int
    errors: Mapping[str, int]
    prompt_tokens: int
    completion_tokens: int
    size: int
    etag: str
    sha256: str
    exports: tuple[str, ...] = ()


class Manifest(Config):
    """What a finished job wrote. Totals are over all parts.

    `started_at` and `finished_at` are Unix seconds: the first part's start and the last one's end.
    """

    plan_id: str
    rows: int
    errors: Mapping[str, int]
    prompt_tokens: int
    completion_tokens: int
    started_at: float | None = None
    finished_at: float | None = None
    parts: tuple[PartEntry, ...]


def list_parts(output: str, plan: Plan) -> dict[int, ObjectInfo]:
    """The parts of a plan that exist, by shard: one LIST."""
    prefix = join(output, "")
    found = {}
    for item in storage_for(output).list(output):
        shard = plan.shard_of(item.uri.removeprefix(prefix))
        if shard is not None:
            found[shard] = item
    return found


def read_receipts(output: str, plan: Plan, shards: Sequence[int]) -> list[Receipt]:
    """The receipts of these shards' parts; costs one footer each, many at a time."""
    return threaded(partial(read_receipt, output, plan), shards)


def check_receipts(plan: Plan, receipts: Sequence[Receipt]) -> None:
    """Add the receipts up against the plan.

    Raises:
        IncompleteOutputError: names the first shards that are missing or have other rows.
    """
    rows = {receipt.shard: receipt.rows for receipt in receipts}
    wrong = [shard for shard in plan.shards if rows.get(shard.index) != shard.rows]
    if wrong:
        named = ", ".join(
            f"{plan.part_name(shard.index)} ({rows.get(shard.index, 0)} of {shard.rows} rows)"
            for shard in wrong[:5]
        )
        raise IncompleteOutputError(
            f"{len(wrong)} of {len(plan.shards)} parts are missing or not whole: {named}. "
            "Delete those that exist and run the same command again"
        )


def write_manifest(
    config: BatchConfig, plan: Plan, receipts: Sequence[Receipt], executor: Executor
) -> Manifest:
    """Write the manifest and, after it, `_SUCCESS`. The receipts have been checked."""
    parts = list_parts(config.output, plan)
    shards = [receipt.shard for receipt in receipts]
    exports: list[tuple[str, ...]] = [()] * len(shards)
    if config.output_format == "openai-jsonl":
        names = map(plan.part_name, shards)
        exports = list(executor.map(partial(export_part, config.output), names))
    digests = threaded(lambda shard: storage_for(config.output).sha256(parts[shard].uri), shards)
    entries = tuple(
        PartEntry(
            name=plan.part_name(receipt.shard),
            shard=receipt.shard,
            rows=receipt.rows,
            errors=receipt.errors,
            prompt_tokens=receipt.prompt_tokens,
            completion_tokens=receipt.completion_tokens,
            size=parts[receipt.shard].size,
            etag=parts[receipt.shard].etag,
            sha256=digest,
            exports=exported,
        )
        for receipt, digest, exported in zip(receipts, digests, exports, strict=True)
    )
    manifest = Manifest(
        plan_id=plan.plan_id,
        rows=plan.rows,
        errors=count_errors(receipts),
        prompt_tokens=sum(receipt.prompt_tokens for receipt in receipts),
        completion_tokens=sum(receipt.completion_tokens for receipt in receipts),
        started_at=min((receipt.started_at for receipt in receipts), default=None),
        finished_at=max((receipt.finished_at for receipt in receipts), default=None),
        parts=entries,
    )
    storage = storage_for(config.output)
    data = manifest.model_dump_json(indent=1).encode()
    storage.write(join(config.output, MANIFEST_NAME), data)
    storage.write(join(config.output, SUCCESS_NAME), b"")
    return manifest


def count_errors(receipts: Sequence[Receipt]) -> dict[str, int]:
    """Error rows by code, over several parts."""
    total: dict[str, int] = {}
    for receipt in receipts:
        for code, rows in receipt.errors.items():
            total[code] = total.get(code, 0) + rows
    return total
