"""The plan of a job: which rows of which inputs make which part. Pure.

    inputs (uri, size, etag) → slices (row ranges of one file) → shards (slices) → one part each

The plan is written once as `_plan.json` and never changes; two drivers that plan the same job
write the same bytes.
"""

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, Protocol, cast

from pydantic_core import from_json, to_json

from phi4ray.config import BatchConfig, Config
from phi4ray.errors import ConfigError, PlanMismatchError

PLAN_NAME = "_plan.json"
MANIFEST_NAME = "_manifest.json"
SUCCESS_NAME = "_SUCCESS"
REPORT_NAME = "_report.html"
PROGRESS_NAME = "_progress.json"

_ANSWERS = re.compile(r"(_parts/)?part-\d{6,}-[0-9a-f]{12}\.(parquet|output\.jsonl|errors\.jsonl)")

ENGINE_IDENTITY = (
    "kind", "model", "revision", "tokenizer", "quantization", "dtype", "kv_cache_dtype",
    "load_format", "max_model_len", "seed", "reasoning_parser", "tool_call_parser",
)  # fmt: skip
"""The engine settings that decide answers; the others only decide speed."""


MODEL_FILES = "engine.model_files"
"""In a plan's identity: what `phi4ray.fingerprint` says, if anything."""


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


def identity_of(
    config: BatchConfig, chat_template: str | None, model_files: str | None = None
) -> dict[str, Any]:
    """What decides a job's answers, by its configuration names.

    Not in it, because they may change between runs of one job: replicas, shard sizes, retries,
    memory settings. `chat_template` is the text of the template, where the job sets one, and
    `model_files` the model's fingerprint, where it is known.
    """
    engine = config.engine
    identity = {
        **{f"engine.{name}": getattr(engine, name) for name in ENGINE_IDENTITY},
        "engine.model_name": engine.model_name,
        "engine.chat_template": chat_template,
        **{f"engine.{name}": value for name, value in engine.engine_args.items()},
        "endpoint": config.endpoint,
        "system_prompt": config.system_prompt,
        **{f"sampling.{name}": value for name, value in config.sampling.items()},
        "limit": config.limit,
        "max_row_mib": config.max_row_mib,
        "output_format": config.output_format,
    }
    if model_files is not None:
        identity[MODEL_FILES] = model_files
    # As it will be read from the plan: YAML has dates, and keys that are numbers.
    return cast(dict[str, Any], from_json(to_json(identity, fallback=str, inf_nan_mode="null")))


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


def check_same_job(plan: Sealed, identity: Mapping[str, Any], inputs: Sequence[Input]) -> None:
    """Refuse to put other results under a prefix that already belongs to a plan.

    Raises:
        PlanMismatchError: names every setting and the first inputs that differ.
    """
    differences = [
        f"{name} was {plan.identity.get(name)!r} and is now {identity.get(name)!r}"
        for name in sorted(plan.identity.keys() | identity.keys())
        if _value(plan.identity, name) != _value(identity, name)
    ]
    files = plan.identity.get(MODEL_FILES), identity.get(MODEL_FILES)
    if None not in files and files[0] != files[1]:  # plans of old had none
        differences.append(f"the files of engine.model {identity['engine.model']!r} are others")
    old = {item.uri: item for item in plan.inputs}
    new = {item.uri: item for item in inputs}
    changes = [f"input {uri} is gone" for uri in old if uri not in new]
    changes += [f"input {uri} is new" for uri in new if uri not in old]
    changes += [
        f"input {uri} changed (etag {old[uri].etag} is now {item.etag})"
        for uri, item in new.items()
        if uri in old and (old[uri].etag, old[uri].size) != (item.etag, item.size)
    ]
    if not changes and [item.uri for item in plan.inputs] != [item.uri for item in inputs]:
        changes.append("the inputs come in another order")
    if len(changes) > 5:
        changes = [*changes[:5], f"and {len(changes) - 5} more inputs differ"]
    if differences or changes:
        listed = "\n".join(f"  {line}" for line in differences + changes)
        raise PlanMismatchError(
            f"the output prefix belongs to another job (plan {plan.plan_id}):\n{listed}\n"
            "Use a new --output, or restore what differs to resume that job."
        )


def _value(identity: Mapping[str, Any], name: str) -> Any:
    """A setting as it is compared: names of folders may end in a slash."""
    value = None if name == MODEL_FILES else identity.get(name)
    folder = name in ("engine.model", "engine.model_name", "engine.tokenizer")
    return value.rstrip("/") if folder and isinstance(value, str) else value


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
