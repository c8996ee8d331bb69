"""Actors that an application's processes find by name, whichever of them comes first."""

from typing import Any

import ray
from ray._common.constants import HEAD_NODE_RESOURCE_NAME

NAMESPACE = "phi4ray"
ON_HEAD = {HEAD_NODE_RESOURCE_NAME: 0.001}
"""Resources of an actor that is to run on the head, as Serve's own controller asks for them.

An actor keeps its node from being idle, without CPUs too: a worker with a GPU would stay for it.
"""


def shared_actor(kind: type, name: str) -> Any:
    """The actor of that name; started on the head if it does not run. It outlives who did so."""
    return (
        ray.remote(kind)
        .options(name=name, get_if_exists=True, num_cpus=0, resources=ON_HEAD,
                 max_restarts=-1, lifetime="detached", namespace=NAMESPACE)
        .remote()
    )  # fmt: skip
