"""What decides a job's answers, and whether two jobs are the same. Pure."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

from pydantic_core import from_json, to_json

from phi4ray.batch.plan import Input, Sealed
from phi4ray.config import BatchConfig, EngineConfig
from phi4ray.errors import PlanMismatchError

ENGINE_IDENTITY = (
    "kind", "model", "revision", "tokenizer", "quantization", "dtype", "kv_cache_dtype",
    "load_format", "max_model_len", "seed", "reasoning_parser", "tool_call_parser", "model_name",
)  # fmt: skip
"""The engine settings that decide answers; the others only decide speed."""

MODEL_FILES = "engine.model_files"
"""In a plan's identity: what `phi4ray.fingerprint` says, if anything."""


def identity_of(
    config: BatchConfig, chat_template: str | None, model_files: str | None = None
) -> dict[str, Any]:
    """What decides a job's answers, by its configuration names.

    Not in it, because they may change between runs of one job: replicas, shard sizes, retries,
    memory settings. `chat_template` is the text of the template, where the job sets one, and
    `model_files` the model's fingerprint, where it is known.
    """
    identity = {
        **_settings(config.engine),
        "engine.chat_template": chat_template,
        **_arguments(config.engine),
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


def check_same_job(plan: Sealed, identity: Mapping[str, Any], inputs: Sequence[Input]) -> None:
    """Refuse to put other results under a prefix that already belongs to a plan.

    Raises:
        PlanMismatchError: names every setting and the first inputs that differ.
    """
    names = plan.identity.keys() | identity.keys()
    differences = _differences(plan.identity, identity, names)
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


def check_same_engine(plan: Sealed, engine: EngineConfig) -> None:
    """Refuse to answer the rest of a job's rows by another model than its first ones.

    Raises:
        PlanMismatchError: names every setting that differs.
    """
    settings = _settings(engine)
    if differences := _differences(plan.identity, settings | _arguments(engine), settings):
        listed = "\n".join(f"  {line}" for line in differences)
        raise PlanMismatchError(
            f"the job began with another engine (plan {plan.plan_id}):\n{listed}\n"
            "The same command goes on where that engine runs again."
        )


def _settings(engine: EngineConfig) -> dict[str, Any]:
    return {f"engine.{name}": getattr(engine, name) for name in ENGINE_IDENTITY}


def _arguments(engine: EngineConfig) -> dict[str, Any]:
    """They come before settings of the same name."""
    return {f"engine.{name}": value for name, value in engine.engine_args.items()}


def _differences(was: Mapping[str, Any], now: Mapping[str, Any], names: Iterable[str]) -> list[str]:
    return [
        f"{name} was {was.get(name)!r} and is now {now.get(name)!r}"
        for name in sorted(names)
        if _value(was, name) != _value(now, name)
    ]


def _value(identity: Mapping[str, Any], name: str) -> Any:
    """A setting as it is compared: names of folders may end in a slash."""
    value = None if name == MODEL_FILES else identity.get(name)
    folder = name in ("engine.model", "engine.model_name", "engine.tokenizer")
    return value.rstrip("/") if folder and isinstance(value, str) else value
