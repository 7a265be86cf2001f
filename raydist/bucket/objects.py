"""One bucket: the few operations that raydist needs of it, tried again where the network or the server fails.

`create` and `replace` are conditional: of two writers one wins, and the other knows it. All else may be done
twice without harm.
"""

from __future__ import annotations

import functools
import os
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import tenacity

from raydist.errors import StorageError

if TYPE_CHECKING:
    from obstore.store import ObjectStore

T = TypeVar("T")

SCHEMES = {"s3": "s3", "gs": "gs", "az": "az", "abfs": "az"}
"""What a storage URI may begin with, and the name of it in a mirror."""

TRIES = 12
LEAST_WAIT, MOST_WAIT = 0.2, 10.0
"""Seconds before the second try, and between two later ones at most; each is shortened at random."""
CONNECT_SECONDS, READ_SECONDS = 10, 60
CHUNK_BYTES = 16 * 2**20
"""Of an upload in parts and of a download."""
MULTIPART_BYTES = 64 * 2**20
"""Larger files are sent in parts."""

retried: dict[str, int] = {}
"""How often this process tried a request again, by what it was for; for the records of a run."""
_count = threading.Lock()


class Exists(Exception):
    """`create` found an object there, of another content."""


class Changed(Exception):
    """`replace` found another version than the one it was to replace, or none."""


class Missing(Exception):
    """There is no such object."""


@dataclass(frozen=True)
class Version:
    """Of an object: what `replace` compares. Stores use the one, the other, or both."""

    e_tag: str | None
    version: str | None = None

    def as_mode(self) -> dict[str, str]:
        return {key: value for key, value in vars(self).items() if value is not None}


@dataclass(frozen=True)
class Listed:
    """key: in the bucket.  size: bytes.  modified: by the server's clock."""

    key: str
    size: int
    modified: datetime
    version: Version


