"""The Phi-4 family: names, shapes, contexts, quantized checkpoints, recommended sampling.

Figures are of the model cards and `config.json` files on the Hugging Face hub.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

from phi4ray.errors import ConfigError, ObjectNotFoundError, StorageError
from phi4ray.shapes import ModelShape
from phi4ray.storage import join, storage_for

CONFIG_NAME = "config.json"

WeightScheme = Literal["bf16", "fp8", "w8a8", "w4a16"]
"""How linear layers are stored; embeddings, lm_head and norms stay bf16 in all of them."""

_SCHEME_OF_METHOD: Mapping[str, WeightScheme] = {
    "fp8": "fp8",
    "fbgemm_fp8": "fp8",
    "ptpc_fp8": "fp8",
    "gptq": "w4a16",
    "gptq_marlin": "w4a16",
    "awq": "w4a16",
    "awq_marlin": "w4a16",
    "auto-round": "w4a16",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class CatalogueEntry:
    """One model of the family.

    `chat_format` is what the checkpoint's own template writes around a message; vLLM needs no
    other, but for tools where `tool_chat_template` names one of vLLM's `examples/`: the
    checkpoint's has no branch for tool calls and their results. `reasoning_parser` and
    `tool_call_parser` are vLLM's arguments. `recommended_sampling` holds OpenAI request parameters
    (and vLLM's `top_k`) as the model card recommends or uses them; empty where it says nothing.

    `encoder_parameters` are of the encoders beside the decoder, which vLLM always loads;
    `lora_parameters` of adapters in the checkpoint, which it loads with `enable_lora` alone.
    `quantized` maps hub ids of quantized checkpoints to how they store the decoder's weights.
    """

    hub_id: str
    description: str
    shape: ModelShape
    chat_format: str
    license: str = "MIT"
    reasoning_parser: str | None = None
    tool_call_parser: str | None = None
    tool_chat_template: str | None = None
    recommended_sampling: Mapping[str, float] = field(default_factory=dict)
    encoder_parameters: int = 0
    lora_parameters: int = 0
    quantized: Mapping[str, WeightScheme] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The hub id without its owner."""
        return self.hub_id.rpartition("/")[2]

    @property
    def parameters(self) -> int:
        """Of the whole checkpoint: decoder, encoders and adapters."""
        return self.shape.parameters + self.encoder_parameters + self.lora_parameters


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

# Rank 256 for images and 320 for speech, on the four projections of every layer: the files beside
# the model, 738 and 923 MB in bf16, are this many.
_PHI4_MULTIMODAL_LORA = (
    (256 + 320) * 32 * ((3072 + 40 * 128) + (3072 + 3072) + (3072 + 2 * 8192) + (8192 + 3072))
)

_PHI4_CHAT = "<|im_start|>{role}<|im_sep|>{content}<|im_end|>"
_PHI4_REASONING_CHAT = f"{_PHI4_CHAT}, after a long system message that the template always puts"
_PHI4_MINI_CHAT = "<|{role}|>{content}<|end|>"
_REASONING_SAMPLING = {"temperature": 0.8, "top_k": 50, "top_p": 0.95}

CATALOGUE: tuple[CatalogueEntry, ...] = (
    CatalogueEntry(
        hub_id="microsoft/phi-4",
        description="14.7B, 16K context: chat, reasoning and code in English.",
        shape=_phi4(16384),
        chat_format=_PHI4_CHAT,
        quantized={
            "RedHatAI/phi-4-FP8-dynamic": "fp8",
            "RedHatAI/phi-4-quantized.w8a8": "w8a8",
            "RedHatAI/phi-4-quantized.w4a16": "w4a16",
            "kaitchup/Phi-4-AutoRound-GPTQ-4bit": "w4a16",
            "stelterlab/phi-4-AWQ": "w4a16",
        },
    ),
    CatalogueEntry(
        hub_id="microsoft/Phi-4-reasoning",
        description="14.7B, 32K context: thinks in <think> before it answers; never greedy.",
        shape=_phi4(32768),
        chat_format=_PHI4_REASONING_CHAT,
        reasoning_parser="deepseek_r1",
        recommended_sampling=_REASONING_SAMPLING,
        quantized={"RedHatAI/Phi-4-reasoning-FP8-dynamic": "fp8"},
    ),
    CatalogueEntry(
        hub_id="microsoft/Phi-4-reasoning-plus",
        description="14.7B, 32K context: as Phi-4-reasoning, with longer and better thoughts.",
        shape=_phi4(32768),
        chat_format=_PHI4_REASONING_CHAT,
        reasoning_parser="deepseek_r1",
        recommended_sampling=_REASONING_SAMPLING,
        quantized={
            "nvidia/Phi-4-reasoning-plus-FP8": "fp8",
            "amd/Phi-4-reasoning-plus-w4a16-llmcompressor-v0.12.0": "w4a16",
        },
    ),
    CatalogueEntry(
        hub_id="microsoft/Phi-4-mini-instruct",
        description="3.8B, 128K context: multilingual chat and function calls.",
        shape=_PHI4_MINI,
        chat_format=_PHI4_MINI_CHAT,
        tool_call_parser="phi4_mini_json",
        tool_chat_template="tool_chat_template_phi4_mini.jinja",
        recommended_sampling={"temperature": 0.0},
        quantized={
            "RedHatAI/Phi-4-mini-instruct-FP8-dynamic": "fp8",
            "RedHatAI/Phi-4-mini-instruct-quantized.w8a8": "w8a8",
        },
    ),
    CatalogueEntry(
        hub_id="microsoft/Phi-4-mini-reasoning",
        description="3.8B, 128K context: mathematics, thinks in <think> before it answers.",
        shape=_PHI4_MINI,
        chat_format=_PHI4_MINI_CHAT,
        reasoning_parser="deepseek_r1",
        recommended_sampling={"temperature": 0.8, "top_p": 0.95},
    ),
    CatalogueEntry(
        hub_id="microsoft/Phi-4-multimodal-instruct",
        description="5.6B, 128K context: text, images and speech around Phi-4-mini's decoder.",
        shape=_PHI4_MINI,
        chat_format=f"{_PHI4_MINI_CHAT}, with <|image_1|>, <|audio_1|>, … in the content",
        # The hub gives 5.57B in all, to three digits.
        encoder_parameters=5_570_000_000 - _PHI4_MINI.parameters - _PHI4_MULTIMODAL_LORA,
        lora_parameters=_PHI4_MULTIMODAL_LORA,
        quantized={"nvidia/Phi-4-multimodal-instruct-FP8": "fp8"},
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
    """The shape by a checkpoint's `config.json` (see `_config_of`), else the catalogue's.

    Raises:
        ConfigError: the `config.json` is unreadable or of another architecture.
    """
    config = _config_of(model)
    if config is not None:
        return ModelShape.from_hf_config(config)
    entry = find_model(model)
    return entry.shape if entry else None


def extra_parameters_of(model: str, enable_lora: bool = False) -> int:
    """What vLLM loads beside the decoder: encoders, and adapters if it is told to.

    A checkpoint of the multimodal architecture has those of the published model.

    Raises:
        ConfigError: its `config.json` is unreadable.
    """
    config = _config_of(model)
    if config is not None:
        is_multimodal = config.get("model_type") == "phi4mm"
        entry = find_model("microsoft/Phi-4-multimodal-instruct") if is_multimodal else None
    else:
        entry = find_model(model)
    if entry is None:
        return 0
    return entry.encoder_parameters + (entry.lora_parameters if enable_lora else 0)


def weight_scheme(model: str, quantization: str | None = None) -> WeightScheme:
    """How a checkpoint's linear layers lie on the GPU, as far as can be told without loading it.

    A checkpoint that is quantized already decides (its `quantization_config`, or the catalogue's
    word); for any other, vLLM's argument `quantization`. Otherwise bf16.

    Raises:
        ConfigError: the quantization method is none that memory can be planned for.
    """
    config = _config_of(model) or {}
    settings = config.get("quantization_config")
    if isinstance(settings, Mapping):
        return scheme_of(str(settings.get("quant_method")), settings)
    entry = find_model(model)
    if entry is not None:
        for hub_id, scheme in entry.quantized.items():
            if model.casefold() in (hub_id.casefold(), hub_id.rpartition("/")[2].casefold()):
                return scheme
    return scheme_of(quantization, {}) if quantization else "bf16"


def scheme_of(method: str, settings: Mapping[str, Any]) -> WeightScheme:
    """How vLLM's quantization `method` stores weights; `settings` is a `quantization_config`.

    Raises:
        ConfigError: memory cannot be planned for it.
    """
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
    elif method == "modelopt" and settings.get("quant_algo") == "FP8":
        return "fp8"
    elif method in _SCHEME_OF_METHOD and settings.get("bits", 4) == 4:
        return _SCHEME_OF_METHOD[method]
    raise ConfigError(
        f"memory cannot be planned for quantization {method!r} {dict(settings)}: known are "
        f"{', '.join(sorted(_SCHEME_OF_METHOD))} (4 bits where it has bits), "
        "modelopt with FP8, and compressed-tensors with weights of fp8, int8 or int4"
    )


def _config_of(model: str) -> Mapping[str, Any] | None:
    """The `config.json` of a local folder, of a folder in s3://, or of the hub's copy here.

    None where there is none; models of the catalogue are not looked up on the hub.
    """
    try:
        if model.startswith("s3://"):
            uri = join(model, CONFIG_NAME)
            text = storage_for(uri).read(uri)
        elif (path := Path(model) / CONFIG_NAME).is_file():
            uri, text = str(path), path.read_bytes()
        elif find_model(model) is None and (cached := _cached(model)) is not None:
            uri, text = cached, Path(cached).read_bytes()
        else:
            return None
    except ObjectNotFoundError:
        return None
    except (OSError, StorageError) as error:
        raise ConfigError(f"{uri} cannot be read: {error}") from error
    try:
        config = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{uri} cannot be read as JSON: {error}") from error
    if not isinstance(config, dict):
        raise ConfigError(f"{uri} must hold a JSON object")
    return config


def _cached(model: str) -> str | None:
    """Where the hub's own cache on this machine has a model's `config.json`."""
    try:
        found = try_to_load_from_cache(model, CONFIG_NAME)
    except HFValidationError:  # it is no name of the hub
        return None
    return found if isinstance(found, str) else None
