"""Having an application run for as long as a process wants it, and its end.

A cluster may be others' as well: what this process began it ends, and nothing else.
"""

import contextlib
import logging
import time
from collections.abc import Iterator
from typing import Any

import ray
from ray import serve
from ray._common.constants import HEAD_NODE_RESOURCE_NAME
from ray.exceptions import RayError
from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE
from ray.serve.exceptions import RayServeException
from ray.serve.schema import LoggingConfig

from cluster.serve import application
from phi4ray.errors import ClusterError, EngineStartError
from phi4ray.serve.config import ServeConfig

LOOK_S = 0.25
MARGIN_S = 60.0
"""What Serve may take beyond `drain_timeout_s`, at which it kills a replica."""

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def deployed(config: ServeConfig, host: str, port: int) -> Iterator[tuple[str, int]]:
    """Have the application run inside the block, on the Ray cluster that is connected.

    Gives the address and port that Serve listens on: those of a Serve that runs there already
    stay as they are.

    After the block its running answers finish first, for `drain_timeout_s` at most. Any exception,
    and so an interrupt, in the start, the block or that wait, ends the wait: the application is
    deleted, and nobody stays for it.

    Raises:
        ClusterError: an application of this name runs there, which is not ours to replace.
        EngineStartError: its replicas cannot start.
    """
    quiet = LoggingConfig(log_level="WARNING", enable_access_log=False)
    began = _controller() is None
    if not began and config.name in serve.status().applications:
        raise ClusterError(
            f"an application {config.name!r} runs on this cluster already: change it with "
            "`serve deploy`, or end it first"
        )
    try:
        try:
            serve.start(http_options={"host": host, "port": port}, logging_config=quiet)
            serve.run(application(config), name=config.name, route_prefix="/")
        except (RuntimeError, RayServeException) as error:
            raise EngineStartError(f"the service did not start: {error}") from error
        http = ray.get(_controller().get_http_config.remote())
        yield http.host, http.port
        _drain(config)
        if began and not serve.status().applications:
            serve.shutdown()
    except BaseException:
        with contextlib.suppress(RayError, RayServeException):  # without Serve all is gone
            _abandon(config.name, began)
        raise


def node_addresses() -> tuple[str, ...]:
    """Addresses of the cluster's nodes that are up, the head's first: a proxy is on it always."""
    up = [node for node in ray.nodes() if node["Alive"]]
    up.sort(key=lambda node: HEAD_NODE_RESOURCE_NAME not in node["Resources"])
    return tuple(node["NodeManagerAddress"] for node in up)


def _drain(config: ServeConfig) -> None:
    """Delete the application and wait until its last answer is out."""
    serve.delete(config.name, _blocking=False)  # else it waits for a minute, and fails then
    until = time.monotonic() + config.drain_timeout_s + MARGIN_S
    while config.name in serve.status().applications:
        if time.monotonic() > until:
            logger.warning("Serve has not ended %s in its time", config.name)
            return
        time.sleep(LOOK_S)


def _abandon(name: str, began: bool) -> None:
    """Have Serve's controller end the application, or all of Serve, without waiting for it."""
    if (controller := _controller()) is None:
        return
    others = set(serve.status().applications) - {name}
    if began and not others:
        ray.get(controller.graceful_shutdown.remote(wait=False))
    else:
        ray.get(controller.delete_apps.remote([name]))


def _controller() -> Any:
    """The actor of the Serve that runs on the cluster, if one does."""
    try:
        return ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
    except ValueError:
        return None
