"""Names: joining them, their one normal form, and the objects that patterns stand for."""

import os
import re
from collections.abc import Iterator, Sequence

from phi4ray.errors import ConfigError, InputError, ObjectNotFoundError
from phi4ray.storage.base import ObjectInfo, Storage
from phi4ray.storage.local import LocalStorage
from phi4ray.storage.s3 import SCHEME, S3Storage

ENDINGS = (
    *(f".{kind}{packed}" for kind in ("jsonl", "ndjson") for packed in ("", ".gz", ".zst")),
    ".parquet",
)
"""What input files are called."""

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
    if separator and scheme.isalnum() and scheme != "file":
        raise ConfigError(f"{uri!r}: known are s3://, file:// and plain paths")
    path = uri.removeprefix("file://")
    return os.path.abspath(path) + ("/" if path.endswith("/") and path != "/" else "")


def join(uri: str, name: str) -> str:
    """The URI of a name below a folder; with the name "", the folder with its final `/`."""
    return f"{normal(uri).rstrip('/')}/{name}"


def expand(patterns: Sequence[str]) -> list[ObjectInfo]:
    """The input files that patterns stand for: files, folders, and globs with `*`, `?`, `[]`, `**`.

    Sorted within a pattern; a file that several patterns name comes once, where it came first.
    In folders and globs, names that begin with `.` or `_` are no inputs, nor is anything in
    folders so called; folders give only files with known endings.

    Raises:
        InputError: a pattern matches nothing, or a file whose format its name does not tell.
    """
    found: dict[str, ObjectInfo] = {}
    for pattern in patterns:
        matches = list(_matches(normal(pattern)))
        if not matches:
            raise InputError(
                f"--input {pattern} matches no file: looked for names that end in "
                f"{', '.join(ENDINGS)} and do not begin with '.' or '_'"
            )
        for item in matches:
            if not item.uri.endswith(ENDINGS):
                raise InputError(
                    f"{item.uri}: its name does not tell its format: known are {', '.join(ENDINGS)}"
                )
            found.setdefault(item.uri, item)
    return list(found.values())


def _matches(pattern: str) -> Iterator[ObjectInfo]:
    storage = storage_for(pattern)
    if not pattern.endswith("/"):
        # A file may be called like a glob, or like a folder.
        try:
            yield storage.head(pattern)
            return
        except ObjectNotFoundError:
            pass
    magic = _MAGIC.search(pattern)
    if not magic:
        root = join(pattern, "")
        for item in storage.list(root):
            if item.uri.endswith(ENDINGS) and not _hidden(item.uri.removeprefix(root)):
                yield item
        return
    root = pattern[: pattern.rindex("/", 0, magic.start()) + 1]
    expression = re.compile(_translate(pattern.removeprefix(root)))
    for item in storage.list(root):
        name = item.uri.removeprefix(root)
        if expression.fullmatch(name) and not _hidden(name):
            yield item


def _hidden(name: str) -> bool:
    return any(piece.startswith((".", "_")) for piece in name.split("/"))


def _translate(pattern: str) -> str:
    """A glob as a regular expression: only `**` crosses a `/`."""
    result = ""
    for piece in re.findall(r"\*\*/|\*\*|\*|\?|\[[^]]+\]|.", pattern, re.DOTALL):
        match piece:
            case "**/":
                result += "(?:.*/)?"
            case "**":
                result += ".*"
            case "*":
                result += "[^/]*"
            case "?":
                result += "[^/]"
            case _ if len(piece) > 1:
                inner = piece[1:-1].replace("\\", "\\\\")
                result += f"[^{inner[1:]}]" if inner[0] == "!" else f"[{inner}]"
            case _:
                result += re.escape(piece)
    return result
