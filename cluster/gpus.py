"""The cards of the cluster that this process is connected to."""

import ray

_PREFIX = "accelerator_type:"


def cluster_gpus() -> tuple[str, ...]:
    """The kinds of GPU of the nodes that are up, by Ray's names (`H200`), sorted.

    Nodes that are still to join are not among them.
    """
    return tuple(
        sorted(
            {
                name.removeprefix(_PREFIX)
                for node in ray.nodes()
                if node["Alive"] and node["Resources"].get("GPU")
                for name in node["Resources"]
                if name.startswith(_PREFIX)
            }
        )
    )