class Bucket:
    """uri: of the bucket, s3://name. Keys have no leading slash."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self._store = _open(uri)

    # --- reading -----------------------------------------------------------------------------------

    def get(self, key: str) -> tuple[bytes, Version]:
        """Raises Missing."""
        import obstore

        def read() -> tuple[bytes, Version]:
            result = obstore.get(self._store, key)
            content = bytes(result.bytes())
            return _whole(content, result.meta["size"]), _version(result.meta)

        return self._try("GET", key, read)

    def download(self, key: str, path: Path, hash_: Any = None) -> int:
        """Into a file; returns its size. hash_: has `reset` and `update`; sees every byte. Raises Missing."""
        import obstore

        def read() -> int:
            result, size = obstore.get(self._store, key), 0
            if hash_ is not None:
                hash_.reset()
            with path.open("wb") as stream:
                for chunk in result.stream(min_chunk_size=CHUNK_BYTES):
                    view = memoryview(chunk)
                    if hash_ is not None:
                        hash_.update(view)
                    stream.write(view)
                    size += len(view)
            if size != result.meta["size"]:
                raise _Truncated(f"{size} of {result.meta['size']} bytes came")
            return size

        return self._try("GET", key, read)

    def head(self, key: str) -> Listed | None:
        """None if there is no such object."""
        import obstore

        try:
            return _listed(self._try("HEAD", key, lambda: obstore.head(self._store, key)))
        except Missing:
            return None

    def listed(self, prefix: str, after: str | None = None) -> list[Listed]:
        """All objects below a prefix, by key; only those behind the key `after`, if it is given.

        prefix: ends with a slash, or is empty.
        """
        import obstore

        def read() -> list[Listed]:
            batches = obstore.list(self._store, prefix or None, offset=after)
            return [_listed(each) for batch in batches for each in batch]

        found = sorted(self._try("LIST", prefix, read), key=lambda each: each.key)
        folders = {key.rpartition("/")[0] for key in (each.key for each in found)} | {prefix.rstrip("/")}
        return [each for each in found if each.size or each.key not in folders]  # markers of other tools

    def children(self, prefix: str) -> tuple[list[str], list[Listed]]:
        """Names of the folders, and the objects, directly below a prefix that ends with a slash; by key."""
        import obstore

        def read() -> Any:
            return obstore.list_with_delimiter(self._store, prefix or None)

        found = self._try("LIST", prefix, read)
        folders = {str(each).rstrip("/") for each in found["common_prefixes"]}
        markers = {*folders, prefix.rstrip("/")}
        objects = sorted((_listed(each) for each in found["objects"]), key=lambda each: each.key)
        names = sorted(folder.removeprefix(prefix) for folder in folders)
        return names, [each for each in objects if each.size or each.key not in markers]

    # --- writing -----------------------------------------------------------------------------------

    def put(self, key: str, content: bytes | Path) -> Version:
        """Whole, or not at all; in place of what was there."""
        import obstore

        return self._try(
            "PUT", key, lambda: _version(obstore.put(self._store, key, content, **_parts(content)))
        )

    def create(self, key: str, content: bytes) -> Version:
        """Only where nothing is. Raises Exists, but not where the very same content is there: where an answer
        was lost, the second try finds what the first one wrote.
        """
        import obstore
        from obstore.exceptions import AlreadyExistsError, PreconditionError

        def write() -> Version | None:
            try:
                return _version(obstore.put(self._store, key, content, mode="create", use_multipart=False))
            except (AlreadyExistsError, PreconditionError):
                return None

        made = self._try("PUT if none", key, write)
        return made or self._same(key, content, Exists)

    def replace(self, key: str, content: bytes, version: Version) -> Version:
        """Only where this version still is. Raises Changed; not where the same content is there already."""
        import obstore
        from obstore.exceptions import PreconditionError

        mode: Any = version.as_mode()

        def write() -> Version | None:
            try:
                return _version(obstore.put(self._store, key, content, mode=mode, use_multipart=False))
            except (PreconditionError, FileNotFoundError):
                return None

        made = self._try("PUT if same", key, write)
        return made or self._same(key, content, Changed)

    def _same(self, key: str, content: bytes, refused: type[Exception]) -> Version:
        try:
            there, version = self.get(key)
        except Missing:
            raise refused(key) from None
        if there != content:
            raise refused(key)
        return version

    def delete(self, *keys: str) -> None:
        """No matter whether they are there."""
        import obstore

        def remove() -> None:
            try:
                obstore.delete(self._store, list(keys))
            except FileNotFoundError:
                return

        if keys:
            self._try("DELETE", keys[0], remove)

    # --- tries and errors --------------------------------------------------------------------------

    def _try(self, request: str, key: str, work: Callable[[], T]) -> T:
        """Raises Missing, and StorageError with the request that failed."""

        def count(state: tenacity.RetryCallState) -> None:
            with _count:
                retried[request] = retried.get(request, 0) + 1

        tries = tenacity.Retrying(
            retry=tenacity.retry_if_exception(_is_passing),
            stop=tenacity.stop_after_attempt(TRIES),
            wait=tenacity.wait_random_exponential(LEAST_WAIT, MOST_WAIT),
            before_sleep=count,
            reraise=True,
        )
        try:
            return tries(work)
        except FileNotFoundError as error:
            if "NoSuchBucket" in str(error):
                self._refuse(error, request, key)
            raise Missing(f"{self.uri}/{key}") from error
        except (StorageError, Exists, Changed):
            raise
        except Exception as error:
            if not _is_of_the_store(error):
                raise
            self._refuse(error, request, key)

    def _refuse(self, error: Exception, request: str, key: str) -> NoReturn:
        what, fix = explained(str(error))
        raise StorageError(
            f"{what}: {self.uri}",
            where=f"{request} {self.uri}/{key}",
            why=_said(str(error)),
            fix=f"{fix}; then run the same command again: what was complete is kept",
        ) from error


class _Truncated(Exception):
    pass


def _whole(content: bytes, size: int) -> bytes:
    if len(content) != size:
        raise _Truncated(f"{len(content)} of {size} bytes came")
    return content


def _parts(content: bytes | Path) -> dict[str, Any]:
    size = content.stat().st_size if isinstance(content, Path) else len(content)
    return {"use_multipart": size > MULTIPART_BYTES, "chunk_size": CHUNK_BYTES}


def _version(of: Any) -> Version:
    return Version(of["e_tag"], of.get("version"))


def _listed(meta: Any) -> Listed:
    return Listed(meta["path"], meta["size"], meta["last_modified"], _version(meta))


def _is_of_the_store(error: BaseException) -> bool:
    from obstore.exceptions import BaseError

    return isinstance(error, BaseError | _Truncated | TimeoutError | ConnectionError | NotImplementedError)


def _is_passing(error: BaseException) -> bool:
    """Whether another try may succeed: the network, a server's fault, too many requests, a cut answer."""
    from obstore.exceptions import GenericError

    if isinstance(error, _Truncated | TimeoutError | ConnectionError):
        return True
    if not isinstance(error, GenericError):
        return False
    status = _STATUS.search(str(error))
    if status is None:
        return not _PERMANENT.search(str(error))
    return int(status[1]) in (408, 409, 425, 429) or (int(status[1]) >= 500 and int(status[1]) != 501)


