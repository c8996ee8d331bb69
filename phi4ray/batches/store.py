"""Where files and batches lie in the store, and the reading and writing of their records.

    files/<owner>/<file>.json          a file's record: the door, or the runner for its results
    contents/<owner>/<file>.jsonl      an upload's content: the door, before the record
    requests/<owner>/<batch>.json      what was asked for: the door, once
    open/<owner>/<batch>               it has not ended: the door, before the request; the runner
                                       removes it as the last thing that it does
    cancels/<owner>/<batch>            it is to be cancelled: the door
    states/<owner>/<batch>.json        how far it is: the runner alone
    ends/<owner>/<batch>.json          how it ended: the runner, once
    answers/<owner>/<batch>/           the batch job's output prefix: the runner

Every object is written by one plain PUT, and is either immutable or has one writer. While one
runner is being replaced, two may be at work: an end stands whatever either writes of how far it is.
"""

import contextlib
import logging
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple, ParamSpec, TypeVar
from urllib.parse import quote

from pydantic import ValidationError

from phi4ray.batch.executor import threaded
from phi4ray.batches.records import (
    BATCH_ID,
    FILE_ID,
    BatchRequest,
    BatchState,
    FileRecord,
    Piece,
)
from phi4ray.config import Config
from phi4ray.errors import (
    ObjectNotFoundError,
    PreconditionError,
    StorageError,
    TransientStorageError,
)
from phi4ray.storage import TEMPORARY, ObjectInfo, join, storage_for

P = ParamSpec("P")
T = TypeVar("T")
R = TypeVar("R", bound=Config)

logger = logging.getLogger(__name__)


class Key(NamedTuple):
    """One batch, or one file: the folder of its owner, and its id."""

    owner: str
    id: str


def owner_of(tenant: str | None) -> str:
    """The folder of a tenant's files and batches; None where no keys are asked for."""
    return "everyone" if tenant is None else f"tenant-{quote(tenant, safe='')}"


