"""Files of this machine, or of a mounted file system."""

import contextlib
import errno
import hashlib
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from phi4ray.errors import (
    AccessDeniedError,
    ObjectNotFoundError,
    PreconditionError,
    StorageError,
    TransientStorageError,
)
from phi4ray.storage.base import TEMPORARY, ObjectInfo, Writer

_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EMLINK, errno.ENOSYS)


def path_of(uri: str) -> str:
    """The absolute path that a plain path or a `file://` URI means; a final `/` is kept."""
    path = uri.removeprefix("file://")
    return os.path.abspath(path) + ("/" if path.endswith("/") and path != "/" else "")


class LocalStorage:
    """A `phi4ray.storage.Storage` over files. A rename is what makes writes atomic.

    Paths may be relative or `file://` URIs; what is given back is always an absolute path.
    """

    def list(self, prefix: str, begins: str = "") -> Iterator[ObjectInfo]:
        """See `Storage.list`. Links to folders are followed, unless they lead back to one above."""
        root = path_of(prefix)
        with translated(root):
            found = sorted(_files_below(root, begins))
        for path in found:
            with contextlib.suppress(ObjectNotFoundError):  # removed meanwhile
                yield self.head(path)

    def head(self, uri: str) -> ObjectInfo:
        """See `Storage.head`."""
        path = path_of(uri)
        with translated(path):
            return _info(path, os.stat(path))

    def read(
        self, uri: str, start: int = 0, end: int | None = None, *, etag: str | None = None
    ) -> bytes:
        """See `Storage.read`."""
        with self.open(uri, etag=etag) as stream, translated(path_of(uri)):
            stream.seek(start)
            return stream.read() if end is None else stream.read(max(0, end - start))

    def open(self, uri: str, *, etag: str | None = None) -> BinaryIO:
        """See `Storage.open`. The stream stays on the content that it was opened on."""
        path = path_of(uri)
        with translated(path):
            stream = Path(path).open("rb")  # noqa: SIM115
            found = _info(path, os.fstat(stream.fileno())).etag
        if etag not in (None, found):
            stream.close()
            raise PreconditionError(f"{path} is no longer the file it was")
        return stream

    def write(self, uri: str, data: bytes, *, sha256: str | None = None) -> None:
        """See `Storage.write`."""
        path = path_of(uri)
        with translated(path), _written_beside(path, data) as temporary:
            os.replace(temporary, path)

    def write_file(self, uri: str, path: Path) -> None:
        """See `Storage.write_file`."""
        target = path_of(uri)
        with translated(str(path)):
            source = path.open("rb")
        with source, translated(target), _written_beside(target, source) as temporary:
            os.replace(temporary, target)

    def write_new(self, uri: str, data: bytes, *, sha256: str | None = None) -> None:
        """See `Storage.write_new`; the check is atomic where the file system has hard links."""
        path = path_of(uri)
        with translated(path), _written_beside(path, data) as temporary:
            try:
                os.link(temporary, path)
            except FileExistsError as error:
                raise PreconditionError(f"{path} exists already") from error
            except OSError as error:
                if error.errno not in _NO_LINKS:
                    raise
                if os.path.exists(path):
                    raise PreconditionError(f"{path} exists already") from error
                os.replace(temporary, path)

    @contextlib.contextmanager
    def create(self, uri: str) -> Iterator[Writer]:
        """See `Storage.create`."""
        path = path_of(uri)
        with contextlib.ExitStack() as stack:
            with translated(path):
                stream, temporary = stack.enter_context(_beside(path))
            yield _Pieces(stream, path)
            with translated(path):
                _finish(stream, temporary)
                os.replace(temporary, path)

    def sha256(self, uri: str) -> str:
        """See `Storage.sha256`."""
        with self.open(uri) as stream, translated(path_of(uri)):
            return hashlib.file_digest(cast(Any, stream), "sha256").hexdigest()

    def delete(self, uri: str) -> None:
        """See `Storage.delete`."""
        path = path_of(uri)
        with translated(path):
            Path(path).unlink(missing_ok=True)


def _info(path: str, found: os.stat_result) -> ObjectInfo:
    if stat.S_ISDIR(found.st_mode):
        raise FileNotFoundError(errno.ENOENT, "is a folder", path)
    etag = f"{found.st_mtime_ns:x}-{found.st_size:x}"
    return ObjectInfo(path, found.st_size, etag, found.st_mtime)


def _files_below(root: str, begins: str) -> Iterator[str]:
    around = {root: frozenset({os.path.realpath(root)})}
    for folder, folders, names in os.walk(root, onerror=_unless_missing, followlinks=True):
        if folder == root:
            names = [name for name in names if name.startswith(begins)]
            folders[:] = [name for name in folders if name.startswith(begins)]
        yield from (os.path.join(folder, name) for name in names)
        known = around.pop(folder)
        inner = {name: os.path.realpath(os.path.join(folder, name)) for name in folders}
        folders[:] = [name for name in folders if inner[name] not in known]
        for name in folders:
            around[os.path.join(folder, name)] = known | {inner[name]}


class _Pieces:
    """See `phi4ray.storage.base.Writer`."""

    def __init__(self, stream: BinaryIO, path: str) -> None:
        self._stream, self._path = stream, path

    def write(self, data: bytes) -> None:
        with translated(self._path):
            self._stream.write(data)


@contextlib.contextmanager
def _written_beside(path: str, data: bytes | BinaryIO) -> Iterator[str]:
    """A complete file in the target's folder, under a name that no reader takes for data."""
    with _beside(path) as (stream, temporary):
        if isinstance(data, bytes):
            stream.write(data)
        else:
            shutil.copyfileobj(data, stream, 8 << 20)
        _finish(stream, temporary)
        yield temporary


@contextlib.contextmanager
def _beside(path: str) -> Iterator[tuple[BinaryIO, str]]:
    """An open file in the target's folder, and its name; it is gone when the block ends."""
    folder = os.path.dirname(path)
    try:
        os.makedirs(folder, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise StorageError(f"{path}: a file stands where its folder should be") from error
    if os.path.isdir(path):
        raise StorageError(f"{path} is a folder: choose another name")
    handle, temporary = tempfile.mkstemp(prefix=TEMPORARY, dir=folder)
    try:
        with os.fdopen(handle, "wb") as stream:
            yield stream, temporary
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)


def _finish(stream: BinaryIO, temporary: str) -> None:
    stream.flush()
    os.fsync(stream.fileno())
    stream.close()
    os.chmod(temporary, 0o666 & ~_UMASK)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


_UMASK = _umask()


def _unless_missing(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        raise error


@contextlib.contextmanager
def translated(uri: str) -> Iterator[None]:
    """Turn the system's errors about a file into ours."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise ObjectNotFoundError(f"there is no file {uri}") from error
    except PermissionError as error:
        raise AccessDeniedError(f"{uri}: {error.strerror}: check the file's permissions") from error
    except OSError as error:
        if error.errno in (errno.EIO, errno.ESTALE, errno.EAGAIN, errno.ETIMEDOUT):
            raise TransientStorageError(f"{uri}: {error.strerror}") from error
        raise StorageError(f"{uri}: {error.strerror}: make room or choose another place") from error
