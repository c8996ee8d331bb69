"""What an application shares: actors that keep no worker, and its GPU, from being scaled in."""

from collections.abc import Iterator

import pytest
import ray
from ray.cluster_utils import Cluster

from cluster.batches import batch_runner
from cluster.shared import ON_HEAD, shared_actor
from phi4ray.serve.config import serve_config

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(120)]


class Where:
    def node(self) -> str:
        return str(ray.get_runtime_context().get_node_id())


@pytest.fixture
def head() -> Iterator[str]:
    """The node of a cluster's head, beside a worker that has all of its CPUs."""
    cluster = Cluster(True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    cluster.add_node(num_cpus=2)
    ray.init(cluster.address)
    yield cluster.head_node.node_id
    ray.shutdown()
    cluster.shutdown()


@ray.remote(num_cpus=1)
def ask_first(names: list[str]) -> tuple[str, list[str]]:
    """Where who asks for actors runs, and where these do."""
    actors = [shared_actor(Where, name) for name in names]
    return Where().node(), ray.get([actor.node.remote() for actor in actors])


def test_actors_that_a_replica_asks_for_first_run_on_the_head(head: str) -> None:
    # Ray puts one that needs nothing on any node.
    asker, found = ray.get(ask_first.remote([f"board-{number}" for number in range(6)]))
    assert asker != head
    assert set(found) == {head}


def test_so_does_the_runner_of_the_batch_api() -> None:
    config = serve_config({"recipe": "fake", "batches": {"store": "/tmp/batches"}})
    options = batch_runner(config)._bound_deployment.ray_actor_options
    assert options["resources"] == ON_HEAD
