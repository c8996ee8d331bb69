"""S3 and what speaks its protocol. The only importer of boto3.

Only plain atomic PUTs are relied on. `If-None-Match` is used where the server honours it, which
spares overwriting a part with another of the same rows; nothing breaks where it is ignored.
"""

import contextlib
import functools
import hashlib
import io
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

import boto3
import tenacity
from boto3.s3.transfer import TransferConfig
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    CredentialRetrievalError,
    FlexibleChecksumError,
    HTTPClientError,
    IncompleteReadError,
    NoCredentialsError,
    PartialCredentialsError,
    ResponseStreamingError,
)
from botocore.exceptions import (
    ConnectionError as BotoConnectionError,
)

from phi4ray.errors import (
    AccessDeniedError,
    ConfigError,
    ObjectNotFoundError,
    PreconditionError,
    StorageError,
    TransientStorageError,
)
from phi4ray.storage.base import ObjectInfo, Writer
from phi4ray.storage.local import translated

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

SCHEME = "s3://"
DIGEST = "phi4ray-sha256"
"""Name of the user metadata that keeps a content's digest."""

RETRIES = 10
"""How often the client sends a request again, backing off, before it is a transient error."""

MULTIPART_BYTES = 64 << 20
PIECE_BYTES = 8 << 20
"""What is held of an object that comes in pieces. S3 takes 10,000 of them: 80 GB."""
BUFFER_BYTES = 1 << 20
SKIP_BYTES = 4 << 20
"""Seeking forward by less is reading on: cheaper than a new request."""

_ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
_DENIED = {"401", "403", "AccessDenied", "Forbidden", "InvalidAccessKeyId", "SignatureDoesNotMatch",
           "InvalidToken", "AllAccessDisabled"}  # fmt: skip
_EXPIRED = {"ExpiredToken", "ExpiredTokenException", "RequestExpired", "TokenRefreshRequired"}
_MISSING = {"404", "NoSuchKey", "NotFound"}
_PRECONDITION = {"412", "PreconditionFailed"}
_TRANSIENT = {"408", "409", "429", "500", "502", "503", "504", "520", "InternalError", "SlowDown",
              "ServiceUnavailable", "RequestTimeout", "ConditionalRequestConflict",
              "IncompleteBody", "OperationAborted", "Throttling", "ThrottlingException",
              "RequestLimitExceeded", "RequestTimeTooSkewed"}  # fmt: skip
_UNSUPPORTED = {"501", "NotImplemented", "InvalidArgument"}
_CHECKSUMS = ("XAmzContentSHA256Mismatch", "MissingContentLength", "BadDigest", "checksum",
              "aws-chunked", "trailer")  # fmt: skip
_PASSING = (CredentialRetrievalError, FlexibleChecksumError)
_CUT = (IncompleteReadError, ResponseStreamingError, HTTPClientError, BotoConnectionError)


