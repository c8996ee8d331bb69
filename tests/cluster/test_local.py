"""The cluster that a job starts where there is none."""

import os

import pytest
import ray

from cluster.local import connected

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(120)]


def test_engines_give_way_to_no_other_process() -> None:
    with connected(num_cpus=1):
        niceness = ray.get(ray.remote(lambda: os.nice(0)).remote())
    assert niceness == os.nice(0)