_STATUS = re.compile(r"status code: (\d{3})")
_PERMANENT = re.compile(r"builder error|BadScheme|missing|invalid|metadata endpoint|redirect", re.I)

_KNOWN = (
    ("metadata endpoint|169.254.169.254|missing credentials|No credentials|error getting credentials",
     "no credentials were found",
     "set them in the environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY) or in ~/.aws; or give the"
     " machine a role"),
    ("NoSuchBucket", "there is no such bucket", "create it, or correct storage"),
    ("InvalidBucketName", "this is no name of a bucket", "correct storage"),
    ("InvalidAccessKeyId", "the store does not know the access key", "renew the credentials"),
    ("ExpiredToken", "the credentials have expired", "renew them"),
    ("SignatureDoesNotMatch", "the secret key does not fit the access key", "correct the credentials"),
    ("RequestTimeTooSkewed", "this machine's clock is wrong", "set the clock (NTP)"),
    ("configured region|PermanentRedirect|AuthorizationHeaderMalformed|IllegalLocationConstraint|301 Moved",
     "the bucket is in another region", "set AWS_REGION to the bucket's region"),
    ("NotImplemented|not yet implemented|501", "the store cannot do this",
     "take one with conditional writes (S3, GCS, Azure, R2, MinIO)"),
    ("AccessDenied|403|Forbidden|401|Unauthorized", "access is denied",
     "give these credentials leave to list, read, write and delete there"),
    ("error sending request|timed out|Connect|dns", "the store does not answer",
     "check the network, and the endpoint if you set one (AWS_ENDPOINT_URL)"),
)  # fmt: skip
"""What a store says, what it means, and what to do."""


def explained(said: str) -> tuple[str, str]:
    """(what is wrong, what to do) for the text of a store's error."""
    for pattern, what, fix in _KNOWN:
        if re.search(pattern, said):
            return what, fix
    return "the store refused a request", "see why above"


def _said(text: str) -> str:
    """The server's own message, or the first line; never its whole answer, which may hold keys."""
    code, message = (re.search(rf"<{name}>([^<]*)</{name}>", text) for name in ("Code", "Message"))
    if code:
        return f"{code[1]}: {message[1] if message else ''}".strip(": ")
    return text.strip().splitlines()[0][:300]


def _open(uri: str) -> ObjectStore:
    """Credentials as the cloud's own tools find them: the environment, its files, the machine's role."""
    from obstore.store import from_url

    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL", "")
    options: dict[str, Any] = {}
    if uri.startswith("s3://"):
        options = _profile()
        if endpoint:
            options["endpoint"] = endpoint
    seconds = timedelta(seconds=CONNECT_SECONDS)
    return from_url(
        uri,
        retry_config={"max_retries": 0},  # tries are made, and counted, here
        client_options={
            "allow_http": endpoint.startswith("http://"),
            "connect_timeout": seconds,
            "read_timeout": timedelta(seconds=READ_SECONDS),
            "timeout": timedelta(hours=1),
        },
        **options,
    )


def _profile() -> dict[str, Any]:
    """Where the environment has no keys: those of ~/.aws, which boto3 reads if it is installed."""
    if "AWS_ACCESS_KEY_ID" in os.environ:
        return {}
    files = [os.environ.get(name, f"~/.aws/{file}") for name, file in _AWS_FILES.items()]
    if not any(Path(file).expanduser().exists() for file in files):
        return {}
    try:
        from obstore.auth.boto3 import Boto3CredentialProvider
    except ImportError:
        return {}
    return {"credential_provider": Boto3CredentialProvider()}


_AWS_FILES = {"AWS_SHARED_CREDENTIALS_FILE": "credentials", "AWS_CONFIG_FILE": "config"}


@functools.cache
def open_bucket(uri: str) -> Bucket:
    """One for each process and bucket."""
    return Bucket(uri)


def count_retries() -> Callable[[], str]:
    """Says how often this process tried requests again since now, for people: "GET 3, PUT 1", or nothing."""
    before = dict(retried)

    def text() -> str:
        with _count:
            since = {request: count - before.get(request, 0) for request, count in sorted(retried.items())}
        return ", ".join(f"{request} {count:,}" for request, count in since.items() if count)

    return text
