"""Which class runs an engine configuration."""

import os

from phi4ray.config import EngineConfig
from phi4ray.fake import FakeReplica
from phi4ray.protocol import Replica


def make_replica(config: EngineConfig) -> Replica:
    """A replica that is not started yet.

    The engine's environment is set before vLLM is imported, because parts of it are read then.
    """
    if config.kind == "fake":
        return FakeReplica(config)
    os.environ.update(config.env)
    from phi4ray.replica import VllmReplica

    return VllmReplica(config)
