"""What tells one checkpoint from another of the same name, without reading its weights."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

from phi4ray.config import EngineConfig
from phi4ray.engines import WEIGHTS
from phi4ray.errors import AccessDeniedError
from phi4ray.storage import ObjectInfo, join, storage_for

SMALL = (".json", ".jinja", ".model", ".py", ".tiktoken", ".txt")
"""What a checkpoint has beside weights that decides answers. Model cards do not."""

SAMPLES = 16
SAMPLE_BYTES = 64 << 10
"""So much is read of a file of weights, spread over it: training changes all of them, and neither
their names nor their sizes."""


def fingerprint(config: EngineConfig) -> str | None:
    """A digest of the files of an engine's model, the same for each copy of them.

    None where it cannot be known here: for names of the hub, which `revision` pins, and for folders
    and buckets that only the workers can read.

    Raises:
        StorageError: the store cannot be asked.
    """
    if config.kind == "fake":
        return None
    try:
        if config.model.startswith("s3://"):
            lines = list(_objects(join(config.model, "")))
        elif Path(config.model).exists():
            lines = list(_files(Path(config.model)))
        else:
            return None
    except AccessDeniedError:
        return None
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16] if lines else None


def _objects(root: str) -> Iterator[str]:
    """A line each; the store's own etags tell of any change."""
    for item in storage_for(root).list(root):
        if _counts(name := item.uri.removeprefix(root)):
            yield f"{name} {item.size} {item.etag}"


def _files(path: Path) -> Iterator[str]:
    """A line each, by the content: times differ from copy to copy."""
    root = str(path.parent if path.is_file() else path)
    uri = str(path)
    storage = storage_for(uri)
    items = [storage.head(uri)] if path.is_file() else storage.list(uri)
    for item in items:
        if _counts(name := item.uri.removeprefix(join(root, ""))):
            yield f"{name} {item.size} {_digest(item)}"


def _counts(name: str) -> bool:
    hidden = any(piece.startswith(".") for piece in name.split("/"))
    return name.endswith((*SMALL, *WEIGHTS)) and not hidden


def _digest(item: ObjectInfo) -> str:
    digest = hashlib.sha256()
    with storage_for(item.uri).open(item.uri) as stream:
        if item.size <= SAMPLES * SAMPLE_BYTES or item.uri.endswith(SMALL):
            digest.update(stream.read())
        else:
            for sample in range(SAMPLES):
                stream.seek((item.size - SAMPLE_BYTES) * sample // (SAMPLES - 1))
                digest.update(stream.read(SAMPLE_BYTES))
    return digest.hexdigest()
