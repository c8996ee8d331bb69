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

import yaml
from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # when run as a script

from cluster.batch import RayExecutor
from cluster.local import connected
from phi4ray.batch.describe import describe_plan
from phi4ray.batch.planning import obtain_plan
from phi4ray.batch.run import run_batch
from phi4ray.batch.summary import print_summary
from phi4ray.config import (
    BatchConfig,
    Endpoint,
    EngineConfig,
    OutputFormat,
    batch_config,
    load_yaml,
)
from phi4ray.errors import ConfigError, Phi4rayError
from phi4ray.recipes import RECIPES, find_recipe

EXIT_CODES = """\
exit codes: 0 all rows answered, 3 finished with error rows, 1 failed, 2 bad arguments"""

# Flags that set one field of the configuration each: their names, types and defaults are there.
JOB_FLAGS: Mapping[str, type] = {
    "limit": int,
    "shard_rows": int,
    "shard_mib": float,
    "min_replicas": int,
    "max_replicas": int,
    "shards_in_flight": int,
    "max_attempts": int,
    "request_timeout_s": float,
    "max_error_fraction": float,
    "gpu_hour_price": float,
    "progress_interval_s": float,
    "system_prompt": str,
}
ENGINE_FLAGS: Mapping[str, type] = {
    "model": str,
    "served_model_name": str,
    "quantization": str,
    "kv_cache_dtype": str,
    "load_format": str,
    "max_model_len": int,
    "tensor_parallel_size": int,
    "gpu_memory_utilization": float,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job that the arguments describe; returns the process's exit code."""
    arguments = parser().parse_args(argv)
    console = Console(soft_wrap=not sys.stdout.isatty(), highlight=False, markup=False)
    try:
        config = configuration(arguments)
        with connected():
            executor = RayExecutor(console)
            if arguments.dry_run:
                plan = obtain_plan(config, executor, dry_run=True)
                gpu = find_recipe(arguments.recipe).gpu if arguments.recipe else None
                describe_plan(config, plan, console, gpu=gpu)
                return 0
            summary = run_batch(config, executor, console)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Phi4rayError as error:
        print(f"error: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    print_summary(console, summary)
    return 3 if summary.error_rows else 0


def parser() -> argparse.ArgumentParser:
    """Describe the command line; what a flag's absence means is in `phi4ray.config`."""
    described, _, example = (__doc__ or "").partition("\n\n")
    result = argparse.ArgumentParser(
        "batch_infer.py",
        description=described,
        epilog=f"{example}\n{EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
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
        "--recipe",
        default=None,
        choices=sorted(RECIPES),
        help="a complete configuration to start from",
    )
    add(
        "--config",
        default=None,
        metavar="FILE",
        help="YAML with any of the configuration; flags win over it",
    )
    add(
        "--set",
        nargs="+",
        action="extend",
        metavar="KEY=VALUE",
        default=[],
        help="request parameters for rows that do not set them, as temperature=0.7",
    )
    add(
        "--engine-arg",
        nargs="+",
        action="extend",
        metavar="KEY=VALUE",
        default=[],
        help="any argument of `vllm serve` by its Python name, as max_num_seqs=512",
    )
    add("--endpoint", choices=get_args(Endpoint), help="where `prompt` rows go")
    add(
        "--output-format",
        choices=get_args(OutputFormat),
        help="openai-jsonl adds OpenAI Batch output and error files",
    )
    add("--retry-errors", action="store_true", help="rerun only the failed rows of a finished job")
    add("--dry-run", action="store_true", default=False, help="print the plan and write nothing")
    groups: tuple[tuple[str, Mapping[str, type], Any], ...] = (
        ("job", JOB_FLAGS, BatchConfig),
        ("engine", ENGINE_FLAGS, EngineConfig),
    )
    for title, flags, model in groups:
        group = result.add_argument_group(title)
        for name, kind in flags.items():
            field = model.model_fields[name]
            default = "" if field.is_required() or field.default is None else f" [{field.default}]"
            group.add_argument(
                f"--{name.replace('_', '-')}",
                type=kind,
                metavar=kind.__name__.upper(),
                help=((field.description or "as in `vllm serve`") + default).replace("%", "%%"),
            )
    return result


def configuration(arguments: argparse.Namespace) -> BatchConfig:
    """Merge recipe, YAML file and flags, each winning over the one before.

    Raises:
        ConfigError: names every field that is wrong or missing.
    """
    given = vars(arguments)
    layers: list[Mapping[str, Any]] = []
    if arguments.recipe:
        layers.append(find_recipe(arguments.recipe).settings)
    if arguments.config:
        try:
            layers.append(load_yaml(Path(arguments.config).read_text("utf-8"), arguments.config))
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--config {arguments.config} cannot be read: {error}") from error
    engine = {name: given[name] for name in ENGINE_FLAGS if name in given}
    others: dict[str, Any] = {}
    for name, value in pairs("--engine-arg", arguments.engine_arg).items():
        (engine if name in EngineConfig.model_fields else others)[name] = value
    flags = {
        name: given[name]
        for name in (*JOB_FLAGS, "input", "output", "endpoint", "output_format", "retry_errors")
        if name in given
    }
    flags["engine"] = engine | ({"engine_args": others} if others else {})
    if arguments.set:
        flags["sampling"] = pairs("--set", arguments.set)
    layers.append(flags)
    config = batch_config(*layers)
    # Workers have another working folder.
    model = Path(config.engine.model)
    if model.is_dir():
        engine_config = config.engine.model_copy(update={"model": str(model.resolve())})
        config = config.model_copy(update={"engine": engine_config})
    return config


def pairs(flag: str, items: Sequence[str]) -> dict[str, Any]:
    """Decode `KEY=VALUE` items; values are YAML, so that numbers, lists and booleans are such.

    Raises:
        ConfigError: an item has another form.
    """
    values = {}
    for item in items:
        key, equals, text = item.partition("=")
        if not key or not equals:
            raise ConfigError(f"{flag} {item}: write KEY=VALUE")
        try:
            values[key] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"{flag} {item}: the value is not valid YAML: {error}") from error
    return values


if __name__ == "__main__":
    sys.exit(main())
