"""One worker of a fine-tune: transformers' Trainer, from the newest whole checkpoint to the model.

The one importer of transformers' Trainer; imported only by workers that train. Several workers
find each other by torch's usual variables (RANK, WORLD_SIZE, …), which Ray Train sets.
"""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import PrinterCallback
from transformers.utils.logging import disable_progress_bar

from phi4ray.engines import on_this_machine
from phi4ray.errors import ConfigError
from phi4ray.storage import join, storage_for, upload_tree
from phi4ray.train.adapters import ADAPTER_FILES, add_adapters, merge_adapters
from phi4ray.train.checkpoints import last_checkpoint, prune, seal, upload
from phi4ray.train.config import FinetuneConfig
from phi4ray.train.curve import HISTORY_NAME, Point, encode_history
from phi4ray.train.divergence import broken_weights, check_point, has_numbers
from phi4ray.train.masking import IGNORED
from phi4ray.train.tokenizer import load_tokenizer
from phi4ray.train.tokens import read_tokens

MODEL, ADAPTER = "model/", "adapter/"
MAX_SHARD = "5GB"


def train(config: FinetuneConfig, report: Callable[[Point], None]) -> None:
    """Train to the end, then write the model, the adapter and the loss curve.

    `report` takes each point of the loss curve; to stop the run, it raises.

    Raises:
        ConfigError: the model or an argument does not fit.
        DivergedError: the loss or the weights are no numbers any more.
        StorageError: the store refuses a checkpoint or the model.
    """
    disable_progress_bar()
    base = on_this_machine(config.model)
    tokenizer = load_tokenizer(base, config.pad_token)
    with tempfile.TemporaryDirectory(prefix="phi4ray-train-") as name:
        folder = Path(name)
        found = last_checkpoint(config.output)
        checkpoint = found.download(folder) if found else None
        if checkpoint is None or not _finished(checkpoint):
            checkpoint = _fit(config, base, tokenizer, folder, checkpoint, report)
        if PartialState().is_main_process:
            _publish(config, base, tokenizer, checkpoint, folder / "model")


def _fit(
    config: FinetuneConfig,
    base: str,
    tokenizer: Any,
    folder: Path,
    checkpoint: Path | None,
    report: Callable[[Point], None],
) -> Path:
    """Run the Trainer; gives its last checkpoint."""
    arguments = training_arguments(config, folder)
    set_seed(config.seed)
    model = _load_model(config, base)
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=read_tokens(config.output),
        data_collator=Collator(tokenizer.pad_token_id),
        processing_class=tokenizer,
        callbacks=[_Reporter(report), _Uploader(config)],
    )
    trainer.remove_callback(PrinterCallback)  # the driver shows the points
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    return folder / f"checkpoint-{trainer.state.global_step}"


def training_arguments(config: FinetuneConfig, folder: Path) -> TrainingArguments:
    """The configuration as transformers has it.

    Raises:
        ConfigError: transformers refuses it.
    """
    given: dict[str, Any] = {
        "output_dir": str(folder),
        "learning_rate": config.learning_rate,
        "lr_scheduler_type": config.lr_scheduler_type,
        "warmup_steps": config.warmup_fraction,
        "weight_decay": config.weight_decay,
        "adam_beta2": config.adam_beta2,
        "max_grad_norm": config.max_grad_norm,
        "num_train_epochs": config.epochs,
        "max_steps": config.max_steps or -1,
        "per_device_train_batch_size": config.per_device_batch_size,
        "gradient_accumulation_steps": config.gradient_accumulation_steps,
        "gradient_checkpointing": config.gradient_checkpointing,
        "bf16": config.dtype == "bfloat16",
        "seed": config.seed,
        "save_strategy": "steps",
        "save_steps": config.checkpoint_every_steps,
        "save_total_limit": 1,
        "logging_strategy": "steps",
        "logging_first_step": True,
        "logging_steps": config.logging_steps,
        "logging_nan_inf_filter": False,  # it would tell an earlier loss in NaN's place
        "include_num_input_tokens_seen": "non_padding",
        "use_cpu": config.gpus_per_worker == 0,
        "report_to": "none",
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "ddp_find_unused_parameters": False,
        **config.training_args,
    }
    if config.gradient_checkpointing:
        given.setdefault("gradient_checkpointing_kwargs", {"use_reentrant": False})
    try:
        return TrainingArguments(**given)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"transformers refuses the training arguments: {error}") from error


