"""Fine-tune Phi-4 on chats, with LoRA or in full, to a checkpoint that vLLM serves.

    ray job submit --working-dir . -- python jobs/finetune.py \\
        --input s3://bucket/chats/ --output s3://bucket/tuned/ --model microsoft/phi-4
    python jobs/serve.py --recipe phi4-fp8-h200 --model s3://bucket/tuned/model/

Run the same command again after any failure: training goes on from the last whole checkpoint.
Endpoint and credentials of the object store come from the usual AWS variables.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # when run as a script

from cluster.local import connected
from cluster.train import RayHost
from jobs.flags import (
    Flags,
    add_config,
    add_fields,
    bare_parser,
    file_layer,
    interrupted,
    new_console,
    pairs,
    told,
)
from phi4ray.config import validated
from phi4ray.errors import Phi4rayError
from phi4ray.storage import normal
from phi4ray.train.config import FinetuneConfig, LoraSettings
from phi4ray.train.finetune import finetune

EXIT_CODES = "exit codes: 0 the model is there, 1 failed, 2 bad arguments, 130 interrupted"

FLAGS: Flags = {
    "model": str,
    "method": str,
    "learning_rate": float,
    "lr_scheduler_type": str,
    "warmup_fraction": float,
    "weight_decay": float,
    "adam_beta2": float,
    "epochs": float,
    "max_steps": int,
    "per_device_batch_size": int,
    "gradient_accumulation_steps": int,
    "max_length_tokens": int,
    "dtype": str,
    "pad_token": str,
    "seed": int,
    "checkpoint_every_steps": int,
    "logging_steps": int,
    "num_workers": int,
    "gpus_per_worker": float,
    "cpus_per_worker": float,
    "max_error_fraction": float,
}
LORA_FLAGS: Flags = {"rank": int, "alpha": float, "dropout": float}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job that the arguments describe; returns the process's exit code."""
    arguments = parser().parse_args(argv)
    console = new_console()
    try:
        config = configuration(arguments)
        with connected(worker_logs=False):  # Ray Train tells of its every step
            summary = finetune(config, RayHost(), console)
    except Phi4rayError as error:
        return told(error)
    except KeyboardInterrupt:
        return interrupted("the same command goes on from the last whole checkpoint")
    console.print(f"loss {summary.points[0].loss:.4f} → {summary.points[-1].loss:.4f}")
    console.print(f"the model: {summary.model}\nthe report: {summary.report}")
    return 0


def parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    described, _, example = (__doc__ or "").partition("\n\n")
    result = bare_parser("finetune.py", described, f"{example}\n{EXIT_CODES}")
    add_config(result)
    add = result.add_argument
    add(
        "--input",
        nargs="+",
        action="extend",
        metavar="URI",
        help="files, globs and prefixes of .csv, .jsonl (also .gz, .zst) and .parquet",
    )
    add("--output", metavar="URI", help="prefix that will hold this one fine-tune")
    add(
        "--no-gradient-checkpointing",
        dest="gradient_checkpointing",
        action="store_false",
        help="keep activations: more memory, a third faster",
    )
    add(
        "--training-arg",
        nargs="+",
        action="extend",
        metavar="KEY=VALUE",
        default=[],
        help="any other of transformers' TrainingArguments, as fsdp=true",
    )
    add_fields(result, "fine-tune", FLAGS, FinetuneConfig)
    add_fields(result, "LoRA", LORA_FLAGS, LoraSettings)
    return result


def configuration(arguments: argparse.Namespace) -> FinetuneConfig:
    """Merge the YAML file and flags, which win.

    Raises:
        ConfigError: names every field that is wrong or missing.
    """
    given = vars(arguments)
    names = (*FLAGS, "input", "output", "gradient_checkpointing")
    flags = {name: given[name] for name in names if name in given}
    flags["lora"] = {name: given[name] for name in LORA_FLAGS if name in given}
    flags["training_args"] = pairs("--training-arg", arguments.training_arg)
    config = validated(FinetuneConfig, file_layer(arguments.config), flags)
    # Workers have another folder.
    update = {"output": normal(config.output)}
    if (model := Path(config.model)).is_dir():
        update["model"] = str(model.resolve())
    return config.model_copy(update=update)


if __name__ == "__main__":
    sys.exit(main())