class S3Storage:
    """A `phi4ray.storage.Storage` over `s3://bucket/key`.

    It holds nothing, so that it can be sent to other processes and used after a fork.
    """

    @property
    def _client(self) -> "S3Client":
        with _lock:
            return _client(os.getpid())

    def list(self, prefix: str, begins: str = "") -> Iterator[ObjectInfo]:
        """See `Storage.list`."""
        bucket, key = split(f"{prefix.rstrip('/')}/")  # as `join` writes it: `out//` is `out/`
        pages = self._client.get_paginator("list_objects_v2")
        with _translated(prefix):
            for page in pages.paginate(Bucket=bucket, Prefix=key + begins):
                for found in page.get("Contents", ()):
                    if not found["Key"].endswith("/"):  # a folder's placeholder
                        uri = f"{SCHEME}{bucket}/{found['Key']}"
                        modified_s = found["LastModified"].timestamp()
                        yield ObjectInfo(uri, found["Size"], _etag(found), modified_s)

    def head(self, uri: str) -> ObjectInfo:
        """See `Storage.head`."""
        found = self._head(uri)
        modified_s = found["LastModified"].timestamp()
        return ObjectInfo(uri, found["ContentLength"], _etag(found), modified_s)

    def _head(self, uri: str) -> Any:
        bucket, key = split(uri)
        with _translated(uri):
            return self._client.head_object(Bucket=bucket, Key=key)

    def read(
        self, uri: str, start: int = 0, end: int | None = None, *, etag: str | None = None
    ) -> bytes:
        """See `Storage.read`."""
        if end is not None and end <= start:
            return b""
        with io.BytesIO() as taken:
            _Stream(self._client, uri, etag, start=start, end=end).drain(taken)
            return taken.getvalue()

    def open(self, uri: str, *, etag: str | None = None) -> BinaryIO:
        """See `Storage.open`."""
        found = self.head(uri)
        if etag not in (None, found.etag):
            raise PreconditionError(f"{uri} is no longer the object it was")
        stream = _Stream(self._client, uri, found.etag, size=found.size)
        return cast(BinaryIO, io.BufferedReader(stream, BUFFER_BYTES))

    def write(self, uri: str, data: bytes, *, sha256: str | None = None) -> None:
        """See `Storage.write`. Above 64 MiB in parts, which appear at once at the end."""
        bucket, key = split(uri)
        metadata = {DIGEST: sha256} if sha256 else {}
        with _translated(uri):
            if len(data) > MULTIPART_BYTES:
                self._client.upload_fileobj(
                    io.BytesIO(data),
                    bucket,
                    key,
                    ExtraArgs={"Metadata": metadata},
                    Config=TransferConfig(multipart_threshold=MULTIPART_BYTES),
                )
            else:
                self._client.put_object(Bucket=bucket, Key=key, Body=data, Metadata=metadata)

    def write_file(self, uri: str, path: Path) -> None:
        """See `Storage.write_file`. Above 64 MiB in parts, which appear at once at the end."""
        bucket, key = split(uri)
        with translated(str(path)):
            stream = path.open("rb")
        with stream, _translated(uri):
            self._client.upload_fileobj(
                stream, bucket, key, Config=TransferConfig(multipart_threshold=MULTIPART_BYTES)
            )

    def write_new(self, uri: str, data: bytes, *, sha256: str | None = None) -> None:
        """See `Storage.write_new`. Large objects are looked up first and then written."""
        sha256 = sha256 or hashlib.sha256(data).hexdigest()
        if len(data) <= MULTIPART_BYTES:
            try:
                _unconflicted(self._put_new, uri, data, sha256)
                return
            except PreconditionError:
                # The client may have repeated a request that had been carried out.
                with contextlib.suppress(ObjectNotFoundError):
                    if self._head(uri).get("Metadata", {}).get(DIGEST) == sha256:
                        return
                raise
            except StorageError as error:
                if not _unsupported(error.__cause__):
                    raise
        with contextlib.suppress(ObjectNotFoundError):
            self.head(uri)
            raise PreconditionError(f"{uri} exists already")
        self.write(uri, data, sha256=sha256)

    def _put_new(self, uri: str, data: bytes, sha256: str) -> None:
        bucket, key = split(uri)
        with _translated(uri):
            self._client.put_object(
                Bucket=bucket, Key=key, Body=data, Metadata={DIGEST: sha256}, IfNoneMatch="*"
            )

    @contextlib.contextmanager
    def create(self, uri: str) -> Iterator[Writer]:
        """See `Storage.create`. Holds `PIECE_BYTES`; more goes up in parts of that size.

        A process that dies leaves parts behind: let the bucket's lifecycle rules abort incomplete
        multipart uploads.
        """
        pieces = _Pieces(self._client, uri)
        try:
            yield pieces
            pieces.finish()
        except BaseException:
            pieces.abort()
            raise

    def sha256(self, uri: str) -> str:
        """See `Storage.sha256`."""
        kept = self._head(uri).get("Metadata", {}).get(DIGEST)
        if kept:
            return str(kept)
        with self.open(uri) as stream:
            return hashlib.file_digest(cast(Any, stream), "sha256").hexdigest()

    def delete(self, uri: str) -> None:
        """See `Storage.delete`."""
        bucket, key = split(uri)
        with contextlib.suppress(ObjectNotFoundError), _translated(uri):
            self._client.delete_object(Bucket=bucket, Key=key)


class _Pieces:
    """A `phi4ray.storage.base.Writer`: one PUT, or a multipart upload once there is enough."""

    def __init__(self, client: "S3Client", uri: str) -> None:
        self._client, self._uri = client, uri
        self._bucket, self._key = split(uri)
        self._held = bytearray()
        self._upload: str | None = None
        self._etags: list[str] = []

    def write(self, data: bytes) -> None:
        self._held += data
        while len(self._held) > PIECE_BYTES:
            with memoryview(self._held) as held:
                piece = bytes(held[:PIECE_BYTES])
            self._send(piece)
            del self._held[:PIECE_BYTES]

    def finish(self) -> None:
        if self._upload is None:
            with _translated(self._uri):
                self._client.put_object(Bucket=self._bucket, Key=self._key, Body=bytes(self._held))
            return
        self._send(bytes(self._held))
        parts = [{"PartNumber": n, "ETag": etag} for n, etag in enumerate(self._etags, 1)]
        with _translated(self._uri):
            self._client.complete_multipart_upload(
                Bucket=self._bucket,
                Key=self._key,
                UploadId=self._upload,
                MultipartUpload={"Parts": cast(Any, parts)},
            )

    def abort(self) -> None:
        # What made the caller give up is what matters; parts left behind cost only room.
        if self._upload is not None:
            with contextlib.suppress(ClientError, BotoCoreError):
                self._client.abort_multipart_upload(
                    Bucket=self._bucket, Key=self._key, UploadId=self._upload
                )

    def _send(self, data: bytes) -> None:
        with _translated(self._uri):
            if self._upload is None:
                begun = self._client.create_multipart_upload(Bucket=self._bucket, Key=self._key)
                self._upload = begun["UploadId"]
            sent = self._client.upload_part(
                Bucket=self._bucket,
                Key=self._key,
                UploadId=self._upload,
                PartNumber=len(self._etags) + 1,
                Body=data,
            )
            self._etags.append(sent["ETag"])


