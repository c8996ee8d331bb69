"""Where a service listens: on its own machine alone, in a cluster of others where its nodes ask."""

import pytest

from jobs.serve import listening
from phi4ray.errors import ConfigError

HEAD, WORKER = "10.0.0.1", "10.0.0.2"


@pytest.mark.parametrize(
    ("asked", "nodes", "address"),
    [
        (None, (), "127.0.0.1"),
        (None, ("127.0.0.1",), "127.0.0.1"),
        (None, (HEAD,), "0.0.0.0"),  # others may join
        (None, (HEAD, WORKER), "0.0.0.0"),
        ("127.0.0.1", (HEAD,), "127.0.0.1"),
        ("127.0.0.1", (HEAD, HEAD), "127.0.0.1"),  # two nodes on one machine
        ("0.0.0.0", (), "0.0.0.0"),
        ("0.0.0.0", (HEAD, WORKER), "0.0.0.0"),
    ],
)
def test_it_is_this_machine_alone_unless_nodes_are_to_be_reached(
    asked: str | None, nodes: tuple[str, ...], address: str
) -> None:
    assert listening(asked, nodes) == address


@pytest.mark.parametrize("asked", ["127.0.0.1", "localhost", "::1"])
def test_an_address_at_which_nodes_do_not_reach_each_other_is_refused(asked: str) -> None:
    with pytest.raises(ConfigError, match=f"--host {asked} .* give 0.0.0.0"):
        listening(asked, (HEAD, WORKER))
