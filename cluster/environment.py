"""What the processes of a cluster need in their environment. Imports nothing of Ray's.

Ray and Ray Serve read these when they start: set them where a cluster's nodes are started. In a
shell, `eval "$(python -m cluster.environment)"` sets those of a cluster that serves.
"""

import os
import shlex
from collections.abc import Mapping

NODES: Mapping[str, str] = {
    # Ray lets its workers, and so the engines in them, give way to every other process (15). An
    # engine that waits for a core costs more than whatever it gives way to.
    "RAY_worker_niceness": "0",
}
"""For all clusters."""

LOCAL: Mapping[str, str] = {
    **NODES,
    # Ray starts a worker for each core before any is asked for. Ours have an environment of their
    # own here (`cluster.local`), for which those cannot be used.
    "RAY_prestart_worker_first_driver": "0",
    # So long a replica that leaves can be reached by who has not heard of it. Serve's 30 s are for
    # load balancers elsewhere; here there is one HAProxy.
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "5",
}
"""For a cluster that a job starts by itself."""

SERVING: Mapping[str, str] = {
    **NODES,
    # HAProxy in front, and each replica's own HTTP server behind it.
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    # A proxy that takes its time on a busy node would be killed and begun again at 5 s.
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "20",
    # The router looks at the beginning of a prompt.
    "RAY_SERVE_INGRESS_REQUEST_ROUTER_FORWARD_BODY": "1",
    "RAY_SERVE_HAPROXY_INGRESS_REQUEST_ROUTER_BUFSIZE": str(256 * 1024),
    # With each deployment of an application its routers are replaced: the other one is asked then.
    "RAY_SERVE_INGRESS_ROUTER_REPLICAS_PER_NODE": "2",
    # A router on a busy node is slow, not gone: for one that is gone connecting fails.
    "RAY_SERVE_HAPROXY_INGRESS_REQUEST_ROUTER_TIMEOUT_S": "20",
    # A replica that dies before the first byte of an answer has answered nobody: ask another,
    # which HAProxy can do for requests that fit its buffer.
    "RAY_SERVE_HAPROXY_RETRY_ON": "conn-failure empty-response 503",
    # After three failures a replica is taken for dead, and one request may see all three. Not more:
    # a request of which engines die would take as many with it.
    "RAY_SERVE_HAPROXY_RETRIES": "5",
    "RAY_SERVE_HAPROXY_TUNE_BUFSIZE": str(256 * 1024),
    # With each change of replicas a new HAProxy takes over; the old one is to finish its streams.
    "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": "3600",
}
"""For clusters that serve online traffic."""


def set_defaults(variables: Mapping[str, str]) -> None:
    """Set those variables that this process's environment does not have."""
    for name, value in variables.items():
        os.environ.setdefault(name, value)


if __name__ == "__main__":
    print("export", shlex.join(f"{name}={value}" for name, value in SERVING.items()))
