"""Names: joining them, their one normal form, and the objects that patterns stand for."""

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatchcase

from phi4ray.errors import ConfigError, InputError, ObjectNotFoundError
from phi4ray.storage.base import ObjectInfo, Storage
from phi4ray.storage.local import LocalStorage, path_of
from phi4ray.storage.s3 import SCHEME, S3Storage

ENDINGS = (
    *(f".{kind}{packed}" for kind in ("jsonl", "ndjson") for packed in ("", ".gz", ".zst")),
    ".parquet",
)
"""What input files are called, in small letters or capitals."""

_MAGIC = re.compile(r"[*?\[]")


def storage_for(uri: str) -> Storage:
    """The store that a URI is in.

    Raises:
        ConfigError: there is no such kind of store.
    """
    if uri.startswith(SCHEME):
        return S3Storage()
    normal(uri)
    return LocalStorage()


def normal(uri: str) -> str:
    """The one form of a URI: `s3://bucket/key`, or an absolute path. A final `/` is kept.

    Raises:
        ConfigError: it has another scheme, or no bucket.
    """
    if uri.startswith(SCHEME):
        if not uri.removeprefix(SCHEME).partition("/")[0]:
            raise ConfigError(f"{uri!r} names no bucket")
        return uri
    scheme, separator, _ = uri.partition("://")
    if separator and "/" not in scheme and scheme != "file":
        raise ConfigError(f"{uri!r}: known are s3://, file:// and plain paths")
    return path_of(uri)


def join(uri: str, name: str) -> str:
    """The URI of a name below a folder; with the name "", the folder with its final `/`."""
    return f"{normal(uri).rstrip('/')}/{name}"


def expand(
    patterns: Sequence[str],
    endings: tuple[str, ...] = ENDINGS,
    tell: Callable[[str], object] = lambda line: None,
) -> list[ObjectInfo]:
    """The input files that patterns stand for: files, folders, and globs with `*`, `?`, `[]`, `**`.

    Sorted within a pattern; a file that several patterns name comes once, where it came first.
    In folders and globs, names that begin with `.` or `_` are no inputs, nor is anything in
    folders so called; folders give only files with known endings, and `tell` is told of others.

    Raises:
        InputError: a pattern matches nothing, or a file whose format its name does not tell.
    """
    found: dict[str, ObjectInfo] = {}
    for pattern in patterns:
        matches = list(_matches(normal(pattern), endings, tell))
        if not matches:
            raise InputError(
                f"--input {pattern} matches no file: looked for names that end in "
                f"{', '.join(endings)} and do not begin with '.' or '_'"
            )
        for item in matches:
            if not _known(item.uri, endings):
                raise InputError(
                    f"{item.uri}: its name does not tell its format: known are {', '.join(endings)}"
                )
            found.setdefault(item.uri, item)
    return list(found.values())


def _matches(
    pattern: str, endings: tuple[str, ...], tell: Callable[[str], object]
) -> Iterator[ObjectInfo]:
    storage, magic = storage_for(pattern), _MAGIC.search(pattern)
    if magic and pattern.startswith(SCHEME) and pattern.count("/", 0, magic.start()) == 2:
        raise InputError(f"--input {pattern}: a bucket is named in full, it cannot be a pattern")
    bucket = pattern.startswith(SCHEME) and pattern.count("/") == 2
    folder, named = join(pattern, ""), None
    # A file may be called like a glob, or like a folder; a folder may be called like a glob.
    if not pattern.endswith("/") and not bucket:
        with contextlib.suppress(ObjectNotFoundError):
            named = storage.head(pattern)
    if named is not None:
        # On S3 an object without an ending may be the mark of a folder.
        known = _known(named.uri, endings)
        yield from (not known and list(_inputs(storage, folder, endings, tell))) or [named]
    elif not magic or any(storage.list(folder)):
        yield from _inputs(storage, folder, endings, tell)
    else:
        literal = pattern[: magic.start()]
        root = literal[: literal.rindex("/")].rstrip("/") + "/"
        globs = pattern.removeprefix(root).split("/")
        for item in storage.list(root, literal.removeprefix(root)):
            name = item.uri.removeprefix(root)
            if not _hidden(name) and _fits(name.split("/"), globs):
                yield item


def _inputs(
    storage: Storage, folder: str, endings: tuple[str, ...], tell: Callable[[str], object]
) -> Iterator[ObjectInfo]:
    skipped, example = 0, ""
    for item in storage.list(folder):
        if _hidden(item.uri.removeprefix(folder)):
            continue
        if _known(item.uri, endings):
            yield item
        else:
            skipped, example = skipped + 1, example or item.uri
    if skipped:
        tell(
            f"files skipped below {folder}: {skipped:,} (first: {example}); inputs are named "
            f"{', '.join(endings)}"
        )


def _known(uri: str, endings: tuple[str, ...]) -> bool:
    return uri.lower().endswith(endings)


def _hidden(name: str) -> bool:
    return any(piece.startswith((".", "_")) for piece in name.split("/"))


def _fits(pieces: Sequence[str], globs: Sequence[str]) -> bool:
    """Whether a path fits a glob, piece by piece: only `**` stands for any number of them."""
    if not globs:
        return not pieces
    if globs[0] == "**":
        return any(_fits(pieces[skip:], globs[1:]) for skip in range(len(pieces) + 1))
    return bool(pieces) and fnmatchcase(pieces[0], globs[0]) and _fits(pieces[1:], globs[1:])
