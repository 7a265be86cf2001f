"""Which files a source names: paths, folders, globs and URIs become one sorted list with identities."""

from __future__ import annotations

import glob
import hashlib
import os
import re
import stat
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, NoReturn
from urllib.parse import unquote

import xxhash

from raydist.corpus.formats import READERS, UNUSED, detect_format, is_known, why_unknown
from raydist.corpus.locations import File, cannot_read, is_uri, open_file, open_filesystem, split_query
from raydist.errors import CorpusError, RaydistError
from raydist.job.schema import Source
from raydist.redact import is_redacted, redact

MIB = 2**20
SECOND_NS = 10**9
HASHED_WHOLE_BYTES = 64 * MIB
COMPANIONS = re.compile(
    r"(?:readme|licen[cs]e|copying|notice|authors|changelog|changes|citation|contributing|makefile)(?:\..*)?"
    r"|(?:md5|sha1|sha256|sha512)sums?|checksums?|dataset_(?:infos?|dict)\.json|_.*"
    r"|.*\.(?:md5|sha1|sha256|sha512|sum|sig|asc|crc)"
)
"""Names, in lower case, of files that come with data and hold none."""
NOT_TEXT = re.compile(
    r".*\.(?:png|jpe?g|gif|bmp|webp|ico|tiff?|svg|mp[34]|m4a|wav|flac|ogg|avi|mov|mkv|webm|ttf|otf|woff2?"
    r"|so|dll|dylib|exe|o|a|lib|py[cod]|class|jar|safetensors|pth?|ckpt|onnx)"
)
"""Of images, sound, fonts, programs and weights."""
HIDDEN, EXCLUDED = "names that begin with _ or .", "excluded"
EXAMPLES = 3
NAMED_UNUSED = 5
VERSION_KEYS = ("ETag", "etag", "md5Hash", "checksum", "blob_id", "LastModified", "last_modified", "created")


class Found(NamedTuple):
    """A file that an entry of the path matches.

    stamp: changes with the content, as far as the storage can say (see `_version`).
    named: the path names this very file, so its format has to be known.
    left_out: why it is not used, or "".
    """

    name: str
    location: str
    size: int
    stamp: str
    named: bool
    left_out: str = ""


LeftOut = dict[str, dict[str, Any]]
"""By reason: {count, examples: names of the first}. A folder that is not entered counts as one."""


class Listing(NamedTuple):
    """What the path of a source matches. Lists are sorted by name.

    files: to read.  unused: files of formats that are not known; they may hold text.
    left_out: what else is passed over.
    """

    files: list[File]
    unused: list[File]
    left_out: LeftOut


def list_files(source: Source) -> list[File]:
    """The files to read of `source`, sorted by name."""
    return look_up(source).files


def refuse_unused(listing: Listing) -> NoReturn:
    """CorpusError that names them."""
    unused = listing.unused
    n, more = len(unused), ", ..." if len(unused) > NAMED_UNUSED else ""
    extensions = {re.sub(r"^.*?(\.[^.]*)?$", r"\1", file.name.rsplit("/", 1)[-1]) for file in unused}
    excluded = [f"**/*{extension}" for extension in sorted(extensions) if extension]
    raise CorpusError(
        f"{n} of the source's {n + len(listing.files)} files cannot be read",
        where=", ".join(file.name for file in unused[:NAMED_UNUSED]) + more,
        why="; ".join(sorted({why_unknown(file.name) for file in unused})[:NAMED_UNUSED])
        + "; corpus.on_error is fail, so nothing is trained on a part of the text",
        fix="convert or rename them, leave them out by the source's exclude"
        f"{_such_as(excluded)}, set the source's format to read all of its files as one format,"
        " or set corpus.on_error: quarantine to list them and go on",
    )


def _such_as(patterns: list[str]) -> str:
    return f" (such as [{', '.join(map(repr, patterns[:NAMED_UNUSED]))}])" if patterns else ""


