"""What a quantization is told and what it gives back: schemes, settings, figures."""

from collections.abc import Mapping
from typing import Literal

from pydantic import Field, model_validator

from phi4ray.config import Config

Scheme = Literal["gptq-4bit", "fp8-dynamic", "w8a8", "w4a16"]

GROUPED = ("gptq-4bit", "w4a16")


class QuantizeConfig(Config):
    """One quantization: which model, how, on what, and where it goes."""

    model: str = Field(description="Hub name, local folder or s3:// folder of the checkpoint")
    revision: str | None = None
    output: str = Field(min_length=1, description="Folder for the checkpoint; s3:// too")
    scheme: Scheme
    calibration: tuple[str, ...] = Field(
        (), description="Files and globs of rows with messages, prompt or text; s3:// too"
    )
    calibration_dataset: str = Field(
        "NeelNanda/pile-10k", description="Hub data set, where there are no files"
    )
    calibration_split: str = "train"
    num_samples: int = Field(128, ge=1, description="Rows, or packed pieces, to calibrate on")
    max_seq_length: int = Field(2048, ge=2, description="Tokens of one of them")
    iters: int = Field(256, ge=0, description="Steps a block of AutoRound; 0 rounds to nearest")
    group_size: int = Field(128, ge=1, description="Inputs that share a scale, in 4-bit schemes")
    smoothing_strength: float = Field(
        0.8, ge=0, le=1, description="SmoothQuant's, before w8a8; 0 leaves it out"
    )
    kv_cache_scheme: Literal["fp8"] | None = Field(
        None, description="Store scales for this KV cache; not with gptq-4bit"
    )
    seed: int = 0
    python: str | None = Field(
        None, description="A Python that has auto-round and llmcompressor; None: one is made"
    )

    @property
    def needs_calibration(self) -> bool:
        """Whether values of activations decide anything: not for scales that are taken anew."""
        return self.scheme != "fp8-dynamic" or self.kv_cache_scheme is not None

    def unused(self) -> list[str]:
        """Names of settings that were given and that this scheme takes no notice of."""
        ignored: set[str] = set()
        if not self.needs_calibration:
            ignored |= {"calibration_dataset", "calibration_split", "num_samples"}
            ignored |= {"max_seq_length", "seed"}
        if self.scheme not in GROUPED:
            ignored.add("group_size")
        if self.scheme != "gptq-4bit":
            ignored.add("iters")
        if self.scheme != "w8a8":
            ignored.add("smoothing_strength")
        return sorted(ignored & self.model_fields_set)

    @model_validator(mode="after")
    def _check(self) -> "QuantizeConfig":
        if self.scheme == "gptq-4bit" and self.kv_cache_scheme is not None:
            raise ValueError(
                "kv_cache_scheme: the GPTQ format has no place for KV-cache scales; use w4a16"
            )
        if self.calibration and not self.needs_calibration:
            raise ValueError(
                "calibration: fp8-dynamic needs none, but for the scales of a kv_cache_scheme"
            )
        return self


class Quantized(Config):
    """What a quantization made, and of what. Sizes are of the weights."""

    output: str
    bytes_before: int
    bytes_after: int
    calibration_samples: int
    calibration_tokens: int
    versions: Mapping[str, str]
    seconds: float


class Record(Config):
    """What a quantized checkpoint's folder keeps of its making: enough to write its card anew."""

    config: QuantizeConfig
    result: Quantized
