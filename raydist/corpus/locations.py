"""A source file, and how its location, a local path or a URI, is opened."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from io import BufferedIOBase
from typing import Any, NoReturn, cast
from urllib.parse import quote

from raydist.errors import CorpusError

URI = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
QUERY = re.compile(r"\?\w+=")


@dataclass(frozen=True, slots=True)
class File:
    """name: relative, '/'-separated, the same on every machine.  location: the path or URI to open.

    size: bytes.  identity: changes when the content does.  format: a key of READERS.  compression: one
    of COMPRESSIONS, or None. Both are found once, when the file is listed.
    """

    name: str
    location: str
    size: int
    identity: str
    format: str
    compression: str | None


def is_uri(location: str) -> bool:
    return URI.match(location) is not None


def open_file(location: str) -> BufferedIOBase:
    """A seekable binary stream of a local path or a URI."""
    if not is_uri(location):
        return open(location, "rb")  # noqa: PTH123 - of many small files a Path takes as long as the reading
    filesystem, path = open_filesystem(location)
    return cast(BufferedIOBase, filesystem.open_input_file(path))


def open_filesystem(uri: str) -> tuple[Any, str]:
    """The pyarrow filesystem of a URI (not escaped), or fsspec's wrapped as one, and the path in it."""
    import pyarrow as pa
    import pyarrow.fs as pafs

    base, query = split_query(uri)
    scheme, _, rest = base.partition("://")
    host, slash, path = rest.partition("/")
    unknown = ""
    if scheme != "hf":  # which pyarrow would hand to fsspec too, but escaped
        try:
            escaped = f"{scheme}://{host}{slash}{quote(path, safe='/@')}{query}"
            return cast(tuple[Any, str], pafs.FileSystem.from_uri(escaped))
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            unknown = f"{error}; "
    import fsspec

    try:
        filesystem, inside = fsspec.core.url_to_fs(uri)
    except (ValueError, ImportError) as error:
        raise CorpusError(
            f"no filesystem reads {scheme}://", where=uri, why=f"{unknown}{error}",
            fix="install the fsspec package of this kind of storage",
        ) from error  # fmt: skip
    return pafs.PyFileSystem(pafs.FSSpecHandler(filesystem)), str(inside)


def pinned(uri: str) -> str:
    """A URI of a repository of the hub with the commit that its revision is now; any other URI as it is.

    What is listed and read by it stays the same when somebody pushes. The hub's library takes the token from
    the environment or its own cache. Raises OSError or ValueError.
    """
    if not uri.startswith("hf://"):
        return uri
    from huggingface_hub import HfApi, HfFileSystem

    filesystem = HfFileSystem()
    filesystem.invalidate_cache()
    found: Any = filesystem.resolve_path(uri)
    if not hasattr(found, "repo_id"):  # a bucket has no commits
        return uri
    commit = HfApi().repo_info(found.repo_id, revision=found.revision, repo_type=found.repo_type).sha
    kind = {"model": ""}.get(found.repo_type, f"{found.repo_type}s/")
    return f"hf://{kind}{found.repo_id}@{commit}/{found.path_in_repo}".rstrip("/")


def split_query(uri: str) -> tuple[str, str]:
    """pyarrow's URIs end in options after '?', as in s3://bucket/key?region=eu-west-1."""
    match = QUERY.search(uri)
    return (uri[: match.start()], uri[match.start() :]) if match else (uri, "")


def split_glob(path: str, has_magic: Callable[[str], bool]) -> tuple[str, str]:
    """(root, pattern): the folders before the first segment with a wildcard, and the rest."""
    segments = path.split("/")
    first = next((i for i, segment in enumerate(segments) if has_magic(segment)), len(segments))
    return "/".join(segments[:first]) or "/", "/".join(segments[first:])


@cache
def glob_regex(pattern: str) -> re.Pattern[str]:
    """** crosses folders, * and ? do not; a pattern that matches a folder matches all in it."""
    wild = {"**/": "(?:[^/]+/)*", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    regex = ""
    for part in re.split(r"(\*\*/|\*\*|\*|\?|\[!?[^\]/]+\])", pattern):
        is_set = len(part) > 2 and part[0] == "[" and part[-1] == "]"
        regex += wild.get(part) or (part.replace("[!", "[^", 1) if is_set else re.escape(part))
    return re.compile(f"{regex}(?:/.*)?", re.DOTALL)


def cannot_read(error: OSError, location: str = "", name: str = "") -> NoReturn:
    location = location or str(error.filename)
    raise CorpusError(
        f"cannot read {name or location}", where=location, why=str(error),
        fix="check its permissions and its storage, then run again",
    ) from error  # fmt: skip