def look_up(source: Source) -> Listing:
    """The files of `source`; one that two entries match counts once.

    CorpusError: an entry that matches nothing, nothing left after `exclude`, no known format, or a format
    that cannot be compressed as this file is.
    """
    entries = [source.path] if isinstance(source.path, str) else source.path
    excluded = [_glob_regex(pattern.rstrip("/")) for pattern in source.exclude]
    found: dict[str, Found] = {}
    left_out: dict[str, Found] = {}
    for entry in entries:
        if is_redacted(entry):
            raise CorpusError(
                f"a secret was taken out of the path {entry}", where=entry,
                why="raydist writes none into a run's folder, where this job comes from",
                fix="submit the job file that you wrote; better, give secrets by the environment",
            )  # fmt: skip
        location = _substitute(entry)
        matches = list(_expand_uri(location) if is_uri(location) else _expand_local(location, excluded))
        for file in sorted(_wanted(entry, matches, excluded, source.format)):
            if file.left_out:
                left_out[file.location] = file
                continue
            same = file.location if is_uri(file.location) else os.path.realpath(file.location)
            found.setdefault(same, file)
    distinct = sorted(_distinct_names(found.values()), key=lambda file: file.name)
    formats = [_format(file, source.format) for file in distinct]
    with ThreadPoolExecutor(8) as pool:
        identities = pool.map(_identity, distinct)
        files = [
            File(file.name, file.location, file.size if form[0] != UNUSED.name else 0, identity, *form)
            for file, identity, form in zip(distinct, identities, formats, strict=True)
        ]
    unused = [file for file in files if file.format == UNUSED.name]
    return Listing(
        [file for file in files if file.format != UNUSED.name], unused, _counted(left_out.values())
    )


def _format(file: Found, asked: str) -> tuple[str, str | None]:
    is_used = file.named or asked != "auto" or is_known(file.name)
    return detect_format(file.name, asked) if is_used else (UNUSED.name, None)


def _counted(left_out: Iterable[Found]) -> LeftOut:
    names: dict[str, list[str]] = {}
    for file in sorted(left_out):
        names.setdefault(file.left_out, []).append(redact(file.name))
    return {reason: {"count": len(of), "examples": of[:EXAMPLES]} for reason, of in sorted(names.items())}


@contextmanager
def unchanged(files: Sequence[File]) -> Iterator[None]:
    """Raises CorpusError at the end if one of `files` is not as it was when it was listed, or was written to.

    Each one's identity is compared with what it was, and its size and time with those at the start, so that a
    file that was changed and changed back is noticed too.
    """
    before = [_now(file) for file in files]
    yield
    for file, found in zip(files, before, strict=True):
        if _now(file) != found or not _is_same(file, found):
            raise CorpusError(
                f"{file.name} changed while it was read",
                where=file.location,
                why="the token log stands for the files as they were when they were planned",
                fix="run again once nothing writes to it; what is made then is made of the new content",
            )


def _now(file: File) -> Found:
    """The file as it is now. Raises CorpusError if it cannot be read any more."""
    try:
        if not is_uri(file.location):
            status = os.stat(file.location)
            return Found(file.name, file.location, status.st_size, str(status.st_mtime_ns), True)
        filesystem, inside = open_filesystem(file.location)
        info = filesystem.get_file_info(inside)
        if not info.is_file:
            raise FileNotFoundError(file.location)
        return _remote(filesystem, info, file.name, file.location)
    except OSError as error:
        cannot_read(error, file.location, file.name)


def _is_same(file: File, now: Found) -> bool:
    """Whether the file is as it was listed. S3 gives milliseconds in a listing, and seconds of one object."""
    identity = _identity(now)
    planned, found = file.identity.split(":"), identity.split(":")
    if (
        is_uri(file.location)
        and len(planned) == len(found) == 2
        and planned[1].isdigit()
        and found[1].isdigit()
    ):
        return planned[0] == found[0] and abs(int(planned[1]) - int(found[1])) < SECOND_NS
    return identity == file.identity


def _substitute(entry: str) -> str:
    entry = entry.replace("${stdlib}", sysconfig.get_path("stdlib"))
    if entry.startswith("file://"):
        return unquote(entry.removeprefix("file://").removeprefix("localhost"))
    return entry if is_uri(entry) else str(Path(entry).expanduser().absolute())


def _wanted(entry: str, files: list[Found], excluded: list[re.Pattern[str]], asked: str) -> list[Found]:
    """The same files; those that are not used say why. Raises CorpusError if none is."""
    left_out = [file for file in files if file.left_out]
    files = [file for file in files if not file.left_out]
    if not files and all(file.left_out != EXCLUDED for file in left_out):
        raise CorpusError(
            f"no file matches {entry}", where=entry, why="a source without files would train on nothing",
            fix="correct the source's path (relative ones start at the working directory) or its exclude",
        )  # fmt: skip
    kept = []
    for file in files:
        if any(pattern.fullmatch(file.name) for pattern in excluded):
            left_out.append(file._replace(left_out=EXCLUDED))
        else:
            kept.append(file)
    if not kept:
        raise CorpusError(
            f"exclude leaves no file of {entry}", where=entry, fix="loosen the source's exclude"
        )
    if asked != "auto":
        return kept + left_out
    names = {file.name for file in kept}
    marked = [file._replace(left_out="" if file.named else _without_text(file.name, names)) for file in kept]
    if not any(file.named or is_known(file.name) for file in marked if not file.left_out):
        some = ", ".join(file.name for file in kept[:5]) + (", ..." if len(kept) > 5 else "")
        raise CorpusError(
            f"no file of {entry} has a known format", where=entry, why=f"the files are {some}",
            fix=f"set the source's format to one of {', '.join(READERS)}",
        )  # fmt: skip
    return marked + left_out