class _Stream(io.RawIOBase):
    """An object as a file: one GET that is read on, another one after a far seek or a cut."""

    def __init__(
        self,
        client: "S3Client",
        uri: str,
        etag: str | None,
        *,
        start: int = 0,
        end: int | None = None,
        size: int | None = None,
    ) -> None:
        self._client, self._uri, self._etag = client, uri, etag
        self._position, self._end = start, size if end is None else end
        self._sized = size is not None
        self._body: Any = None
        self._body_at = 0

    def drain(self, into: BinaryIO) -> None:
        """Copy all that is left."""
        buffer = memoryview(bytearray(BUFFER_BYTES))
        while count := self.readinto(buffer):
            into.write(buffer[:count])

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._end or 0}[whence]
        self._position = max(0, base + offset)
        return self._position

    def readinto(self, buffer: Any) -> int:
        if self._end is not None and self._position >= self._end:
            return 0
        view = memoryview(buffer).cast("B")
        with _translated(self._uri):
            data = _resumed(self._read_some, len(view))
        view[: len(data)] = data
        self._position += len(data)
        return len(data)

    def _read_some(self, size: int) -> bytes:
        """Read from the open response, or from a new one that begins here."""
        ahead = self._position - self._body_at
        if self._body is None or not 0 <= ahead <= SKIP_BYTES:
            self._request()
        elif ahead:
            self._skip(ahead)
        try:
            data = bytes(self._body.read(size)) if self._body is not None else b""
        except Exception:
            self._drop()
            raise
        self._body_at += len(data)
        if not data and self._end is not None and self._position < self._end and self._body:
            # A server may close early without an error: then the length tells.
            self._drop()
            raise IncompleteReadError(actual_bytes=self._position, expected_bytes=self._end)
        return data

    def _skip(self, count: int) -> None:
        try:
            self._body_at += len(self._body.read(count))
        except Exception:
            self._drop()
            raise
        if self._body_at != self._position:
            self._request()

    def _request(self) -> None:
        self._drop()
        bucket, key = split(self._uri)
        last = "" if self._end is None else str(self._end - 1)
        condition: dict[str, Any] = {"IfMatch": f'"{self._etag}"'} if self._etag else {}
        # Translated here: the client has retried this, and only cut bodies are to be resumed.
        with _translated(self._uri):
            try:
                response = self._client.get_object(
                    Bucket=bucket, Key=key, Range=f"bytes={self._position}-{last}", **condition
                )
            except ClientError as error:
                if _code(error) not in ("416", "InvalidRange"):
                    raise
                if self._sized:
                    raise PreconditionError(
                        f"{self._uri} became shorter while it was read"
                    ) from error
                return  # the caller asked for bytes behind the object's end
        self._body, self._body_at = response["Body"], self._position
        if self._position and "ContentRange" not in response:
            raise StorageError(f"{self._uri}: the server ignores Range, so it cannot be read from")
        # From here on every byte must be of this object, and all of it must come. Not every
        # server knows If-Match.
        if self._etag and self._etag != _etag(response):
            raise PreconditionError(f"{self._uri} changed while it was read")
        self._etag, self._sized = _etag(response), True
        length = self._position + response["ContentLength"]
        self._end = length if self._end is None else min(self._end, length)

    def _drop(self) -> None:
        if self._body is not None:
            self._body.close()
            self._body = None

    def close(self) -> None:
        if not self.closed:
            self._drop()
        super().close()


_resumed = tenacity.Retrying(
    retry=tenacity.retry_if_exception_type(_CUT),
    wait=tenacity.wait_random_exponential(multiplier=0.1, max=5),
    stop=tenacity.stop_after_attempt(RETRIES),
    reraise=True,
)


def _conflict(error: BaseException) -> bool:
    cause = error.__cause__
    return isinstance(cause, ClientError) and _code(cause) == "ConditionalRequestConflict"


