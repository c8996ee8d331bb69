"""Command-line flags that set fields of a configuration, for the jobs that have some."""

import argparse
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel
from rich.console import Console

from phi4ray.config import YAML_ERRORS, EngineConfig, load_yaml
from phi4ray.errors import ConfigError, Phi4rayError
from phi4ray.fit import cards
from phi4ray.gpus import GPUS
from phi4ray.recipes import RECIPES, find_recipe

# Flags that set one field of a configuration each: their names, types and defaults are there.
Flags = Mapping[str, type]

INTERRUPTED = 128 + signal.SIGINT
"""The exit code of what an interrupt ended before it was done."""

ENGINE_FLAGS: Flags = {
    "model": str,
    "served_model_name": str,
    "quantization": str,
    "kv_cache_dtype": str,
    "load_format": str,
    "max_model_len": int,
    "tensor_parallel_size": int,
    "gpu_memory_utilization": float,
}


def new_console() -> Console:
    """A job's console: what it prints is names and log lines, which stay as they are and whole."""
    return Console(soft_wrap=not sys.stdout.isatty(), highlight=False, markup=False, emoji=False)


def told(error: Phi4rayError) -> int:
    """Say on stderr why a job ends; gives its exit code: 2 for bad arguments, 1 for the rest."""
    if isinstance(error, ConfigError):
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"error: {type(error).__name__}: {error}", file=sys.stderr)
    return 1


def interrupted(what_now: str) -> int:
    """Say on stderr what is left of an interrupted job, and how it goes on; gives its exit code."""
    print(f"interrupted: {what_now}", file=sys.stderr)
    return INTERRUPTED


def bare_parser(program: str, description: str, epilog: str) -> argparse.ArgumentParser:
    """A parser without flags; what a flag's absence means is in the config models."""
    return argparse.ArgumentParser(
        program,
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )


def add_config(parser: argparse.ArgumentParser) -> None:
    """Add the flag that `file_layer` reads."""
    parser.add_argument(
        "--config",
        default=None,
        metavar="FILE",
        help="YAML with any of the configuration; flags win over it",
    )


def new_parser(program: str, description: str, epilog: str) -> argparse.ArgumentParser:
    """A parser with the flags of every job that has an engine."""
    parser = bare_parser(program, description, epilog)
    parser.add_argument(
        "--recipe",
        default=None,
        choices=sorted(RECIPES),
        help="a complete configuration to start from",
    )
    add_config(parser)
    parser.add_argument(
        "--engine-arg",
        nargs="+",
        action="extend",
        metavar="KEY=VALUE",
        default=[],
        help="any argument of `vllm serve` by its Python name, as max_num_seqs=512",
    )
    return parser


def add_gpu(parser: argparse.ArgumentParser) -> None:
    """Add the flag that `cards_of` reads."""
    parser.add_argument(
        "--gpu",
        default=None,
        metavar="CARD",
        help=f"what replicas run on, to plan their memory: {', '.join(GPUS)} "
        "[the cluster's, else the recipe's]",
    )


def cards_of(arguments: argparse.Namespace, cluster: Sequence[str]) -> tuple[str, ...]:
    """The cards to plan for, by --gpu, the cluster's nodes and --recipe, the first that knows.

    Raises:
        ConfigError: --gpu names none of the catalogue.
    """
    recipe = find_recipe(arguments.recipe).gpu if arguments.recipe else None
    return cards(arguments.gpu, cluster, recipe)


def add_fields(
    parser: argparse.ArgumentParser, title: str, flags: Flags, model: type[BaseModel]
) -> None:
    """Add a flag for each of these fields of a configuration model."""
    group = parser.add_argument_group(title)
    for name, kind in flags.items():
        field = model.model_fields[name]
        default = "" if field.is_required() or field.default is None else f" [{field.default}]"
        group.add_argument(
            f"--{name.replace('_', '-')}",
            type=kind,
            metavar=kind.__name__.upper(),
            help=((field.description or "as in `vllm serve`") + default).replace("%", "%%"),
        )


def to_arguments(namespace: argparse.Namespace) -> list[str]:
    """Arguments that parse to this namespace: the inverse of a parser of `new_parser`."""
    arguments: list[str] = []
    for name, value in vars(namespace).items():
        flag = f"--{name.replace('_', '-')}"
        if value is True:
            arguments.append(flag)
        elif isinstance(value, list):
            arguments += [f"{flag}={item}" for item in value]
        elif value is not None and value is not False:
            arguments.append(f"{flag}={value}")
    return arguments


def engine_layer(arguments: argparse.Namespace) -> dict[str, Any]:
    """The engine's part of a configuration, from the flags that were given.

    Raises:
        ConfigError: an item of --engine-arg has another form than KEY=VALUE.
    """
    given = vars(arguments)
    engine = {name: given[name] for name in ENGINE_FLAGS if name in given}
    others: dict[str, Any] = {}
    for name, value in pairs("--engine-arg", arguments.engine_arg).items():
        (engine if name in EngineConfig.model_fields else others)[name] = value
    return engine | ({"engine_args": others} if others else {})


def file_layer(path: str | None) -> dict[str, Any]:
    """What the file of --config holds.

    Raises:
        ConfigError: it cannot be read.
    """
    if path is None:
        return {}
    try:
        return load_yaml(Path(path).read_text("utf-8"), path)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path} cannot be read: {error}") from error


def local_model(engine: EngineConfig) -> EngineConfig:
    """The engine's configuration with a local model's whole path: workers have another folder."""
    model = Path(engine.model)
    return engine.model_copy(update={"model": str(model.resolve())}) if model.is_dir() else engine


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
        except YAML_ERRORS as error:
            raise ConfigError(f"{flag} {item}: the value is not valid YAML: {error}") from error
    return values