def _without_text(name: str, names: set[str]) -> str:
    """Why a file whose format is to be known by its name holds no text, or "". names: of all files."""
    last = name.lower().rsplit("/", 1)[-1]
    of_saved_dataset = last == "state.json" and name[: -len(last)] + "dataset_info.json" in names
    if of_saved_dataset or (COMPANIONS.fullmatch(last) and (last.endswith(".json") or not is_known(name))):
        return "companions of data"
    return "images, sound, programs or weights" if NOT_TEXT.fullmatch(last) else ""


def _expand_local(entry: str, excluded: list[re.Pattern[str]]) -> Iterator[Found]:
    if os.path.isdir(entry):
        yield from _folder(entry, "", excluded)
    elif os.path.exists(entry) or not glob.has_magic(entry):
        yield from _local(entry, os.path.basename(entry), named=True)
    else:
        root, pattern = _split_glob(entry, glob.has_magic)
        _check_folders(root, pattern, excluded)
        for name in glob.glob(pattern, root_dir=root, recursive=True):
            whole = os.path.join(root, name)
            if any(regex.fullmatch(name) for regex in excluded):
                yield _left_out(whole, name, EXCLUDED)
            elif not os.path.isdir(whole):
                yield from _local(whole, name)
            elif not pattern.endswith("**"):  # ** gives the folders and what is in them
                yield from _folder(whole, name + "/", excluded)


def _check_folders(root: str, pattern: str, excluded: list[re.Pattern[str]]) -> None:
    """CorpusError if a folder that `pattern` looks into cannot be read: glob passes over it in silence."""
    segments = pattern.split("/")
    folders = {""}
    for i, segment in enumerate(segments):
        if above := "/".join(segments[: i + (segment == "**")]):
            folders |= set(glob.glob(above + "/", root_dir=root, recursive=True))
    for folder in folders:
        if any(regex.fullmatch(folder.rstrip("/")) for regex in excluded):
            continue
        try:
            os.scandir(os.path.join(root, folder)).close()
            os.stat(os.path.join(root, folder, "."))
        except PermissionError as error:
            cannot_read(error, os.path.join(root, folder))
        except FileNotFoundError:
            continue


def _folder(root: str, prefix: str, excluded: list[re.Pattern[str]]) -> Iterator[Found]:
    """Everything under a folder, but names that begin with '_' or '.'. Follows links, each folder once.

    Excluded and hidden folders are not entered: site-packages can hold more than all the rest.
    """
    seen = set()
    for folder, folders, names in os.walk(root, followlinks=True, onerror=cannot_read):
        seen.add(os.path.realpath(folder))
        relative = os.path.relpath(folder, root)
        inside = prefix if relative == "." else f"{prefix}{relative}/"
        entered = []
        for name in folders:
            whole, is_hidden = os.path.join(folder, name), _is_hidden(name)
            if is_hidden or any(pattern.fullmatch(inside + name) for pattern in excluded):
                yield _left_out(whole, f"{inside}{name}/", HIDDEN if is_hidden else EXCLUDED)
            elif os.path.realpath(whole) not in seen:
                entered.append(name)
        folders[:] = entered
        for name in names:
            whole = os.path.join(folder, name)
            if _is_hidden(name):
                yield _left_out(whole, inside + name, HIDDEN)
            else:
                yield from _local(whole, inside + name)


def _local(path: str, name: str, *, named: bool = False) -> Iterator[Found]:
    try:
        status = os.stat(path)
    except FileNotFoundError:
        if os.path.islink(path):
            raise CorpusError(f"{path} links to nothing", where=path, fix="fix or remove the link") from None
        return
    except OSError as error:
        cannot_read(error, path)
    if stat.S_ISREG(status.st_mode):
        yield Found(_printable(name), os.path.abspath(path), status.st_size, str(status.st_mtime_ns), named)
    elif not named:
        yield _left_out(path, name, "no regular files")


def _left_out(location: str, name: str, why: str) -> Found:
    return Found(_printable(name), location, 0, "", False, why)


def _printable(name: str) -> str:
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _is_hidden(name: str) -> bool:
    return name.startswith(("_", "."))


# --- remote filesystems


