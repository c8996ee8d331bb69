"""Measure a model on lm-eval's tasks, or two side by side, with a paired test and a verdict.

    ray job submit --working-dir . -- python jobs/evaluate.py --recipe phi4-bf16-h200 \\
        --against s3://bucket/phi-4-fp8/ --tasks gsm8k mmlu --output s3://bucket/evaluation/

The models answer as batch jobs on Ray, or by an OpenAI endpoint with --base-url; its key is the
environment variable OPENAI_API_KEY. Run the same command again after any failure: batches go on
from their finished parts.
"""

import argparse
import contextlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # when run as a script

from cluster.batch import RayExecutor, logs_wanted
from cluster.local import connected
from jobs.flags import (
    ENGINE_FLAGS,
    Flags,
    add_fields,
    engine_layer,
    file_layer,
    interrupted,
    local_model,
    new_console,
    new_parser,
    pairs,
    told,
)
from phi4ray.config import EngineConfig, validated
from phi4ray.errors import Phi4rayError
from phi4ray.recipes import find_recipe
from phi4ray.train.evaluate import EvaluateConfig, evaluate
from phi4ray.train.tables import render

EXIT_CODES = """\
exit codes: 0 measured, and within the bound if compared, 3 the loss is above the bound,
            4 undecided: more samples are needed, 1 failed, 2 bad arguments,
            130 interrupted"""

FLAGS: Flags = {
    "against": str,
    "base_url": str,
    "against_url": str,
    "output": str,
    "limit": int,
    "num_fewshot": int,
    "bound_points": float,
    "confidence": float,
    "seed": int,
    "concurrency": int,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the evaluation that the arguments describe; returns the process's exit code."""
    arguments = parser().parse_args(argv)
    console = new_console()
    try:
        config = configuration(arguments)
        with contextlib.nullcontext() if config.base_url else connected(worker_logs=logs_wanted()):
            report = evaluate(
                config,
                None if config.base_url else RayExecutor(console),
                console,
                api_key=os.environ.get("OPENAI_API_KEY", "none"),
            )
    except Phi4rayError as error:
        return told(error)
    except KeyboardInterrupt:
        return interrupted("run again, batches go on from their finished parts")
    print(render(report), end="")
    return {"fail": 3, "undecided": 4}.get(report.verdict or "", 0)


def parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    described, _, example = (__doc__ or "").partition("\n\n")
    result = new_parser("evaluate.py", described, f"{example}\n{EXIT_CODES}")
    add = result.add_argument
    add(
        "--tasks",
        nargs="+",
        action="extend",
        metavar="TASK",
        help="gsm8k, mmlu, simple-evals, or any task of lm-eval [gsm8k]",
    )
    add(
        "--data",
        nargs="+",
        action="extend",
        metavar="TASK=FILE",
        default=[],
        help="a local .jsonl or .parquet in place of the hub's data, with its columns; s3:// too",
    )
    add(
        "--against-engine",
        nargs="+",
        action="extend",
        metavar="KEY=VALUE",
        default=[],
        help="engine settings of the other model alone, as kv_cache_dtype=fp8",
    )
    add("--apply-chat-template", action="store_true", help="ask in chats")
    add(
        "--confirm-run-unsafe-code",
        action="store_true",
        help="let code that a model wrote run here, as HumanEval does",
    )
    add_fields(result, "evaluation", FLAGS, EvaluateConfig)
    add_fields(result, "engine", ENGINE_FLAGS, EngineConfig)
    return result


def configuration(arguments: argparse.Namespace) -> EvaluateConfig:
    """Merge recipe, YAML file and flags, each winning over the one before.

    Raises:
        ConfigError: names every field that is wrong or missing.
    """
    given = vars(arguments)
    names = (*FLAGS, "tasks", "apply_chat_template", "confirm_run_unsafe_code")
    flags: dict[str, Any] = {name: given[name] for name in names if name in given}
    flags["engine"] = engine_layer(arguments)
    for name in ("data", "against_engine"):
        if given[name]:
            flags[name] = pairs(f"--{name.replace('_', '-')}", given[name])
    recipe = find_recipe(arguments.recipe).settings if arguments.recipe else {}
    layers = ({"engine": recipe.get("engine", {})}, file_layer(arguments.config), flags)
    config = validated(EvaluateConfig, *layers)
    update: dict[str, Any] = {"engine": local_model(config.engine)}
    if config.against is not None and Path(config.against).is_dir():  # workers have another folder
        update["against"] = str(Path(config.against).resolve())
    return config.model_copy(update=update)


if __name__ == "__main__":
    sys.exit(main())
