"""Which class runs an engine configuration."""

import hashlib
import os
from pathlib import Path

from filelock import FileLock

from phi4ray.config import EngineConfig
from phi4ray.fake import FakeReplica
from phi4ray.protocol import OnlineReplica
from phi4ray.storage import copy_tree

MODEL_CACHE = "PHI4RAY_MODEL_CACHE"
"""Environment variable: where models from s3:// are kept on a node."""


def make_replica(config: EngineConfig) -> OnlineReplica:
    """A replica that is not started yet; its model is on this machine or on the hub.

    The engine's environment is set before vLLM is imported, because parts of it are read then.

    Raises:
        StorageError: the model's objects cannot be read.
    """
    if config.kind == "fake":
        return FakeReplica(config)
    os.environ.update(config.env)
    if config.model.startswith("s3://"):
        here = {"model": on_this_machine(config.model), "served_model_name": config.model_name}
        config = config.model_copy(update=here)
    from phi4ray.replica import VllmReplica

    return VllmReplica(config)


def on_this_machine(model: str) -> str:
    """A model as libraries load it: the folder of its copy if it is in s3://, else as it is.

    Raises:
        StorageError: the model's objects cannot be read.
    """
    return str(download(model)) if model.startswith("s3://") else model


def download(uri: str) -> Path:
    """Copy a checkpoint to this node, once for all its processes."""
    root = Path(os.environ.get(MODEL_CACHE) or Path.home() / ".cache" / "phi4ray" / "models")
    folder = root / hashlib.sha256(uri.encode()).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        return copy_tree(uri, folder)