def _expand_uri(entry: str) -> Iterator[Found]:
    import pyarrow.fs as pafs

    base, query = split_query(entry)
    root, pattern = _split_glob(base, lambda segment: "*" in segment or "[" in segment)
    filesystem, inside = open_filesystem(root.rstrip("/") + query)
    try:
        info = filesystem.get_file_info(inside)
        if info.type == pafs.FileType.File and not pattern:
            yield _remote(filesystem, info, info.base_name, entry, named=True)
        elif info.type != pafs.FileType.NotFound:
            deep = not pattern or "/" in pattern or "**" in pattern
            regex = _glob_regex(pattern or "**")
            for info in filesystem.get_file_info(pafs.FileSelector(inside, recursive=deep)):
                name = info.path.removeprefix(inside).lstrip("/")
                hidden = any(part.startswith("." if pattern else ("_", ".")) for part in name.split("/"))
                location = f"{root.rstrip('/')}/{name}{query}"
                if info.type == pafs.FileType.File and regex.fullmatch(name) and not hidden:
                    yield _remote(filesystem, info, name, location)
                elif info.type == pafs.FileType.File and hidden and not pattern:
                    yield Found(redact(name), location, 0, "", False, HIDDEN)
    except OSError as error:
        cannot_read(error, entry)
    except RaydistError:
        raise
    except Exception as error:  # each filesystem of fsspec has its library's own
        raise CorpusError(
            f"cannot list {entry}", where=entry, why=f"{type(error).__name__}: {error}",
            fix="check the path, and what its storage asks for",
        ) from error  # fmt: skip


def _remote(filesystem: Any, info: Any, name: str, location: str, *, named: bool = False) -> Found:
    if info.size is None:
        raise CorpusError(
            f"the storage does not give the size of {location}", where=location,
            why="slices are planned by size", fix="copy the file to a storage that gives sizes",
        )  # fmt: skip
    # some filesystems count a query as part of the name, and a name stays in the token log
    return Found(redact(name), location, info.size, _version(filesystem, info), named)


def _version(filesystem: Any, info: Any) -> str:
    """An etag, a checksum or a time that changes with the content; "" if the filesystem gives none."""
    if info.mtime_ns is not None:
        return str(info.mtime_ns)
    details = filesystem.handler.fs.info(info.path) if hasattr(filesystem, "handler") else {}
    return next((str(details[key]) for key in VERSION_KEYS if details.get(key)), "")


# --- names and identities


def _split_glob(path: str, has_magic: Any) -> tuple[str, str]:
    """(root, pattern): the folders before the first segment with a wildcard, and the rest."""
    segments = path.split("/")
    first = next((i for i, segment in enumerate(segments) if has_magic(segment)), len(segments))
    return "/".join(segments[:first]) or "/", "/".join(segments[first:])


@cache
def _glob_regex(pattern: str) -> re.Pattern[str]:
    """** crosses folders, * and ? do not; a pattern that matches a folder matches all in it."""
    wild = {"**/": "(?:[^/]+/)*", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    regex = ""
    for part in re.split(r"(\*\*/|\*\*|\*|\?|\[!?[^\]/]+\])", pattern):
        is_set = len(part) > 2 and part[0] == "[" and part[-1] == "]"
        regex += wild.get(part) or (part.replace("[!", "[^", 1) if is_set else re.escape(part))
    return re.compile(f"{regex}(?:/.*)?", re.DOTALL)


def _distinct_names(files: Iterable[Found]) -> list[Found]:
    """Files of one name get the folders above them added until their names differ."""
    groups: dict[str, list[Found]] = {}
    for file in files:
        groups.setdefault(file.name, []).append(file)
    return [file for group in groups.values() for file in (group if len(group) == 1 else _prefixed(group))]


def _prefixed(group: list[Found]) -> list[Found]:
    deepest = max(file.location.count("/") for file in group)
    for depth in range(group[0].name.count("/") + 2, deepest + 2):
        names = ["/".join(file.location.split("/")[-depth:]).lstrip("/") for file in group]
        if len(set(names)) == len(names):
            break
    return [file._replace(name=redact(name)) for file, name in zip(group, names, strict=True)]


def _identity(file: Found) -> str:
    """Changes with the content. Of a small local file a hash, of a large one its ends', else the stamp."""
    if is_uri(file.location) and file.stamp:
        return f"{file.size}:{file.stamp}"
    try:
        with open_file(file.location) as stream:
            if file.size <= HASHED_WHOLE_BYTES:
                return hashlib.file_digest(stream, xxhash.xxh3_128).hexdigest()
            first = stream.read(MIB)
            stream.seek(-MIB, os.SEEK_END)
            return f"{file.size}:{file.stamp}:{xxhash.xxh3_128_hexdigest(first + stream.read(MIB))}"
    except OSError as error:
        cannot_read(error, file.location)
