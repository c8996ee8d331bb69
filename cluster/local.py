"""Connecting to a Ray cluster: the one this job was submitted to, a running one, or a local one."""

import contextlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import ray

from cluster.environment import LOCAL, set_defaults
from phi4ray.errors import ClusterError

ROOT = Path(__file__).resolve().parent.parent


@contextlib.contextmanager
def connected(
    *, num_cpus: int | None = None, local: bool = False, worker_logs: bool = True
) -> Iterator[None]:
    """Be connected to Ray inside the block.

    `RAY_ADDRESS` (which `ray job submit` sets) or a cluster running on this machine is used; where
    there is none, or with `local` or `num_cpus`, one is started here and stopped at the end.
    Without `worker_logs`, what workers print stays in Ray's log files.

    Raises:
        ClusterError: the named cluster cannot be reached.
    """
    # Outside a submitted job, workers on this machine import from where this process did.
    submitted = "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ
    runtime_env = None if submitted else {"env_vars": {"PYTHONPATH": _python_path()}}
    set_defaults(LOCAL)  # which a cluster that is started here reads
    # Of what a job asks for, only a cluster that is started here takes notice.
    options = {
        "runtime_env": runtime_env,
        "logging_level": logging.WARNING,
        "include_dashboard": False,
        "log_to_driver": worker_logs,
    }
    try:
        if local or num_cpus is not None:
            ray.init("local", num_cpus=num_cpus, **options)
        else:
            ray.init(**options)
    except ConnectionError as error:
        if "RAY_ADDRESS" in os.environ:
            raise ClusterError(
                f"no Ray cluster answers at RAY_ADDRESS={os.environ['RAY_ADDRESS']}: unset it to "
                f"use a local one ({error})"
            ) from error
        # A cluster that was not stopped in order leaves a note of its address behind.
        ray.init("local", **options)
    try:
        yield
    finally:
        ray.shutdown()


def _python_path() -> str:
    return os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
