"""The plan of a job: which rows of which inputs make which part. Pure.

    inputs (uri, size, etag) → slices (row ranges of one file) → shards (slices) → one part each

The plan is written once as `_plan.json` and never changes; two drivers that plan the same job
write the same bytes.
"""

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, Protocol

from pydantic_core import to_json

from phi4ray.config import Config
from phi4ray.errors import ConfigError

PLAN_NAME = "_plan.json"
MANIFEST_NAME = "_manifest.json"
SUCCESS_NAME = "_SUCCESS"
REPORT_NAME = "_report.html"
PROGRESS_NAME = "_progress.json"

_ANSWERS = re.compile(r"(_parts/)?part-\d{6,}-[0-9a-f]{12}\.(parquet|output\.jsonl|errors\.jsonl)")


class Input(Config):
    """One input object as it was when planned. `rows` counts the planned rows of it."""

    uri: str
    size: int
    etag: str
    rows: int = 0


class Slice(Config):
    """Rows `[row_start, row_start + rows)` of input `file`.

    `start` and `end` are the byte range that holds them in plain JSONL; 0 for other formats.
    `size` is their (estimated) size in bytes, `longest` the highest limit of an answer that one of
    them states, in tokens: 0 if none does, and for formats whose rows are not read for the plan.
    """

    file: int
    row_start: int
    rows: int
    start: int = 0
    end: int = 0
    size: int = 0
    longest: int = 0


class Shard(Config):
    """One unit of work and of output: its rows, in order, become one part."""

    index: int
    slices: tuple[Slice, ...]

    @property
    def rows(self) -> int:
        """How many rows the shard holds."""
        return sum(piece.rows for piece in self.slices)

    @property
    def longest(self) -> int | None:
        """The highest limit that one of its rows states; None if none is known."""
        return max(piece.longest for piece in self.slices) or None


_SPEED: Any = {"slices": {"__all__": {"longest"}}}
"""Of a shard, what decides only when it is answered."""


class Plan(Config):
    """Everything that decides the answers, and how the rows are cut into shards.

    `identity` holds what must not change on one output prefix. `carried` is the Arrow schema of
    the columns carried through, as `phi4ray.batch.carried.encode_schema` writes it. `folder` is
    where parts lie under the output prefix: "" or a name that ends in "/".
    """

    version: Literal[1] = 1
    plan_id: str
    identity: Mapping[str, Any]
    inputs: tuple[Input, ...]
    carried: str
    folder: Literal["", "_parts/"] = ""
    shards: tuple[Shard, ...]
    duplicate_ids: int = 0
    duplicate_example: str | None = None
    prompt_bytes: int = 0

    @property
    def rows(self) -> int:
        """How many rows the job answers."""
        return sum(item.rows for item in self.inputs)

    def part_name(self, shard: int) -> str:
        """The one name of a shard's part. It carries the plan id: a LIST tells what is done."""
        return f"{self.folder}part-{shard:06d}-{self.plan_id}.parquet"

    def shard_of(self, name: str) -> int | None:
        """The shard whose part has this name under the output; None for any other object."""
        found = re.fullmatch(rf"{self.folder}part-(\d{{6,}})-{self.plan_id}\.parquet", name)
        index = int(found[1]) if found else -1
        known = 0 <= index < len(self.shards) and name == self.part_name(index)
        return index if known else None


def pack(slices: Iterable[Slice], shard_rows: int, shard_bytes: int) -> Iterator[Shard]:
    """Put slices, in order, into shards of at most `shard_rows` rows and `shard_bytes` bytes.

    A slice is never cut here; one that is too large by itself makes a shard of its own.
    """
    held: list[Slice] = []
    rows = size = index = 0
    for piece in slices:
        if held and (rows + piece.rows > shard_rows or size + piece.size > shard_bytes):
            yield Shard(index=index, slices=tuple(held))
            index, held, rows, size = index + 1, [], 0, 0
        held.append(piece)
        rows, size = rows + piece.rows, size + piece.size
    if held:
        yield Shard(index=index, slices=tuple(held))


def take(slices: Iterable[Slice], limit: int | None) -> Iterator[Slice]:
    """The slices of the first `limit` rows; the last one is cut short."""
    left = limit
    for piece in slices:
        if left is None:
            yield piece
            continue
        if left == 0:
            return
        rows = min(left, piece.rows)
        size = piece.size * rows // piece.rows
        yield piece.model_copy(update={"rows": rows, "size": size})
        left -= rows


def make_plan(
    identity: Mapping[str, Any], inputs: Sequence[Input], shards: Sequence[Shard], **facts: Any
) -> Plan:
    """Seal a plan: its id is a digest of everything that decides the answers and the parts."""
    counts = [0] * len(inputs)
    for shard in shards:
        for piece in shard.slices:
            counts[piece.file] += piece.rows
    sealed = tuple(
        item.model_copy(update={"rows": rows}) for item, rows in zip(inputs, counts, strict=True)
    )
    return Plan(
        plan_id=_seal(identity, sealed, shards),
        identity=dict(identity),
        inputs=sealed,
        shards=tuple(shards),
        **facts,
    )


def _seal(identity: Mapping[str, Any], inputs: Sequence[Input], shards: Sequence[Shard]) -> str:
    digest = hashlib.sha256(to_json(identity))
    for item in inputs:
        digest.update(to_json(item))
    for shard in shards:
        digest.update(shard.model_dump_json(exclude=_SPEED).encode())
    return digest.hexdigest()[:12]


class Sealed(Protocol):
    """What says which job an output prefix belongs to."""

    @property
    def plan_id(self) -> str:
        """Digest of the two others."""
        ...

    @property
    def identity(self) -> Mapping[str, Any]:
        """The settings that decide the output, by their configuration names."""
        ...

    @property
    def inputs(self) -> Sequence[Input]:
        """The input objects, in order."""
        ...


def is_answer(name: str) -> bool:
    """Whether an object with this name under an output prefix holds answers of some plan."""
    return _ANSWERS.fullmatch(name) is not None


def read_plan(data: bytes, uri: str) -> Plan:
    """Decode `_plan.json`.

    Raises:
        ConfigError: it is no plan, one of another version of phi4ray, or not as it was written.
    """
    try:
        plan = Plan.model_validate_json(data)
    except ValueError as error:
        raise ConfigError(
            f"{uri} is not a plan that this version of phi4ray can read: use a new --output"
        ) from error
    if _seal(plan.identity, plan.inputs, plan.shards) != plan.plan_id:
        raise ConfigError(
            f"{uri} is not as it was written: restore it, or use a new --output. Parts that are "
            "done cannot be told from others without it"
        )
    return plan
