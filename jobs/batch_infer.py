"""Answer every prompt of many files: S3 to S3, exactly once, whatever dies on the way.

    ray job submit --working-dir . -- python jobs/batch_infer.py \\
        --input s3://bucket/prompts/ --output s3://bucket/answers/ --recipe phi4-fp8-h200

Run the same command again after any failure: finished parts are kept, the rest is answered.
Endpoint and credentials of the object store come from the usual AWS variables.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # when run as a script

from cluster.batch import RayExecutor, logs_wanted
from cluster.gpus import cluster_gpus
from cluster.harvest import Board
from cluster.local import connected
from cluster.metrics import JobMetrics
from jobs.flags import (
    ENGINE_FLAGS,
    Flags,
    add_fields,
    add_gpu,
    cards_of,
    engine_layer,
    file_layer,
    interrupted,
    local_model,
    new_console,
    new_parser,
    pairs,
    told,
)
from phi4ray.batch.describe import describe_plan
from phi4ray.batch.executor import Executor
from phi4ray.batch.planning import chat_template_text, obtain_plan
from phi4ray.batch.run import run_batch
from phi4ray.batch.summary import print_summary
from phi4ray.config import BatchConfig, Endpoint, EngineConfig, OutputFormat, batch_config
from phi4ray.errors import ConfigError, Phi4rayError
from phi4ray.fit import refuse_misfit
from phi4ray.recipes import find_recipe
from phi4ray.storage import normal

EXIT_CODES = """\
exit codes: 0 all rows answered, 3 finished with error rows, 1 failed, 2 bad arguments,
130 interrupted"""

JOB_FLAGS: Flags = {
    "limit": int,
    "shard_rows": int,
    "shard_mib": float,
    "max_row_mib": float,
    "max_columns": int,
    "min_replicas": int,
    "max_replicas": int,
    "shards_in_flight": int,
    "max_attempts": int,
    "request_timeout_s": float,
    "max_error_fraction": float,
    "gpu_hour_price": float,
    "progress_interval_s": float,
    "system_prompt": str,
    "weight": float,
    "priority": int,
}


SERVICE_REPLICAS = ("min_replicas", "max_replicas")
"""What a service decides for the jobs on it."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job that the arguments describe; returns the process's exit code."""
    arguments = parser().parse_args(argv)
    console = new_console()
    try:
        config = configuration(arguments)
        with connected(worker_logs=logs_wanted()):
            executor: Executor = RayExecutor(console)
            if arguments.serve:
                board = Board(arguments.serve)
                executor = board.executor(executor, say=console.print)
                engine = on_service(config.engine, board.engine(), arguments.serve)
                config = config.model_copy(update={"engine": engine})
            planned_for = cards_of(arguments, cluster_gpus())
            if not arguments.serve:  # whose replicas run already
                refuse_misfit(config.engine, planned_for)
            if arguments.dry_run:
                plan = obtain_plan(config, executor, dry_run=True, tell=console.print)
                describe_plan(config, plan, console, planned_for)
                return 0
            summary = run_batch(config, executor, console, JobMetrics(config.output).publish)
    except Phi4rayError as error:
        return told(error)
    except KeyboardInterrupt:
        return interrupted("the same command goes on from the parts that are done")
    print_summary(console, summary)
    return 3 if summary.error_rows else 0


def parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    described, _, example = (__doc__ or "").partition("\n\n")
    result = new_parser("batch_infer.py", described, f"{example}\n{EXIT_CODES}")
    add = result.add_argument
    add(
        "--input",
        nargs="+",
        action="extend",
        metavar="URI",
        help="files, globs and prefixes of .jsonl (also .gz, .zst) and .parquet; may be repeated",
    )
    add("--output", metavar="URI", help="prefix that will hold this one job's answers")
    add(
        "--set",
        nargs="+",
        action="extend",
        metavar="KEY=VALUE",
        default=[],
        help="request parameters for rows that do not set them, as temperature=0.7",
    )
    add("--endpoint", choices=get_args(Endpoint), help="where `prompt` rows go")
    add(
        "--output-format",
        choices=get_args(OutputFormat),
        help="openai-jsonl adds OpenAI Batch output and error files",
    )
    add("--retry-errors", action="store_true", help="rerun only the failed rows of a finished job")
    add(
        "--serve",
        metavar="NAME",
        default=None,
        help="run on the replicas of this Serve application, in what online traffic leaves",
    )
    add("--dry-run", action="store_true", default=False, help="print the plan and write nothing")
    add_gpu(result)
    add_fields(result, "job", JOB_FLAGS, BatchConfig)
    add_fields(result, "engine", ENGINE_FLAGS, EngineConfig)
    return result


def configuration(arguments: argparse.Namespace) -> BatchConfig:
    """Merge recipe, YAML file and flags, each winning over the one before.

    Raises:
        ConfigError: names every field that is wrong or missing.
    """
    given = vars(arguments)
    recipe = find_recipe(arguments.recipe).settings if arguments.recipe else {}
    file = file_layer(arguments.config)
    flags: dict[str, Any] = {
        name: given[name]
        for name in (*JOB_FLAGS, "input", "output", "endpoint", "output_format", "retry_errors")
        if name in given
    }
    flags["engine"] = engine_layer(arguments)
    if arguments.serve:
        if flags["engine"]:
            raise ConfigError(
                f"--serve runs on the engine of {arguments.serve!r}: leave out "
                + ", ".join(f"--{name.replace('_', '-')}" for name in flags["engine"])
            )
        if replicas := [name for name in SERVICE_REPLICAS if name in flags or name in file]:
            raise ConfigError(
                f"--serve runs on the replicas of {arguments.serve!r}, as many as it has: leave "
                f"out {', '.join(replicas)}"
            )
        # Until the application is asked, see `on_service`.
        recipe = {name: value for name, value in recipe.items() if name != "engine"}
        recipe["engine"] = {"model": arguments.serve}
    if arguments.set:
        flags["sampling"] = pairs("--set", arguments.set)
    config = batch_config(recipe, file, flags)
    # Workers have another folder.
    engine = local_model(config.engine)
    template = None if arguments.serve else chat_template_text(config)
    if template is not None and "{" in template:  # else vLLM takes it for a path
        engine = engine.model_copy(update={"chat_template": template})
    absolute = {"engine": engine, "output": normal(config.output)}
    return config.model_copy(update=absolute)


def on_service(wanted: EngineConfig, found: EngineConfig, application: str) -> EngineConfig:
    """The engine of an application, if it is what the configuration asks for.

    Of `wanted`, what was not set does not count, nor the application's name as its model.

    Raises:
        ConfigError: names every setting that is another one there.
    """
    differing = []
    for name in sorted(wanted.model_fields_set):
        ours, theirs = getattr(wanted, name), getattr(found, name)
        if isinstance(ours, Mapping):
            differing += [
                f"engine.{name}.{key}" for key, value in ours.items() if theirs.get(key) != value
            ]
        elif ours != theirs and (name, ours) != ("model", application):
            differing.append(f"engine.{name} is {theirs!r} and not {ours!r}")
    if differing:
        listed = "\n".join(f"  {line}" for line in differing)
        raise ConfigError(
            f"--serve runs on the engine of {application!r}, whose settings are others:\n{listed}\n"
            "Leave these out of the --config file, or run the job without --serve"
        )
    return found


if __name__ == "__main__":
    sys.exit(main())
