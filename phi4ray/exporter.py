"""Each engine's metrics on a port of its own, so that Prometheus sees every replica of a node.

`GET /metrics` of the service reaches one replica, and another the next time: a counter read so
goes up and down. What is here is past the proxy, and batch workers, which have no HTTP server,
have it too.
"""

import logging
from typing import Final

import prometheus_client

PORTS: Final = range(9470, 9478)
"""The first replica of a node takes the first, and so on: a scrape configuration can list them."""

logger = logging.getLogger(__name__)


def export_metrics(host: str) -> int | None:
    """Serve this process's metrics, vLLM's and ours, until it ends; returns the port.

    None, and a line in the log, where all `PORTS` are taken: the process works without.
    """
    for port in PORTS:
        try:
            prometheus_client.start_http_server(port, host)
        except OSError:
            continue
        return port
    logger.warning(
        "no port of %d to %d is free on %s: Prometheus will not see this replica",
        PORTS.start,
        PORTS.stop - 1,
        host,
    )
    return None
