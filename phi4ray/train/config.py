"""Configuration of a fine-tune: frozen, and closed to unknown keys.

Names are those of transformers' `TrainingArguments` and peft's `LoraConfig` where they have one.
"""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, model_validator

from phi4ray.config import Config


class LoraSettings(Config):
    """Low-rank adapters beside frozen weights: https://arxiv.org/abs/2106.09685."""

    rank: int = Field(16, ge=1, description="Rank of the update of each matrix")
    alpha: float = Field(32.0, gt=0, description="The update is scaled by alpha / rank")
    dropout: float = Field(0.0, ge=0, lt=1, description="Of what goes into the adapters")
    target_modules: tuple[str, ...] = Field(
        ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"),
        min_length=1,
        description="All linear layers of Phi3ForCausalLM's blocks",
    )


class FinetuneConfig(Config):
    """One fine-tune: which chats, which model, how, and where everything goes."""

    input: tuple[str, ...] = Field(min_length=1, description="Files, globs, prefixes; s3:// too")
    output: str = Field(min_length=1, description="Prefix that will hold this one fine-tune")
    model: str = Field(description="Hub name, local folder or s3:// folder of the checkpoint")
    method: Literal["lora", "full"] = Field("lora", description="What learns: lora or full")
    lora: LoraSettings = LoraSettings()
    learning_rate: float = Field(2e-4, gt=0, description="Highest, after the warm-up")
    lr_scheduler_type: Literal["linear", "cosine", "constant_with_warmup"] = Field(
        "linear", description="linear, cosine or constant_with_warmup"
    )
    warmup_fraction: float = Field(0.03, ge=0, lt=1, description="Of the steps, rising linearly")
    weight_decay: float = Field(0.0, ge=0, description="Of AdamW")
    adam_beta2: float = Field(0.999, gt=0, lt=1, description="Of AdamW")
    max_grad_norm: float = Field(1.0, gt=0, description="Longer gradients are cut")
    epochs: float = Field(1.0, gt=0, description="Passes over the chats, unless max_steps is set")
    max_steps: int | None = Field(None, ge=1, description="Optimizer steps; wins over epochs")
    per_device_batch_size: int = Field(1, ge=1, description="Chats a device takes at once")
    gradient_accumulation_steps: int = Field(8, ge=1, description="Such batches to a step")
    max_length_tokens: int = Field(4096, ge=2, description="Longer chats are refused, not cut")
    gradient_checkpointing: bool = Field(
        True, description="Compute activations again and not keep them: less memory, a third slower"
    )
    dtype: Literal["bfloat16", "float32"] = Field(
        "bfloat16", description="Of the computation; of the frozen weights too with LoRA"
    )
    pad_token: str | None = Field(
        None, description="None: the tokenizer's own if it differs from the end token, else a spare"
    )
    seed: int = Field(0, description="Of adapters, order and dropout")
    checkpoint_every_steps: int = Field(100, ge=1, description="What a kill costs at most")
    checkpoints_kept: int = Field(2, ge=1, description="Older ones are deleted")
    logging_steps: int = Field(5, ge=1, description="Steps between points of the loss curve")
    num_workers: int = Field(1, ge=1, description="Ray Train workers: one a GPU")
    gpus_per_worker: float = Field(1.0, ge=0, description="0 trains on the CPU")
    cpus_per_worker: float = Field(1.0, gt=0, description="CPUs Ray reserves a worker")
    max_failures: int = Field(3, ge=0, description="Lost workers before the run gives up")
    max_error_fraction: float = Field(
        0.0, ge=0, le=1, description="Rows that may be refused; they are left out and reported"
    )
    training_args: Mapping[str, Any] = Field(
        default_factory=dict,
        description="Any other of transformers' TrainingArguments, such as fsdp and fsdp_config",
    )

    @model_validator(mode="after")
    def _check(self) -> "FinetuneConfig":
        if taken := sorted(OWN_ARGUMENTS & self.training_args.keys()):
            raise ValueError(f"training_args cannot set {', '.join(taken)}: a field of ours does")
        fsdp = self.training_args.get("fsdp_config") or {}
        if isinstance(fsdp, Mapping) and fsdp.get("state_dict_type", WHOLE) != WHOLE:
            raise ValueError(f"fsdp_config.state_dict_type is {WHOLE}: the model is made of it")
        if self.training_args.get("fsdp") and not (self.num_workers > 1 and self.gpus_per_worker):
            # Accelerate would ignore it, and train copies of the whole model.
            raise ValueError(
                "fsdp splits a model over GPUs: give num_workers=2 or more, a GPU each"
            )
        return self


WHOLE = "FULL_STATE_DICT"
"""FSDP's way to save weights that are no shards."""

OWN_ARGUMENTS = frozenset(
    {
        *("output_dir", "learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay"),
        *("adam_beta2", "max_grad_norm", "num_train_epochs", "max_steps"),
        *("per_device_train_batch_size", "gradient_accumulation_steps", "gradient_checkpointing"),
        *("bf16", "seed", "save_strategy", "save_steps", "save_total_limit", "save_only_model"),
        *(
            "logging_strategy",
            "logging_first_step",
            "logging_steps",
            "logging_nan_inf_filter",
            "use_cpu",
            "report_to",
            "disable_tqdm",
        ),
        *("remove_unused_columns", "resume_from_checkpoint"),
    }
)
"""What transformers' TrainingArguments are given from the fields above, or must be as they are."""
