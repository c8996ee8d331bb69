"""Serve a model with an OpenAI API, on Ray Serve.

    python jobs/serve.py --recipe phi4-fp8-h200
    curl localhost:8000/v1/chat/completions -H 'content-type: application/json' \\
        -d '{"model": "microsoft/phi-4", "messages": [{"role": "user", "content": "Hello"}]}'

Starts a Ray cluster on this machine, or with RAY_ADDRESS uses that one, where all who reach its
nodes reach the service; runs until interrupted, and lets running answers finish then, which a
second interrupt ends. To leave a service on a cluster, use `serve deploy` with
`import_path: cluster.serve:app` (see k8s/).
"""

import argparse
import os
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # when run as a script

from cluster.environment import SERVING, set_defaults
from jobs.flags import (
    ENGINE_FLAGS,
    INTERRUPTED,
    Flags,
    add_fields,
    add_gpu,
    cards_of,
    engine_layer,
    file_layer,
    local_model,
    new_parser,
    told,
)
from phi4ray.config import EngineConfig
from phi4ray.errors import ConfigError, Phi4rayError
from phi4ray.fit import refuse_misfit
from phi4ray.serve.autoscaling import AutoscalingPolicyConfig
from phi4ray.serve.config import ServeConfig, serve_config
from phi4ray.storage import normal

LOCAL = ("127.0.0.1", "localhost", "::1")
EVERYWHERE = "0.0.0.0"
SCALING_FLAGS: Flags = {"min_replicas": int, "max_replicas": int}


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until SIGINT or SIGTERM; returns the process's exit code."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    arguments = parser().parse_args(argv)
    console = Console(soft_wrap=True, highlight=False, markup=False)
    try:
        config = configuration(arguments)
        serve(config, arguments, console)
    except Phi4rayError as error:
        return told(error)
    except KeyboardInterrupt:
        return INTERRUPTED
    return 0


def serve(config: ServeConfig, arguments: argparse.Namespace, console: Console) -> None:
    """Deploy, say where, wait for a signal, drain and go.

    Raises:
        KeyboardInterrupt: a signal came before, or another one while it drained.
        ClusterError: the cluster has an application of this name.
        ConfigError: the engine does not fit on the cluster's cards, or its nodes could not reach
            each other's replicas; nothing was deployed.
        EngineStartError: no replica can start.
    """
    local = "RAY_ADDRESS" not in os.environ
    if local:
        set_defaults(SERVING)
    # Ray Serve reads the environment when it is imported.
    from cluster.deploying import deployed, node_addresses
    from cluster.gpus import cluster_gpus
    from cluster.local import connected

    with connected(local=local):
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # Ray has put its own there
        refuse_misfit(config.engine, cards_of(arguments, cluster_gpus()))
        nodes = () if local else node_addresses()
        asked = listening(arguments.host, nodes)
        with deployed(config, asked, arguments.port) as (host, port):
            try:
                at = nodes[0] if nodes and host == EVERYWHERE else host
                console.print(f"{config.engine.model_name} answers at http://{at}:{port}/v1")
                if config.batches is not None:
                    console.print(f"files and batches are kept in {config.batches.store}")
                if config.gate.keys_file is None:
                    where = "this cluster" if nodes else "this machine"
                    who = "on this machine" if host in LOCAL else f"who can reach {where}"
                    console.print(f"without API keys: to everyone {who}; see gate.keys_file")
                threading.Event().wait()
            except KeyboardInterrupt:
                console.print("stopping; running answers finish first, unless interrupted again")


def listening(asked: str | None, nodes: Sequence[str]) -> str:
    """The address to listen on, in a cluster of others with nodes of these addresses.

    Proxies and replicas listen on the same one, and a node's proxy asks the replicas of all nodes.
    A cluster whose nodes have no address but this machine's own loopback stays within it.

    Raises:
        ConfigError: the proxies would not reach other nodes' replicas at the address asked for.
    """
    if asked is None:
        return EVERYWHERE if set(nodes) - set(LOCAL) else LOCAL[0]
    if asked in LOCAL and len(set(nodes)) > 1:
        raise ConfigError(
            f"at --host {asked} the nodes of this cluster do not reach each other's replicas: "
            f"leave it out, or give {EVERYWHERE}"
        )
    return asked


def parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    described, _, example = (__doc__ or "").partition("\n\n")
    result = new_parser("serve.py", described, example)
    result.add_argument(
        "--host",
        default=None,
        help="address to listen on [127.0.0.1, or all on a cluster that was not started here]",
    )
    result.add_argument(
        "--port",
        type=int,
        default=8000,
        help="port to listen on, unless Serve runs on the cluster already [8000]",
    )
    add_gpu(result)
    result.add_argument(
        "--batches",
        default=None,
        metavar="STORE",
        help="folder for files and batches, as s3://bucket/phi4/: switches the Batch API on",
    )
    add_fields(result, "replicas", SCALING_FLAGS, AutoscalingPolicyConfig)
    add_fields(result, "engine", ENGINE_FLAGS, EngineConfig)
    return result


def configuration(arguments: argparse.Namespace) -> ServeConfig:
    """Merge recipe, YAML file and flags, each winning over the one before.

    Raises:
        ConfigError: names every field that is wrong or missing.
    """
    given = vars(arguments)
    recipe = {"recipe": arguments.recipe} if arguments.recipe else {}
    scaling = {name: given[name] for name in SCALING_FLAGS if name in given}
    flags = {"engine": engine_layer(arguments), "autoscaling": scaling}
    # Replicas run in another folder than this process.
    batches = {"batches": {"store": normal(arguments.batches)}} if arguments.batches else {}
    config = serve_config(file_layer(arguments.config), recipe, flags, batches)
    return config.model_copy(update={"engine": local_model(config.engine)})


if __name__ == "__main__":
    sys.exit(main())
