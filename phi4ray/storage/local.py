"""Files of this machine, or of a mounted file system."""

import contextlib
import errno
import hashlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from phi4ray.errors import (
    AccessDeniedError,
    ObjectNotFoundError,
    PreconditionError,
    StorageError,
    TransientStorageError,
)
from phi4ray.storage.base import ObjectInfo

_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EMLINK, errno.ENOSYS)


class LocalStorage:
    """A `phi4ray.storage.Storage` over absolute paths. A rename is what makes writes atomic."""

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """See `Storage.list`."""
        with _translated(prefix):
            found = [
                os.path.join(folder, name)
                for folder, _, names in os.walk(prefix, onerror=_unless_missing)
                for name in names
            ]
        for path in sorted(found):
            with contextlib.suppress(ObjectNotFoundError):  # removed meanwhile
                yield self.head(path)

    def head(self, uri: str) -> ObjectInfo:
        """See `Storage.head`."""
        with _translated(uri):
            return _info(uri, os.stat(uri))

    def read(
        self, uri: str, start: int = 0, end: int | None = None, *, etag: str | None = None
    ) -> bytes:
        """See `Storage.read`."""
        with _translated(uri), self.open(uri, etag=etag) as stream:
            stream.seek(start)
            return stream.read() if end is None else stream.read(max(0, end - start))

    def open(self, uri: str, *, etag: str | None = None) -> BinaryIO:
        """See `Storage.open`. The stream stays on the content that it was opened on."""
        with _translated(uri):
            stream = Path(uri).open("rb")  # noqa: SIM115
            found = _info(uri, os.fstat(stream.fileno())).etag
        if etag not in (None, found):
            stream.close()
            raise PreconditionError(f"{uri} is no longer the file it was")
        return stream

    def write(self, uri: str, data: bytes, *, sha256: str | None = None) -> None:
        """See `Storage.write`."""
        with _translated(uri), _written_beside(uri, data) as temporary:
            os.replace(temporary, uri)

    def write_new(self, uri: str, data: bytes, *, sha256: str | None = None) -> None:
        """See `Storage.write_new`; the check is atomic where the file system has hard links."""
        with _translated(uri), _written_beside(uri, data) as temporary:
            try:
                os.link(temporary, uri)
            except OSError as error:
                if error.errno not in _NO_LINKS:
                    raise
                if os.path.exists(uri):
                    raise FileExistsError(error.errno, "it exists", uri) from error
                os.replace(temporary, uri)

    def sha256(self, uri: str) -> str:
        """See `Storage.sha256`."""
        with _translated(uri), Path(uri).open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()

    def delete(self, uri: str) -> None:
        """See `Storage.delete`."""
        with _translated(uri):
            Path(uri).unlink(missing_ok=True)


def _info(uri: str, found: os.stat_result) -> ObjectInfo:
    if os.path.isdir(uri):
        raise FileNotFoundError(errno.ENOENT, "is a folder", uri)
    return ObjectInfo(uri, found.st_size, f"{found.st_mtime_ns:x}-{found.st_size:x}")


@contextlib.contextmanager
def _written_beside(uri: str, data: bytes) -> Iterator[str]:
    """A complete file in the target's folder, under a name that no reader takes for data."""
    folder = os.path.dirname(uri)
    os.makedirs(folder, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=".phi4ray-", dir=folder)
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(temporary, 0o666 & ~_UMASK)
        yield temporary
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


_UMASK = _umask()


def _unless_missing(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        raise error


@contextlib.contextmanager
def _translated(uri: str) -> Iterator[None]:
    try:
        yield
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise ObjectNotFoundError(f"there is no file {uri}") from error
    except FileExistsError as error:
        raise PreconditionError(f"{uri} exists already") from error
    except PermissionError as error:
        raise AccessDeniedError(f"{uri}: {error.strerror}: check the file's permissions") from error
    except OSError as error:
        if error.errno in (errno.EIO, errno.ESTALE, errno.EAGAIN, errno.ETIMEDOUT):
            raise TransientStorageError(f"{uri}: {error.strerror}") from error
        raise StorageError(f"{uri}: {error.strerror}: make room or choose another place") from error
