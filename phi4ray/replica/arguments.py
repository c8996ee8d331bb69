"""An engine's configuration as the arguments of vLLM's own API server."""

import dataclasses
from argparse import Namespace

from vllm import envs
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.platforms import current_platform
from vllm.utils.argparse_utils import FlexibleArgumentParser

from phi4ray import amx
from phi4ray.config import EngineConfig
from phi4ray.errors import ConfigError

try:
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
except ModuleNotFoundError:  # vLLM 0.25
    from vllm.entrypoints.openai.cli_args import make_arg_parser

_INSTEAD = {
    "api_key": "give keys by gate.keys_file, which guards files and batches as well",
    "root_path": "give the application a route_prefix, as Ray Serve calls it",
    "served_model_name": "set engine.served_model_name, which all that we serve goes by",
}
"""Arguments of vLLM's server that would be true of a part of the service alone."""

_NOT_ENGINE_ARGS = {"kind", "num_gpus", "num_cpus", "engine_args", "env"}


def server_args(config: EngineConfig) -> Namespace:
    """Turn an engine's configuration into the arguments of vLLM's own API server.

    Raises:
        ConfigError: vLLM has no such argument, or it is not for us to give.
    """
    args = make_arg_parser(FlexibleArgumentParser()).parse_args([])
    # Some fields of the engine have no flag, as `model_weights`.
    known = vars(args).keys() | {field.name for field in dataclasses.fields(AsyncEngineArgs)}
    given = config.model_dump(exclude=_NOT_ENGINE_ARGS, exclude_none=True)
    given["served_model_name"] = [config.model_name]
    for name, advice in _INSTEAD.items():
        if config.engine_args.get(name):
            raise ConfigError(f"engine_args may not have {name}: {advice}")
    if envs.VLLM_API_KEY or config.env.get("VLLM_API_KEY"):
        raise ConfigError(f"unset VLLM_API_KEY: {_INSTEAD['api_key']}")
    for name, value in {**given, **config.engine_args}.items():
        if name not in known:
            raise ConfigError(f"this vLLM has no engine argument {name!r}: see `vllm serve --help`")
        setattr(args, name, value)
    if current_platform.is_cpu() and args.worker_extension_cls == "":
        args.worker_extension_cls = amx.WORKER_EXTENSION
    return args
