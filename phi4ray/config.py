"""Configuration of engines and batch jobs: frozen, and closed to unknown keys.

Names are vLLM's where vLLM has one. Units are in the names.
"""

import json
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, cast

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from phi4ray.errors import ConfigError

Endpoint = Literal["/v1/chat/completions", "/v1/completions", "/v1/embeddings"]
OutputFormat = Literal["parquet", "openai-jsonl"]

LIMITS = frozenset({"max_tokens", "max_completion_tokens"})
"""Names of one limit, that of an answer. Of both vLLM takes `max_completion_tokens`."""


class Config(BaseModel):
    """Base of every configuration: immutable; a misspelt key is an error, and so is infinity."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False
    )


C = TypeVar("C", bound=Config)

YAML_ERRORS = (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError)
"""What PyYAML raises: of dates that are none, and of tags that do not fit, mere Python's."""

MAX_YAML_VALUES = 100_000
"""In a config file: a few lines of aliases can stand for more than any memory holds."""


class EngineConfig(Config):
    """One vLLM engine. Fields have the names and meanings of `vllm serve`'s arguments.

    Throughput defaults are set here and not left to vLLM, which gives an engine started without
    a usage context 128 sequences and 2,048 batched tokens where `vllm.LLM` gets 1,024 and 16,384.
    """

    kind: Literal["vllm", "fake"] = Field(
        "vllm", description="'fake' answers without a model: for tests and for scale"
    )
    model: str = Field(description="Hub name, local folder or s3:// folder of the checkpoint")
    served_model_name: str | None = Field(None, description="Name in answers; default: `model`")
    revision: str | None = None
    tokenizer: str | None = None
    dtype: str = "auto"
    quantization: str | None = Field(None, description="e.g. 'fp8'; None reads the checkpoint's")
    kv_cache_dtype: str = "auto"
    load_format: str = Field(
        "auto", description="As in `vllm serve`; 'runai_streamer' streams weights from s3://"
    )
    max_model_len: int | None = Field(None, ge=1, description="Context in tokens; None: model's")
    tensor_parallel_size: int = Field(1, ge=1, description="GPUs a replica; 0 GPUs on CPU builds")
    gpu_memory_utilization: float = Field(0.9, gt=0, le=1)
    kv_cache_memory_bytes: int | None = Field(None, ge=1, description="Overrides the fraction")
    max_num_seqs: int = Field(1024, ge=1)
    max_num_batched_tokens: int = Field(16384, ge=1)
    enable_prefix_caching: bool = True
    enforce_eager: bool = False
    compilation_config: Mapping[str, Any] | None = Field(
        None, description="vLLM's, as which CUDA graphs there are; decides speed alone"
    )
    seed: int = 0
    disable_log_stats: bool = Field(True, description="Whether vLLM keeps no Prometheus metrics")
    chat_template: str | None = Field(None, description="Path or text; None: the checkpoint's")
    reasoning_parser: str | None = None
    tool_call_parser: str | None = None
    num_gpus: float | None = Field(
        None, ge=0, description="GPUs Ray reserves a replica; None: tensor_parallel_size"
    )
    num_cpus: float = Field(1.0, ge=0, description="CPUs Ray reserves a replica")
    engine_args: Mapping[str, Any] = Field(
        default_factory=dict, description="Any other argument of `vllm serve`, by its Python name"
    )
    env: Mapping[str, str] = Field(
        default_factory=dict, description="Environment of the engine's process"
    )

    @property
    def model_name(self) -> str:
        """The name that answers carry and requests may use."""
        return self.served_model_name or self.model

    @property
    def gpus_per_replica(self) -> float:
        """What Ray reserves: fakes need no device."""
        if self.num_gpus is not None:
            return self.num_gpus
        return 0.0 if self.kind == "fake" else float(self.tensor_parallel_size)


