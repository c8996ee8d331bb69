"""What an object store is to phi4ray: whole objects, written at once, listed by prefix."""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Protocol

TEMPORARY = ".phi4ray-"
"""So begins, in a store of files, the name of what is not whole yet. A kill leaves it there."""


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """One object. `etag` changes whenever the content does; it is the store's own, not a digest.

    `modified_s`: when it was last written, in Unix seconds by the store's clock.
    """

    uri: str
    size: int
    etag: str
    modified_s: float = field(compare=False)  # stores tell it more or less exactly


class Writer(Protocol):
    """Takes the content of one object, piece by piece."""

    def write(self, data: bytes) -> None:
        """Append to the content; may wait for the store. Raises what `Storage`'s methods do."""
        ...


class Storage(Protocol):
    """One kind of store. Every method may raise, besides what it names:

    AccessDeniedError: credentials are missing or do not suffice.
    TransientStorageError: still failing after the client's own retries.
    StorageError: any other refusal, and a bucket that is not there.
    """

    def list(self, prefix: str, begins: str = "") -> Iterator[ObjectInfo]:
        """Objects below a prefix taken as a folder, by name; none if there is no such folder.

        However many `/` end the prefix, it is the folder that `join` writes to. Of what is in it,
        `begins` leaves only names that begin so.

        Cost: one request for each 1,000 objects.
        """
        ...

    def head(self, uri: str) -> ObjectInfo:
        """Look one object up.

        Raises:
            ObjectNotFoundError: there is none.
        """
        ...

    def read(
        self, uri: str, start: int = 0, end: int | None = None, *, etag: str | None = None
    ) -> bytes:
        """Bytes `[start, end)` of an object, up to its end if that comes first.

        Raises:
            ObjectNotFoundError: there is none.
            PreconditionError: its etag is another one.
        """
        ...

    def open(self, uri: str, *, etag: str | None = None) -> BinaryIO:
        """A buffered, seekable stream over an object.

        Cost: one look-up, and one request for all that is read on without a far seek.

        Raises:
            ObjectNotFoundError: there is none.
            PreconditionError: its etag is another one, now or at a later read.
        """
        ...

    def write(self, uri: str, data: bytes, *, sha256: str | None = None) -> None:
        """Write an object atomically: readers see the old content or the new one, whole.

        `sha256` is the content's hex digest, kept with the object where the store can.
        """
        ...

    def write_file(self, uri: str, path: Path) -> None:
        """Write a file's content to an object, atomically, without holding it in memory."""
        ...

    def write_new(self, uri: str, data: bytes, *, sha256: str | None = None) -> None:
        """Write an object unless it exists; atomic, but the check may race where the store lets it.

        Raises:
            PreconditionError: it exists already.
        """
        ...

    def create(self, uri: str) -> AbstractContextManager[Writer]:
        """Write an object whose content comes in pieces; what is held of it in memory is bounded.

        The object appears, whole, when the block ends; it does not if the block raises. The
        writer may be used from any thread, one at a time.
        """
        ...

    def sha256(self, uri: str) -> str:
        """The hex digest of an object's content; free where it was kept, else one full read.

        Raises:
            ObjectNotFoundError: there is none.
        """
        ...

    def delete(self, uri: str) -> None:
        """Remove an object, if it is there."""
        ...
