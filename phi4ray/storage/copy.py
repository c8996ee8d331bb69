"""Copying folders of objects to this machine and from it: checkpoints."""

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from phi4ray.errors import ObjectNotFoundError, StorageError
from phi4ray.storage.base import ObjectInfo
from phi4ray.storage.local import translated
from phi4ray.storage.uris import join, storage_for

STREAMS = 16


def copy_tree(source: str, folder: Path) -> Path:
    """Copy everything below a prefix into a folder; files that are there already are not read.

    A file appears under its name only when it is whole, and its etag is kept beside it, so that a
    copy that was cut off goes on where it was, and a changed object is copied again.

    Raises:
        ObjectNotFoundError: there is nothing below the prefix.
        StorageError: this machine cannot hold the files, or a name leads out of the folder.
    """
    root = join(source, "")
    items = list(storage_for(root).list(root))
    if not items:
        raise ObjectNotFoundError(f"there is nothing under {root}")

    def copy(item: ObjectInfo) -> None:
        name = item.uri.removeprefix(root)
        if ".." in name.split("/") or name.startswith("/"):
            raise StorageError(f"{item.uri} would be copied out of {folder}: rename it")
        target = folder / name
        note = folder / ".phi4ray" / f"{name}.etag"
        with translated(str(target)):
            if _is_copy(target, note, item):
                return
            for path in (target, note):
                path.parent.mkdir(parents=True, exist_ok=True)
            part = target.with_name(f".{target.name}.part")
            with (
                storage_for(item.uri).open(item.uri, etag=item.etag) as stream,
                part.open("wb") as copied,
            ):
                shutil.copyfileobj(stream, copied, 8 << 20)
            part.replace(target)
            note.write_text(item.etag)

    with ThreadPoolExecutor(STREAMS) as pool:
        list(pool.map(copy, items))
    return folder


def _is_copy(target: Path, note: Path, item: ObjectInfo) -> bool:
    # The size, too: a machine that lost power may have kept the name and not the content.
    return (
        target.exists()
        and note.exists()
        and target.stat().st_size == item.size
        and note.read_text() == item.etag
    )


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