def _load_model(config: FinetuneConfig, base: str) -> Any:
    """Frozen weights are kept as they are computed with; weights that learn, in 32 bits."""
    frozen = config.method == "lora"
    dtype = getattr(torch, config.dtype) if frozen else torch.float32
    model = _from_pretrained(base, dtype)
    model.config.use_cache = False
    return add_adapters(model, config.lora, config.model) if frozen else model


def _from_pretrained(folder: Path | str, dtype: Any) -> Any:
    try:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    except (OSError, ValueError) as error:
        raise ConfigError(f"the model cannot be loaded from {folder}: {error}") from error


class Collator:
    """Rows to tensors `[batch, longest row]`, padded on the right: ids, attention mask, labels."""

    def __init__(self, pad_token_id: int) -> None:
        self._pad_token_id = pad_token_id

    def __call__(self, rows: Sequence[Mapping[str, list[int]]]) -> dict[str, torch.Tensor]:
        """Make a batch."""
        ids = [torch.tensor(row["input_ids"]) for row in rows]
        labels = [torch.tensor(row["labels"]) for row in rows]
        masks = [torch.ones_like(row) for row in ids]
        return {
            "input_ids": pad_sequence(ids, True, self._pad_token_id),
            "attention_mask": pad_sequence(masks, True, 0),
            "labels": pad_sequence(labels, True, IGNORED),
        }


class _Reporter(TrainerCallback):
    """Passes points of the loss curve on, as long as they are numbers."""

    def __init__(self, report: Callable[[Point], None]) -> None:
        self._report = report

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if logs and "loss" in logs:
            point = Point.of_log(state.log_history[-1], state.max_steps)
            check_point(point)  # in every worker, for all have the same: none waits for another
            if state.is_world_process_zero:
                self._report(point)


class _Uploader(TrainerCallback):
    """Takes every checkpoint to the output prefix as soon as the Trainer has written it."""

    def __init__(self, config: FinetuneConfig) -> None:
        self._config = config

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        output, step = self._config.output, state.global_step
        folder = Path(args.output_dir) / f"checkpoint-{step}"
        everyone = PartialState()
        # One worker has the weights, and all end if they are broken. Between two points of the
        # curve nobody has looked at a loss or norm.
        if not all(gather_object([has_numbers(folder)])):
            raise broken_weights(step)
        upload(output, step, folder)
        everyone.wait_for_everyone()
        if state.is_world_process_zero:
            seal(output, step)
            prune(output, self._config.checkpoints_kept)
        everyone.wait_for_everyone()


def _finished(checkpoint: Path) -> bool:
    state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
    return state.global_step >= state.max_steps


def _publish(
    config: FinetuneConfig, base: str, tokenizer: Any, checkpoint: Path, folder: Path
) -> None:
    """Write what the run was for. Weights have the base checkpoint's type again."""
    state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
    if config.method == "lora":
        model = merge_adapters(_from_pretrained(base, "auto"), checkpoint)
    else:
        model = _from_pretrained(checkpoint, AutoConfig.from_pretrained(base).dtype)
    model.config.use_cache = True
    model.config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder, max_shard_size=MAX_SHARD)
    tokenizer.save_pretrained(folder)
    if not has_numbers(folder):
        raise broken_weights(state.global_step)
    if config.method == "lora":
        for name in ADAPTER_FILES:
            uri = join(config.output, f"{ADAPTER}{name}")
            storage_for(uri).write_file(uri, checkpoint / name)
    upload_tree(folder, join(config.output, MODEL))
    points = [Point.of_log(log, state.max_steps) for log in state.log_history if "loss" in log]
    uri = join(config.output, HISTORY_NAME)
    storage_for(uri).write(uri, encode_history(points))