def readable(read: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | StorageError:
    """What a call reads, or why this version cannot: a newer one may have written it.

    Raises:
        TransientStorageError: the store failed, which says nothing of what is in it.
    """
    try:
        return read(*args, **kwargs)
    except TransientStorageError:
        raise
    except StorageError as error:
        logger.error("passed over: %s", error)
        return error


class Store:
    """The records below one root. Methods block, and raise what `phi4ray.storage.Storage`'s do."""

    def __init__(self, root: str) -> None:
        """Raises:
        ConfigError: there is no such kind of store.
        """
        self.root = join(root, "")
        self.storage = storage_for(self.root)

    def uri(self, name: str) -> str:
        """The URI of a name below the root."""
        return join(self.root, name)

    # Files

    def content_name(self, owner: str, file_id: str) -> str:
        """Where an upload's content lies, below the root."""
        return f"contents/{owner}/{file_id}.jsonl"

    def write_file(self, owner: str, record: FileRecord) -> None:
        """Make a file known. Its content is there."""
        self._write(f"files/{owner}/{record.id}.json", record)

    def file(self, owner: str, file_id: str) -> FileRecord | None:
        """A file's record."""
        return self._read(f"files/{owner}/{file_id}.json", FileRecord)

    def file_ids(self, owner: str) -> list[str]:
        """The ids of an owner's files, oldest first."""
        return [key.id for key in self._keys("files/", FILE_ID, ".json", owner)]

    def delete_file(self, owner: str, record: FileRecord) -> None:
        """Forget a file, and then remove its content."""
        self.storage.delete(self.uri(f"files/{owner}/{record.id}.json"))
        threaded(self.storage.delete, [self.uri(piece.name) for piece in record.pieces])

    def all_files(self) -> tuple[dict[Key, FileRecord], set[Key]]:
        """Every owner's files, and those whose records cannot be read."""

        keys = list(self._keys("files/", FILE_ID, ".json"))
        records = threaded(lambda key: readable(self.file, key.owner, key.id), keys)
        found = dict(zip(keys, records, strict=True))
        return (
            {key: record for key, record in found.items() if isinstance(record, FileRecord)},
            {key for key, record in found.items() if isinstance(record, StorageError)},
        )

    def contents(self) -> list[Key]:
        """Owner and file id of every upload's content, whether it has a record or not."""
        return list(self._keys("contents/", FILE_ID, ".jsonl"))

    def unfinished(self) -> list[ObjectInfo]:
        """Uploads' contents that are not whole; a process that was killed leaves its own."""
        found = self._list("contents/")
        return [item for item in found if item.uri.rpartition("/")[2].startswith(TEMPORARY)]

    # Batches

    def create_batch(self, owner: str, request: BatchRequest) -> None:
        """Take a batch: from here on it will be carried through, whatever dies.

        A mark without a request, which a crash may leave, is nothing to anybody.
        """
        self.storage.write(self.uri(f"open/{owner}/{request.id}"), b"")
        self._write(f"requests/{owner}/{request.id}.json", request)

    def request(self, key: Key) -> BatchRequest | None:
        """What was asked for."""
        return self._read(f"requests/{key.owner}/{key.id}.json", BatchRequest)

    def batch_ids(self, owner: str) -> list[str]:
        """The ids of an owner's batches, oldest first."""
        return [key.id for key in self._keys("requests/", BATCH_ID, ".json", owner)]

    def state(self, key: Key) -> BatchState:
        """How far a batch is, or how it ended."""
        for folder in ("ends", "states"):
            if found := self._read(f"{folder}/{key.owner}/{key.id}.json", BatchState):
                return found
        return BatchState()

    def write_state(self, key: Key, state: BatchState) -> None:
        """Write how far a batch is, which has not ended: for the runner."""
        self._write(f"states/{key.owner}/{key.id}.json", state)

    def end_batch(self, key: Key, state: BatchState) -> BatchState:
        """Write how a batch ended, for the runner; gives the end that stands.

        Where the store can refuse to overwrite, that is the first of two runners' ends; where it
        cannot, it may be either.
        """
        with contextlib.suppress(PreconditionError):
            self.storage.write_new(self.uri(f"ends/{key.owner}/{key.id}.json"), _bytes(state))
        return self.state(key)

    def cancel(self, key: Key, now_s: float) -> None:
        """Ask the runner to cancel a batch."""
        self.storage.write(self.uri(f"cancels/{key.owner}/{key.id}"), str(int(now_s)).encode())

    def cancel_at(self, key: Key) -> int | None:
        """When a batch was cancelled; None also once it has ended."""
        uri = self.uri(f"cancels/{key.owner}/{key.id}")
        try:
            return int(self.storage.read(uri))
        except ObjectNotFoundError:
            return None
        except ValueError as error:
            raise _no_record(uri) from error

    def cancels(self) -> set[Key]:
        """The batches to be cancelled."""
        return set(self._keys("cancels/", BATCH_ID))

    def open_batches(self, owner: str | None = None) -> list[Key]:
        """The batches that have not ended, of one owner or all, oldest first."""
        found = self._keys("open/", BATCH_ID, owner=owner)
        return sorted(found, key=lambda key: (key.id, key.owner))

    def reader_of(self, owner: str, file_id: str) -> str | None:
        """A batch that has not ended and reads this file."""

        def reads(key: Key) -> bool:
            request = self.request(key)
            mine = request is not None and request.input_file_id == file_id
            return mine and not self.state(key).ended

        for key in self.open_batches(owner):
            if readable(reads, key) is True:  # one that cannot be read nobody can run either
                return key.id
        return None

    def close_batch(self, key: Key) -> None:
        """Note that there is nothing left to do for a batch."""
        self.storage.delete(self.uri(f"cancels/{key.owner}/{key.id}"))
        self.storage.delete(self.uri(f"open/{key.owner}/{key.id}"))

    def answers(self, key: Key) -> str:
        """The output prefix of a batch's job."""
        return self.uri(f"answers/{key.owner}/{key.id}")

    def all_answers(self) -> dict[Key, list[str]]:
        """The names of all objects of all batches' answers."""
        found: dict[Key, list[str]] = {}
        for item in self._list("answers/"):
            name = item.uri.removeprefix(self.root)
            _, owner, batch_id, *_ = *name.split("/"), "", ""
            if BATCH_ID.fullmatch(batch_id):
                found.setdefault(Key(owner, batch_id), []).append(name)
        return found

    def pieces(self, key: Key, ending: str) -> tuple[Piece, ...]:
        """The objects of a batch's answers whose names end so, in order."""
        return tuple(
            Piece(name=item.uri.removeprefix(self.root), size=item.size)
            for item in self._list(f"answers/{key.owner}/{key.id}/")
            if item.uri.endswith(ending)
        )

    def keep_only(self, key: Key, pieces: set[str]) -> None:
        """Remove all of a batch's answers but these pieces, given by name."""
        found = [item.uri for item in self._list(f"answers/{key.owner}/{key.id}/")]
        threaded(
            self.storage.delete, [uri for uri in found if uri.removeprefix(self.root) not in pieces]
        )

    def _keys(
        self, folder: str, form: re.Pattern[str], ending: str = "", owner: str | None = None
    ) -> Iterator[Key]:
        """Owners and ids below a folder; what else lies there, as half a file, is no record."""
        prefix = self.uri(folder)
        for item in self._list(folder if owner is None else f"{folder}{owner}/"):
            whose, _, name = item.uri.removeprefix(prefix).partition("/")
            identifier = name.removesuffix(ending)
            if name.endswith(ending) and form.fullmatch(identifier):
                yield Key(whose, identifier)

    def _list(self, folder: str) -> Iterator[ObjectInfo]:
        return self.storage.list(self.uri(folder))

    def _write(self, name: str, record: Config) -> None:
        self.storage.write(self.uri(name), _bytes(record))

    def _read(self, name: str, model: type[R]) -> R | None:
        uri = self.uri(name)
        try:
            return model.model_validate_json(self.storage.read(uri))
        except ObjectNotFoundError:
            return None
        except ValidationError as error:
            raise _no_record(uri) from error


def _bytes(record: Config) -> bytes:
    return record.model_dump_json(exclude_none=True).encode()


def _no_record(uri: str) -> StorageError:
    return StorageError(f"{uri} is no record that this version of phi4ray wrote: remove it")
