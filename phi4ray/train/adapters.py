"""LoRA adapters: put beside a model's weights to be trained, and added into them afterwards.

The one importer of peft; imported only by workers that train.
"""

from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model

from phi4ray.errors import ConfigError
from phi4ray.train.config import LoraSettings

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


def add_adapters(model: Any, settings: LoraSettings, base: str) -> Any:
    """A model whose own weights are frozen, with adapters that train. `base` is the model's name.

    Raises:
        ConfigError: the model has none of the target modules.
    """
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=list(settings.target_modules),
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
    )
    try:
        adapted = get_peft_model(model, config)
    except ValueError as error:
        raise ConfigError(f"lora.target_modules do not fit this model: {error}") from error
    adapted.peft_config["default"].base_model_name_or_path = base
    return adapted


def merge_adapters(model: Any, checkpoint: Path) -> Any:
    """The model with the adapters of a checkpoint added into its weights."""
    return PeftModel.from_pretrained(model, checkpoint).merge_and_unload()
