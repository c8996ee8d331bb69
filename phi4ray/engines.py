"""Which class runs an engine configuration."""

import contextlib
import hashlib
import os
from pathlib import Path
from typing import Any

from filelock import FileLock

from phi4ray import fork_server
from phi4ray.config import EngineConfig
from phi4ray.fake import FakeReplica
from phi4ray.orphans import kill_orphans
from phi4ray.protocol import OnlineReplica
from phi4ray.storage import copy_tree

MODEL_CACHE = "PHI4RAY_MODEL_CACHE"
"""Environment variable: where models from s3:// are kept on a node."""


WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
"""What files of weights are called; all the others of a checkpoint are small."""


def make_replica(config: EngineConfig) -> OnlineReplica:
    """A replica that is not started yet; what its engine reads from files is on this machine.

    The engine's environment is set before vLLM is imported, because parts of it are read then.

    Raises:
        StorageError: the model's objects cannot be read.
    """
    if config.kind == "fake":
        return FakeReplica(config)
    os.environ.update(config.env)
    with contextlib.ExitStack() as stack:
        stack.enter_context(kill_orphans())
        processes = None
        if config.gpus_per_replica and fork_server.serves():
            processes = fork_server.start()
        if config.model.startswith("s3://"):
            config = _from_store(config)
        from phi4ray.replica import VllmReplica

        return VllmReplica(config, stack.pop_all(), processes)


def _from_store(config: EngineConfig) -> EngineConfig:
    """The engine's configuration with the folder of its model's copy on this machine.

    With vLLM's `runai_streamer`, weights are no part of it: vLLM streams them to the device.
    """
    uri = config.model
    changes: dict[str, Any] = {"served_model_name": config.model_name}
    if config.load_format.startswith("runai_streamer"):
        if endpoint := os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL"):
            os.environ.setdefault("RUNAI_STREAMER_S3_ENDPOINT", endpoint)
            # Buckets of other servers than AWS's seldom have host names of their own.
            os.environ.setdefault("RUNAI_STREAMER_S3_USE_VIRTUAL_ADDRESSING", "0")
        folder = download(uri, weights=False)
        changes["engine_args"] = {"model_weights": uri, **config.engine_args}
    else:
        folder = download(uri)
    return config.model_copy(update={**changes, "model": str(folder)})


def on_this_machine(model: str, *, weights: bool = True) -> str:
    """A model as libraries load it: the folder of its copy if it is in s3://, else as it is.

    Its tokenizer and its configuration want no weights.

    Raises:
        StorageError: the model's objects cannot be read.
    """
    return str(download(model, weights=weights)) if model.startswith("s3://") else model


def download(uri: str, *, weights: bool = True) -> Path:
    """Copy a checkpoint to this node, once for all its processes; others wait for the first."""
    root = Path(os.environ.get(MODEL_CACHE) or Path.home() / ".cache" / "phi4ray" / "models")
    folder = root / hashlib.sha256(uri.encode()).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    # The kernel lets go of the lock of a process that dies; the next one goes on with the copy.
    with FileLock(f"{folder}.lock"):
        return copy_tree(uri, folder, lambda name: weights or not name.endswith(WEIGHTS))