# Two writers at once: S3 asks both to come again, and then tells one that it lost.
_unconflicted = _resumed.copy(retry=tenacity.retry_if_exception(_conflict))


@functools.lru_cache(maxsize=1)
def _client(process: int) -> "S3Client":
    """One client a process: clients serve many threads, but do not survive a fork."""
    custom = any(os.environ.get(name) for name in _ENDPOINTS)
    config = Config(
        retries={"mode": "standard", "max_attempts": RETRIES},
        connect_timeout=10,
        read_timeout=60,
        max_pool_connections=64,
        # Few servers other than AWS have a name for every bucket.
        s3={"addressing_style": "path"} if custom else {},
    )
    try:
        # boto3 alone of AWS's libraries does not know AWS_REGION, which EKS sets.
        session = boto3.Session(region_name=os.environ.get("AWS_REGION") or None)
        region = session.region_name or ("us-east-1" if custom else None)
        return session.client("s3", config=config, region_name=region)
    except CredentialRetrievalError as error:
        raise TransientStorageError(f"{error}: check what gives this node credentials") from error
    except (BotoCoreError, ValueError) as error:
        raise ConfigError(
            f"S3 is not configured: {error}: check AWS_PROFILE, AWS_CONFIG_FILE and "
            "AWS_ENDPOINT_URL, which begins with http:// or https://"
        ) from error


_lock = threading.Lock()


def _renew_lock() -> None:
    global _lock
    _lock = threading.Lock()


# Another thread may hold it while this process forks.
os.register_at_fork(after_in_child=_renew_lock)


def split(uri: str) -> tuple[str, str]:
    """Bucket and key of a URI. Keys are taken as they are: nothing in a URI is an escape."""
    bucket, _, key = uri.removeprefix(SCHEME).partition("/")
    return bucket, key


def _etag(found: Any) -> str:
    return str(found.get("ETag", "")).removeprefix("W/").strip('"')


def _code(error: ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


def _unsupported(error: BaseException | None) -> bool:
    return isinstance(error, ClientError) and (
        _code(error) in _UNSUPPORTED or "if-none-match" in str(error).lower()
    )


@contextlib.contextmanager
def _translated(uri: str) -> Iterator[None]:
    try:
        yield
    except (NoCredentialsError, PartialCredentialsError) as error:
        _client.cache_clear()  # credentials are looked for once a client
        raise AccessDeniedError(
            f"{uri}: there are no S3 credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
            "AWS_PROFILE, or give the node a role"
        ) from error
    except ClientError as error:
        raise _of_client_error(uri, error) from error
    except _CUT as error:
        used = next((name for name in _ENDPOINTS if os.environ.get(name)), _ENDPOINTS[-1])
        raise TransientStorageError(
            f"{uri}: {error}: check the network, and {used}={os.environ.get(used, '(not set)')}"
        ) from error
    except _PASSING as error:
        raise TransientStorageError(f"{uri}: {error}") from error
    except BotoCoreError as error:
        raise StorageError(f"{uri}: {error}") from error


def _expired(error: ClientError) -> bool:
    # The answer to a HEAD has no body that could name the reason.
    return _code(error) in _EXPIRED or (error.operation_name, _code(error)) == ("HeadObject", "400")


def _of_client_error(uri: str, error: ClientError) -> StorageError:
    code, bucket = _code(error), split(uri)[0]
    status = str(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", ""))
    if code == "NoSuchBucket":  # no missing object: nothing can be written there either
        return StorageError(f"{uri}: there is no bucket {bucket}: create it, or correct its name")
    if code in _MISSING:
        return ObjectNotFoundError(f"there is no object {uri}")
    if code in _PRECONDITION:
        return PreconditionError(f"{uri} is not the expected object, or exists already")
    text = str(error)
    if _expired(error):
        _client.cache_clear()  # the next one reads credentials files anew
        return TransientStorageError(
            f"{uri}: {text}: the credentials may have expired: renew them, in their file or as "
            "AWS_SESSION_TOKEN, and run the same command again"
        )
    if code in _DENIED:
        return AccessDeniedError(
            f"{uri}: {text}: check that AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, "
            f"AWS_SESSION_TOKEN and AWS_ENDPOINT_URL are right for bucket {bucket}, and what its "
            "policy allows"
        )
    if any(word.lower() in text.lower() for word in _CHECKSUMS):
        return StorageError(
            f"{uri}: {text}. Some S3 servers refuse the checksums that newer clients send: set "
            "AWS_REQUEST_CHECKSUM_CALCULATION=when_required and "
            "AWS_RESPONSE_CHECKSUM_VALIDATION=when_required"
        )
    if code in _TRANSIENT or status in _TRANSIENT:
        return TransientStorageError(f"{uri}: {text}")
    return StorageError(f"{uri}: {text}")
