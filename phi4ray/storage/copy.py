"""Copying folders of objects to this machine and from it: checkpoints."""

import os
import threading
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path

from phi4ray.errors import ObjectNotFoundError, StorageError
from phi4ray.storage.base import ObjectInfo
from phi4ray.storage.local import translated
from phi4ray.storage.uris import join, storage_for

STREAMS = 16
PIECE_BYTES = 16 << 20
"""What one request reads: a checkpoint has few files, and one connection does not fill a network.
While it copies, each stream holds a piece of this size twice."""


def copy_tree(source: str, folder: Path, wanted: Callable[[str], bool] = lambda name: True) -> Path:
    """Copy what is below a prefix into a folder; files that are there already are not read.

    `wanted` is asked of each name below the prefix. A file appears under its name only when it is
    whole, and its etag is kept beside it, so that a copy that was cut off goes on at the files it
    lacks, a changed object is copied again, and the copy of one that is gone is removed. One
    process at a time may copy into a folder.

    Raises:
        ObjectNotFoundError: there is nothing below the prefix.
        StorageError: this machine cannot hold the files, or a name leads out of the folder.
    """
    root = join(source, "")
    items = list(storage_for(root).list(root))
    if not items:
        raise ObjectNotFoundError(f"there is nothing under {root}")
    copies = [
        _Copy(item, folder, name) for item in items if wanted(name := item.uri.removeprefix(root))
    ]
    missing = [copy for copy in copies if not copy.is_there()]
    with ThreadPoolExecutor(STREAMS) as pool:
        pieces = [
            pool.submit(copy.take, start)
            for copy in missing
            for start in range(0, max(1, copy.item.size), PIECE_BYTES)
        ]
        done, left = wait(pieces, return_when=FIRST_EXCEPTION)
        for piece in left:
            piece.cancel()
    for piece in done:
        piece.result()
    _forget_all_but({item.uri.removeprefix(root) for item in items}, folder)
    return folder


def _forget_all_but(names: set[str], folder: Path) -> None:
    """Remove copies of what is not there any more: vLLM loads the shards that an index names."""
    notes = folder / ".phi4ray"
    with translated(str(folder)):
        for note in list(notes.rglob("*.etag")):
            name = note.relative_to(notes).as_posix().removesuffix(".etag")
            if name not in names:
                (folder / name).unlink(missing_ok=True)
                note.unlink()


class _Copy:
    """One object on its way into a folder, in pieces that come in any order."""

    def __init__(self, item: ObjectInfo, folder: Path, name: str) -> None:
        if ".." in name.split("/") or name.startswith("/"):
            raise StorageError(f"{item.uri} would be copied out of {folder}: rename it")
        self.item = item
        self._target = folder / name
        self._note = folder / ".phi4ray" / f"{name}.etag"
        self._part = self._target.with_name(f".{self._target.name}.part")
        self._left = -(-max(1, item.size) // PIECE_BYTES)
        self._lock = threading.Lock()
        self._begun = False

    def is_there(self) -> bool:
        """Whether this very object was copied before."""
        # The size, too: a machine that lost power may have kept the name and not the content.
        with translated(str(self._target)):
            return (
                self._target.exists()
                and self._note.exists()
                and self._target.stat().st_size == self.item.size
                and self._note.read_text() == self.item.etag
            )

    def take(self, start: int) -> None:
        """Copy the piece that begins here; the last one to come gives the file its name."""
        end = min(start + PIECE_BYTES, self.item.size)
        uri, etag = self.item.uri, self.item.etag
        data = storage_for(uri).read(uri, start, end, etag=etag) if end else b""
        if len(data) != end - start:
            raise StorageError(f"{uri} became shorter while it was copied: start again")
        with translated(str(self._target)):
            with self._lock:
                self._begin()
            with self._part.open("r+b") as part:
                part.seek(start)
                part.write(data)
            with self._lock:
                self._left -= 1
                if not self._left:
                    self._part.replace(self._target)
                    self._note.write_text(etag)

    def _begin(self) -> None:
        if self._begun:
            return
        for path in (self._target, self._note):
            path.parent.mkdir(parents=True, exist_ok=True)
        with self._part.open("wb") as part:
            os.truncate(part.fileno(), self.item.size)
        self._begun = True


def upload_tree(folder: Path, target: str) -> None:
    """Write every file below a folder under a prefix, over what has the same name there.

    Each file appears whole; that all of them are there is for the caller to say, by a last one.
    """
    files = [
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and ".phi4ray" not in path.relative_to(folder).parts
    ]

    def upload(path: Path) -> None:
        uri = join(target, path.relative_to(folder).as_posix())
        storage_for(uri).write_file(uri, path)

    with ThreadPoolExecutor(STREAMS) as pool:
        list(pool.map(upload, files))
