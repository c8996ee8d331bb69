"""A run's checkpoints in the object store: `_checkpoints/step-NNNNNNNN/`, whole or not there.

The store has no rename of folders, so the object `_COMPLETE` makes a checkpoint one: it is written
last, and lists what belongs to it. Ray Train's own storage is not used, because the list that it
keeps is neither written atomically on file systems nor read by another version of Ray.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from phi4ray.errors import ObjectNotFoundError
from phi4ray.storage import copy_tree, join, storage_for, upload_tree

FOLDER = "_checkpoints/"
COMPLETE = "_COMPLETE"
_NAME = re.compile(r"step-(\d{8})/(.+)")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """One whole checkpoint of a run."""

    step: int
    uri: str

    def download(self, folder: Path) -> Path:
        """Copy it below a folder, as transformers names it; gives where it is.

        Raises:
            StorageError: it cannot be read, or this machine cannot hold it.
        """
        return copy_tree(self.uri, folder / f"checkpoint-{self.step}")


def upload(output: str, step: int, folder: Path) -> None:
    """Write the part of a checkpoint that this worker has; `seal` makes it one.

    Raises:
        StorageError: the store refuses it.
    """
    upload_tree(folder, _uri(output, step))


def seal(output: str, step: int) -> None:
    """Make what every worker has written of a step a checkpoint."""
    uri = _uri(output, step)
    sizes = {
        item.uri.removeprefix(uri): item.size
        for item in storage_for(uri).list(uri)
        if not item.uri.endswith(COMPLETE)
    }
    storage_for(uri).write(join(uri, COMPLETE), json.dumps(sizes, indent=1).encode())


def checkpoints(output: str) -> list[Checkpoint]:
    """The whole checkpoints under an output prefix, oldest first. Cost: one LIST, a read each."""
    found = _objects(output)
    whole = []
    for step, sizes in sorted(found.items()):
        if COMPLETE not in sizes:
            continue
        uri = _uri(output, step)
        try:
            listed = json.loads(storage_for(uri).read(join(uri, COMPLETE)))
        except ObjectNotFoundError:  # the run goes on, and has deleted it since the listing
            continue
        if listed.items() <= sizes.items():
            whole.append(Checkpoint(step, uri))
    return whole


def last_checkpoint(output: str) -> Checkpoint | None:
    """The newest whole checkpoint; None where a run has to begin at its beginning."""
    return next(reversed(checkpoints(output)), None)


def prune(output: str, keep: int) -> None:
    """Delete all but the newest `keep` whole checkpoints, and what runs that died left half."""
    kept = {checkpoint.step for checkpoint in checkpoints(output)[-keep:]}
    for step, sizes in _objects(output).items():
        if step not in kept:
            uri = _uri(output, step)
            for name in sorted(sizes, key=lambda name: name != COMPLETE):
                storage_for(uri).delete(join(uri, name))


def _objects(output: str) -> dict[int, dict[str, int]]:
    """Names and sizes of what is there, by step."""
    found: dict[int, dict[str, int]] = {}
    for step, name, size in _listed(join(output, FOLDER)):
        found.setdefault(step, {})[name] = size
    return found


def _listed(root: str) -> Iterator[tuple[int, str, int]]:
    for item in storage_for(root).list(root):
        if match := _NAME.fullmatch(item.uri.removeprefix(root)):
            yield int(match[1]), match[2], item.size


def _uri(output: str, step: int) -> str:
    return join(output, f"{FOLDER}step-{step:08d}/")
