"""Actors that an application's processes find by name, whichever of them comes first."""

from typing import Any

import ray

NAMESPACE = "phi4ray"


def shared_actor(kind: type, name: str) -> Any:
    """The actor of that name; started if it does not run. It outlives who started it."""
    return (
        ray.remote(kind)
        .options(name=name, get_if_exists=True, num_cpus=0, max_restarts=-1,
                 lifetime="detached", namespace=NAMESPACE)
        .remote()
    )  # fmt: skip
