"""The Phi-4 family: names, shapes, contexts, quantized checkpoints, recommended sampling.

Figures are of the model cards and `config.json` files on the Hugging Face hub. Every model here
has the Phi-3 architecture: fused qkv and gate_up projections, RMSNorm, grouped-query attention,
no biases.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from phi4ray.errors import ConfigError

WeightScheme = Literal["bf16", "fp8", "w8a8", "w4a16"]
"""How linear layers are stored; embeddings, lm_head and norms stay bf16 in all of them."""

_ARCHITECTURES = {"phi3", "phi4mm"}
_SCHEME_OF_METHOD: Mapping[str, WeightScheme] = {
    "fp8": "fp8",
    "fbgemm_fp8": "fp8",
    "ptpc_fp8": "fp8",
    "gptq": "w4a16",
    "gptq_marlin": "w4a16",
    "awq": "w4a16",
    "awq_marlin": "w4a16",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """The sizes of one decoder, under the names of its `config.json`.

    `max_model_len` is the context in tokens (`max_position_embeddings`), `head_dim` the width of
    one attention head, `partial_rotary_factor` the share of it that carries positions.
    """

    num_hidden_layers: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    max_model_len: int
    tie_word_embeddings: bool = False
    partial_rotary_factor: float = 1.0

    @property
    def linear_parameters(self) -> int:
        """Weights of all layers' projections: what quantization packs and a token multiplies."""
        heads = self.num_attention_heads + 2 * self.num_key_value_heads
        qkv = self.hidden_size * heads * self.head_dim
        o = self.num_attention_heads * self.head_dim * self.hidden_size
        gate_up_and_down = 3 * self.hidden_size * self.intermediate_size
        return self.num_hidden_layers * (qkv + o + gate_up_and_down)

    @property
    def parameters(self) -> int:
        """Exact count: linear layers, two norms a layer, final norm, embedding, untied lm_head."""
        norms = (2 * self.num_hidden_layers + 1) * self.hidden_size
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
        return self.linear_parameters + norms + embeddings

    @classmethod
    def from_hf_config(cls, config: Mapping[str, Any]) -> "ModelShape":
        """Read a decoded Hugging Face `config.json`.

        Raises:
            ConfigError: it is of another architecture, or lacks a size.
        """
        model_type = config.get("model_type")
        if model_type not in _ARCHITECTURES:
            raise ConfigError(
                f"model_type {model_type!r} is not of the Phi-4 family: "
                f"expected one of {sorted(_ARCHITECTURES)}"
            )
        try:
            heads = int(config["num_attention_heads"])
            hidden = int(config["hidden_size"])
            # Transformers 5 writes the rotary settings into one mapping, 4 beside the sizes.
            rotary = {**config, **(config.get("rope_parameters") or {})}
            return cls(
                num_hidden_layers=int(config["num_hidden_layers"]),
                hidden_size=hidden,
                intermediate_size=int(config["intermediate_size"]),
                num_attention_heads=heads,
                num_key_value_heads=int(config.get("num_key_value_heads") or heads),
                head_dim=int(config.get("head_dim") or hidden // heads),
                vocab_size=int(config["vocab_size"]),
                max_model_len=int(config["max_position_embeddings"]),
                tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
                partial_rotary_factor=float(rotary.get("partial_rotary_factor", 1.0)),
            )
        except KeyError as error:
            raise ConfigError(f"the model's config.json lacks {error}") from error
        except (TypeError, ValueError, ZeroDivisionError, AttributeError) as error:
            raise ConfigError(f"a size in the model's config.json is wrong: {error}") from error


@dataclass(frozen=True, slots=True, kw_only=True)
class CatalogueEntry:
    """One model of the family.

    `recommended_sampling` holds OpenAI request parameters (and vLLM's `top_k`) where the model
    card recommends some. `extra_parameters` counts what is beside the decoder (encoders,
    adapters). `quantized` maps hub ids of quantized checkpoints to how they store weights.
    """

    hub_id: str
    description: str
    shape: ModelShape
    license: str = "MIT"
    reasoning_parser: str | None = None
    tool_call_parser: str | None = None
    recommended_sampling: Mapping[str, float] = field(default_factory=dict)
    extra_parameters: int = 0
    quantized: Mapping[str, WeightScheme] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The hub id without its owner."""
        return self.hub_id.rpartition("/")[2]


def _phi4(max_model_len: int) -> ModelShape:
    return ModelShape(
        num_hidden_layers=40,
        hidden_size=5120,
        intermediate_size=17920,
        num_attention_heads=40,
        num_key_value_heads=10,
        head_dim=128,
        vocab_size=100352,
        max_model_len=max_model_len,
    )


_PHI4_MINI = ModelShape(
    num_hidden_layers=32,
    hidden_size=3072,
    intermediate_size=8192,
    num_attention_heads=24,
    num_key_value_heads=8,
    head_dim=128,
    vocab_size=200064,
    max_model_len=131072,
    tie_word_embeddings=True,
    partial_rotary_factor=0.75,
)

CATALOGUE: tuple[CatalogueEntry, ...] = (
    CatalogueEntry(
        hub_id="microsoft/phi-4",
        description="14.7B, 16K context: chat, reasoning and code in English.",
        shape=_phi4(16384),
        quantized={
            "RedHatAI/phi-4-FP8-dynamic": "fp8",
            "RedHatAI/phi-4-quantized.w8a8": "w8a8",
            "RedHatAI/phi-4-quantized.w4a16": "w4a16",
        },
    ),
    CatalogueEntry(
        hub_id="microsoft/Phi-4-reasoning",
        description="14.7B, 32K context: thinks in <think> before it answers; never greedy.",
        shape=_phi4(32768),
        reasoning_parser="deepseek_r1",
        recommended_sampling={"temperature": 0.8, "top_k": 50, "top_p": 0.95},
    ),
    CatalogueEntry(
        hub_id="microsoft/Phi-4-reasoning-plus",
        description="14.7B, 32K context: as Phi-4-reasoning, with longer and better thoughts.",
        shape=_phi4(32768),
        reasoning_parser="deepseek_r1",
        recommended_sampling={"temperature": 0.8, "top_k": 50, "top_p": 0.95},
        quantized={"amd/Phi-4-reasoning-plus-w4a16-llmcompressor-v0.12.0": "w4a16"},
    ),
    CatalogueEntry(
        hub_id="microsoft/Phi-4-mini-instruct",
        description="3.8B, 128K context: multilingual chat and function calls.",
        shape=_PHI4_MINI,
        tool_call_parser="phi4_mini_json",
        quantized={"RedHatAI/Phi-4-mini-instruct-FP8-dynamic": "fp8"},
    ),
    CatalogueEntry(
        hub_id="microsoft/Phi-4-mini-reasoning",
        description="3.8B, 128K context: mathematics, thinks in <think> before it answers.",
        shape=_PHI4_MINI,
        reasoning_parser="deepseek_r1",
        recommended_sampling={"temperature": 0.8, "top_p": 0.95},
    ),
    CatalogueEntry(
        hub_id="microsoft/Phi-4-multimodal-instruct",
        description="5.6B, 128K context: text, images and speech around Phi-4-mini's decoder.",
        shape=_PHI4_MINI,
        # The hub gives 5.57B in all, to three digits.
        extra_parameters=5_570_000_000 - _PHI4_MINI.parameters,
    ),
)


def find_model(name: str) -> CatalogueEntry | None:
    """Look a model up by hub id or bare name, of the original or a quantized checkpoint.

    Case does not matter, as on the hub. Names of folders and buckets are not looked up.
    """
    wanted = name.casefold()
    for entry in CATALOGUE:
        for hub_id in (entry.hub_id, *entry.quantized):
            if wanted in (hub_id.casefold(), hub_id.rpartition("/")[2].casefold()):
                return entry
    return None


def shape_of(model: str) -> ModelShape | None:
    """The shape of a local folder's checkpoint (its `config.json`), else the catalogue's.

    Raises:
        ConfigError: the folder's `config.json` is unreadable or of another architecture.
    """
    config = _local_config(model)
    if config is not None:
        return ModelShape.from_hf_config(config)
    entry = find_model(model)
    return entry.shape if entry else None


def weight_scheme(model: str, quantization: str | None = None) -> WeightScheme:
    """How a checkpoint's linear layers lie on the GPU, as far as can be told without loading it.

    A checkpoint that is quantized already decides (a local folder's `quantization_config`, or the
    catalogue's word); for any other, vLLM's argument `quantization`. Otherwise bf16.

    Raises:
        ConfigError: the quantization method is none that memory can be planned for.
    """
    config = _local_config(model) or {}
    settings = config.get("quantization_config")
    if isinstance(settings, Mapping):
        return _scheme(str(settings.get("quant_method")), settings)
    entry = find_model(model)
    if entry is not None:
        for hub_id, scheme in entry.quantized.items():
            if model.casefold() in (hub_id.casefold(), hub_id.rpartition("/")[2].casefold()):
                return scheme
    return _scheme(quantization, {}) if quantization else "bf16"


def _scheme(method: str, settings: Mapping[str, Any]) -> WeightScheme:
    if method == "compressed-tensors":
        groups = settings.get("config_groups")
        for group in groups.values() if isinstance(groups, Mapping) else ():
            match group:
                case {"weights": {"num_bits": 4, "type": "int"}}:
                    return "w4a16"
                case {"weights": {"num_bits": 8, "type": "int"}}:
                    return "w8a8"
                case {"weights": {"num_bits": 8, "type": "float"}}:
                    return "fp8"
    elif method in _SCHEME_OF_METHOD and settings.get("bits", 4) == 4:
        return _SCHEME_OF_METHOD[method]
    raise ConfigError(
        f"memory cannot be planned for quantization {method!r} {dict(settings)}: known are "
        f"{', '.join(sorted(_SCHEME_OF_METHOD))} (4 bits where it has bits), "
        "and compressed-tensors with weights of fp8, int8 or int4"
    )


def _local_config(model: str) -> Mapping[str, Any] | None:
    path = Path(model) / "config.json"
    if not path.is_file():
        return None
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(config, dict):
        raise ConfigError(f"{path} must hold a JSON object")
    return config