class BatchConfig(Config):
    """One batch job: where rows come from, what answers them, where answers go."""

    input: tuple[str, ...] = Field(min_length=1, description="Files, globs, prefixes; s3:// too")
    output: str = Field(min_length=1, description="Prefix that will hold this one job's answers")
    engine: EngineConfig
    endpoint: Endpoint = Field(
        "/v1/chat/completions", description="Where `prompt` rows go; OpenAI Batch lines say it"
    )
    system_prompt: str | None = Field(None, description="Put before `prompt` rows of chat jobs")
    sampling: Mapping[str, Any] = Field(
        default_factory=dict, description="Request parameters for rows that do not set them"
    )
    output_format: OutputFormat = "parquet"
    limit: int | None = Field(None, ge=1, description="Only the first N rows of the inputs")
    shard_rows: int = Field(1000, ge=1, description="Most rows in one output part")
    shard_mib: float = Field(64.0, gt=0, description="Most input bytes in one output part")
    max_row_mib: float = Field(
        32.0, gt=0, le=1024, description="Largest row; larger ones get an error"
    )
    max_columns: int = Field(
        1000, ge=0, description="Most members of rows that are carried; with more a job is refused"
    )
    min_replicas: int = Field(1, ge=1)
    max_replicas: int | None = Field(None, ge=1, description="None: as many as the cluster fits")
    shards_in_flight: int | None = Field(
        None, ge=1, description="Shards a replica works on at once; None: enough to keep it full"
    )
    max_attempts: int = Field(4, ge=1, description="Tries of a row whose engine fails it")
    request_timeout_s: float | None = Field(None, gt=0, description="None: a row may take forever")
    max_error_fraction: float | None = Field(
        None, ge=0, le=1, description="Stop once more of the finished rows than this failed"
    )
    retry_errors: bool = Field(False, description="Rerun only the failed rows of a finished job")
    weight: float = Field(1.0, gt=0, description="With --serve: share among jobs of its priority")
    priority: int = Field(0, description="With --serve: jobs of a lower number go first")
    gpu_hour_price: float | None = Field(None, ge=0, description="Currency units a GPU hour")
    progress_interval_s: float = Field(10.0, gt=0, description="Between lines off a terminal")

    @field_validator("sampling")
    @classmethod
    def _as_json(cls, sampling: Mapping[str, Any]) -> Mapping[str, Any]:
        # YAML has dates, and keys that are numbers; what is sent to an engine has not.
        try:
            return cast(
                dict[str, Any], json.loads(json.dumps(sampling, default=str, allow_nan=False))
            )
        except (TypeError, ValueError) as error:
            raise ValueError(f"it cannot be written as JSON: {error}") from error

    @model_validator(mode="after")
    def _check(self) -> "BatchConfig":
        if self.max_replicas is not None and self.max_replicas < self.min_replicas:
            raise ValueError("max_replicas is below min_replicas")
        for reserved in ("stream", "model", "messages", "prompt", "input"):
            if reserved in self.sampling:
                raise ValueError(f"sampling cannot set {reserved!r}: it belongs to the row")
        if self.sampling.keys() >= LIMITS:
            raise ValueError(
                "sampling sets both max_tokens and max_completion_tokens, names of one limit: set "
                "one of them"
            )
        check_text(self)
        return self


def check_text(config: Config) -> None:
    """Refuse what cannot be written down, names included.

    Raises:
        ValueError: says why.
    """
    try:
        json.dumps(config.model_dump(), default=str, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:  # from a terminal that is not UTF-8
        raise ValueError("some of its text is not UTF-8") from error


def merge(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Merge configuration layers, later ones winning; nested mappings merge by key."""
    merged: dict[str, Any] = {}
    for layer in layers:
        for key, value in layer.items():
            below = merged.get(key)
            if isinstance(value, Mapping) and isinstance(below, Mapping):
                merged[key] = merge(below, value)
            else:
                merged[key] = value
    return merged


def load_yaml(text: str, source: str) -> dict[str, Any]:
    """Decode a YAML config file.

    Raises:
        ConfigError: it is no YAML mapping, or one that is larger than it looks.
    """
    try:
        value = yaml.safe_load(text)
    except RecursionError:
        raise ConfigError(f"{source} is not valid YAML: it is nested too deeply") from None
    except YAML_ERRORS as error:
        raise ConfigError(f"{source} is not valid YAML: {error}") from error
    if _has_more(value, MAX_YAML_VALUES):
        raise ConfigError(
            f"{source} stands for more than {MAX_YAML_VALUES:,} values: its aliases ('*name') lie "
            "in each other, or in themselves"
        )
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ConfigError(f"{source} must hold a mapping, not {type(value).__name__}")
    return value


def _has_more(value: Any, most: int) -> bool:
    """Whether a value holds more than so many, those behind aliases counted at each of them."""
    waiting, count = [value], 0
    while waiting and count <= most:
        one = waiting.pop()
        count += 1
        if isinstance(one, dict):
            waiting.extend(one.values())
        elif isinstance(one, list | set | tuple):
            waiting.extend(one)
    return count > most


def batch_config(*layers: Mapping[str, Any]) -> BatchConfig:
    """Validate merged layers (recipe, YAML file, flags) into a `BatchConfig`.

    A limit of answers takes the place of one in a layer below, by whichever of its two names.

    Raises:
        ConfigError: names every field that is wrong.
    """
    merged: dict[str, Any] = {}
    for layer in layers:
        below, above = merged.get("sampling"), layer.get("sampling")
        if isinstance(below, dict) and isinstance(above, Mapping) and LIMITS & above.keys():
            merged["sampling"] = {name: below[name] for name in below if name not in LIMITS}
        merged = merge(merged, layer)
    return validated(BatchConfig, merged)


def validated(model: type[C], *layers: Mapping[str, Any]) -> C:
    """Merge layers, later ones winning, into a configuration.

    Raises:
        ConfigError: names every field that is wrong.
    """
    try:
        return model.model_validate(merge(*layers))
    except ValidationError as error:
        lines = [
            f"  {'.'.join(map(str, e['loc'])) or 'config'}: {e['msg']}" for e in error.errors()
        ]
        raise ConfigError("the configuration is not valid:\n" + "\n".join(lines)) from error
