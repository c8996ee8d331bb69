"""The Batch API's runner as a deployment: Serve starts it, and again when it dies."""

import threading
from collections.abc import Callable

from ray import serve
from ray.serve.schema import LoggingConfig

from cluster.harvest import Board, job_board
from cluster.shared import ON_HEAD
from phi4ray.batch.executor import InProcessExecutor
from phi4ray.batches.executors import Executors
from phi4ray.batches.runner import Runner
from phi4ray.errors import ClusterError, ConfigError
from phi4ray.serve.config import ServeConfig
from phi4ray.serve.observe import log_to_stderr

ExecutorsOf = Callable[[ServeConfig], Executors]
"""Makes, in the runner's process, what makes the executor of each batch."""


def on_service(_: ServeConfig) -> Executors:
    """Executors on the application's own replicas, in what online traffic leaves.

    A batch asks for a model by the name that the service gives it, whatever runs behind that.
    """
    application = serve.get_replica_context().app_name
    job_board(application)  # no replica may have started one yet
    return lambda stopped: Board(application).executor(
        InProcessExecutor(), stopped, same_engine=False
    )


class BatchRunner:
    """Runs `phi4ray.batches.runner.Runner`; all it knows is in the object store."""

    def __init__(self, config: ServeConfig, executors_of: ExecutorsOf) -> None:
        log_to_stderr()
        if config.batches is None:
            raise ConfigError("batches.store is not set: there is nothing to run")
        self._runner = Runner(config.batches, config.engine, executors_of(config))
        self._thread = threading.Thread(target=self._runner.run, name="phi4ray-batches")
        self._thread.daemon = True
        self._thread.start()

    def check_health(self) -> None:
        """Serve replaces a runner that raises here.

        Raises:
            ClusterError: the loop ended.
        """
        if not self._thread.is_alive():
            raise ClusterError("the batch runner ended; its log above says why")

    def __del__(self) -> None:
        """Serve calls this when the deployment goes: what runs is left to the next one."""
        if hasattr(self, "_runner"):
            self._runner.close()


def batch_runner(config: ServeConfig, executors_of: ExecutorsOf = on_service) -> serve.Application:
    """Bind the one runner of an application whose Batch API is on."""
    return serve.deployment(
        BatchRunner,
        name="batches",
        num_replicas=1,
        health_check_period_s=5,
        ray_actor_options={"num_cpus": 0, "resources": ON_HEAD},
        logging_config=LoggingConfig(enable_access_log=False),
    ).bind(config, executors_of)
