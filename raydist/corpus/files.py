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
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, NoReturn
from urllib.parse import unquote

import xxhash

from raydist.corpus.formats import (
    POINTER_BYTES,
    READERS,
    UNUSED,
    detect_format,
    is_known,
    is_pointer,
    names_no_format,
    recognise,
    why_unknown,
)
from raydist.corpus.locations import (
    File,
    cannot_read,
    glob_regex,
    is_uri,
    open_file,
    open_filesystem,
    pinned,
    split_glob,
    split_query,
)
from raydist.corpus.splits import ALL, COMPANION, INFO, STATE, TRAIN, Splits, find_splits
from raydist.errors import CorpusError, RaydistError, first_line
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
NO_TEXT = "images, sound, programs or weights"
DESCRIPTION_BYTES = 16 * MIB
EXAMPLES = 3
BATCH = 256
"""Files that a thread looks at before it takes more."""
NAMED_UNUSED = 5
VERSION_KEYS = ("ETag", "etag", "md5Hash", "checksum", "blob_id", "LastModified", "last_modified", "created")


class Found(NamedTuple):
    """A file that an entry of the path matches.

    stamp: changes with the content, as far as the storage can say (see `_version`).
    named: the path names this very file, so its format has to be known.
    left_out: why it is not used, or "".  pinned: its location at the commit that was listed, if there is one.
    by_content: its name says no format, nor does that of any other file, so its content decides.
    """

    name: str
    location: str
    size: int
    stamp: str
    named: bool
    left_out: str = ""
    pinned: str = ""
    by_content: bool = False

    @property
    def opened(self) -> str:
        """The location to read it from."""
        return self.pinned or self.location


LeftOut = dict[str, dict[str, Any]]
"""By reason: {count, examples: names of the first}. A folder that is not entered counts as one."""


class Listing(NamedTuple):
    """What the path of a source matches. Lists are sorted by name.

    files: to read.  unused: files of formats that are not known; they may hold text.
    left_out: what else is passed over.  pointers: local files that Git LFS left in place of the data.
    """

    files: list[File]
    unused: list[File]
    left_out: LeftOut
    pointers: list[File]


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


def refuse_pointers(listing: Listing) -> NoReturn:
    """CorpusError that names them."""
    pointers, more = listing.pointers, ", ..." if len(listing.pointers) > NAMED_UNUSED else ""
    raise CorpusError(
        f"{len(pointers)} of the source's files {'are' if len(pointers) > 1 else 'is'} missing: Git LFS left"
        f" pointers to {'them' if len(pointers) > 1 else 'it'}",
        where=", ".join(file.name for file in pointers[:NAMED_UNUSED]) + more,
        why="the repository was cloned without them, as when git-lfs is not installed",
        fix="install git-lfs and run `git lfs pull` in the clone, or leave them out by the source's exclude",
    )


def _such_as(patterns: list[str]) -> str:
    return f" (such as [{', '.join(map(repr, patterns[:NAMED_UNUSED]))}])" if patterns else ""


def look_up(source: Source) -> Listing:
    """The files of `source`; one that two entries match counts once.

    CorpusError: an entry that matches nothing, nothing left after `exclude`, no known format, or a format
    that cannot be compressed as this file is.
    """
    entries = [source.path] if isinstance(source.path, str) else source.path
    excluded = [glob_regex(pattern.rstrip("/")) for pattern in source.exclude]
    found: dict[str, Found] = {}
    left_out: dict[str, Found] = {}
    folders: dict[str, str] = {}
    for entry in entries:
        if is_redacted(entry):
            raise CorpusError(
                f"a secret was taken out of the path {entry}", where=entry,
                why="raydist writes none into a run's folder, where this job comes from",
                fix="submit the job file that you wrote; better, give secrets by the environment",
            )  # fmt: skip
        location = _substitute(entry)
        matches = list(_expand_uri(location) if is_uri(location) else _expand_local(location, excluded))
        for file in sorted(
            _wanted(entry, matches, excluded, source, is_folder=_is_folder(location, matches))
        ):
            if file.left_out:
                left_out[file.location] = file
                continue
            found.setdefault(_real(file.location, folders), file)
    distinct = sorted(_distinct_names(found.values()), key=lambda file: file.name)
    batches = [distinct[start : start + BATCH] for start in range(0, len(distinct), BATCH)]
    with ThreadPoolExecutor(8) as pool:
        formats = list(chain.from_iterable(pool.map(partial(_formats, source), batches)))
        if all(form[0] == UNUSED.name for form in formats):
            raise _unknown(", ".join(entries), distinct)
        looked_at = list(chain.from_iterable(pool.map(_looked_at, batches)))
    files = [
        File(file.name, file.opened, file.size if form[0] != UNUSED.name else 0, identity, *form)
        for file, (identity, _), form in zip(distinct, looked_at, formats, strict=True)
    ]
    return Listing(
        [file for file in files if file.format != UNUSED.name],
        [file for file in files if file.format == UNUSED.name],
        _counted(left_out.values()),
        [file for file, (_, is_lfs) in zip(files, looked_at, strict=True) if is_lfs],
    )


def _unknown(entry: str, files: list[Found]) -> CorpusError:
    some = ", ".join(file.name for file in files[:5]) + (", ..." if len(files) > 5 else "")
    return CorpusError(
        f"no file of {entry} has a known format", where=entry, why=f"the files are {some}",
        fix=f"set the source's format to one of {', '.join(READERS)}",
    )  # fmt: skip


def _real(location: str, folders: dict[str, str]) -> str:
    """What the location leads to, by every link. folders: those that were looked up; this adds to them."""
    if is_uri(location):
        return location
    folder, name = os.path.split(location)
    if folder not in folders:
        folders[folder] = os.path.realpath(folder)
    real = os.path.join(folders[folder], name)
    return os.path.realpath(real) if os.path.islink(real) else real


def _formats(source: Source, files: list[Found]) -> list[tuple[str, str | None]]:
    return [_format(file, source) for file in files]


def _format(file: Found, source: Source) -> tuple[str, str | None]:
    """(format, compression); the name of UNUSED for a file that cannot be read."""
    asked = source.format
    looked_into = asked == "auto" and (file.by_content or (file.named and names_no_format(file.name)))
    found = recognise(file.name, file.opened, file.size, source.encoding) if looked_into else None
    if found:
        return found
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


def folder_splits(folder: str | Path) -> Splits:
    """The splits of the data set in a local folder. CorpusError: a file that declares them is damaged."""
    where = str(Path(folder).expanduser().absolute())
    files = [file for file in _folder(where, "", []) if not file.left_out]
    return _find_splits(where, files, frozenset(file.name for file in files))


def _is_folder(location: str, matches: list[Found]) -> bool:
    """Whether an entry without wildcards stands for a folder."""
    if not is_uri(location):
        return os.path.isdir(location)
    return not split_glob(split_query(location)[0], _is_magic)[1] and not any(file.named for file in matches)


def _wanted(
    entry: str, files: list[Found], excluded: list[re.Pattern[str]], source: Source, *, is_folder: bool
) -> list[Found]:
    """The same files; those that are not used say why. Raises CorpusError if none is."""
    known = frozenset(file.name for file in files)
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
    if is_folder or (source.split not in (TRAIN, ALL) and not all(file.named for file in kept)):
        kept = _of_split(entry, kept, source, known)
    if source.format != "auto":
        return kept + left_out
    names = {file.name for file in kept}
    marked = [file if file.named or file.left_out else _without_text(file, names) for file in kept]
    if not any(file.named or is_known(file.name) for file in marked if not file.left_out):
        if not any(names_no_format(file.name) for file in marked if not file.left_out):
            raise _unknown(entry, kept)
        marked = [file._replace(by_content=names_no_format(file.name)) for file in marked]
    return marked + left_out


def _of_split(entry: str, files: list[Found], source: Source, known: frozenset[str]) -> list[Found]:
    """The same files; those that are not of the split of the data set in this folder say why.

    known: the names of all its files, excluded ones too. Raises CorpusError if there is no such split.
    """
    splits = _find_splits(entry, files, known, as_text=source.format == "text")
    why = splits.left_out([file.name for file in files], source.split)
    return [file if file.named else file._replace(left_out=why.get(file.name, "")) for file in files]


def _find_splits(entry: str, files: list[Found], known: frozenset[str], *, as_text: bool = False) -> Splits:
    locations = {file.name: file.opened for file in files}
    return find_splits(list(locations), lambda name: _content(locations[name]), entry, known, as_text=as_text)


def _content(location: str) -> bytes:
    """Of a file that describes others, which is small: of a large one the first bytes, which say nothing."""
    try:
        with open_file(location) as stream:
            return stream.read(DESCRIPTION_BYTES)
    except OSError as error:
        cannot_read(error, location)


def _without_text(file: Found, names: set[str]) -> Found:
    """The same file, left out if its format is to be known by its name, which says that it holds no text.

    names: of all files.
    """
    last = file.name.lower().rsplit("/", 1)[-1]
    if last == STATE and file.name[: -len(last)] + INFO in names:
        return file._replace(left_out=COMPANION)
    if COMPANIONS.fullmatch(last) and (last.endswith(".json") or not is_known(file.name)):
        return file._replace(left_out=COMPANION)
    return file._replace(left_out=NO_TEXT) if NOT_TEXT.fullmatch(last) else file


def _expand_local(entry: str, excluded: list[re.Pattern[str]]) -> Iterator[Found]:
    if os.path.isdir(entry):
        yield from _folder(entry, "", excluded)
    elif os.path.exists(entry) or not glob.has_magic(entry):
        yield from _local(entry, os.path.basename(entry), named=True)
    else:
        root, pattern = split_glob(entry, glob.has_magic)
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
    root, pattern = split_glob(base, _is_magic)
    root = root.rstrip("/")
    try:
        at = pinned(root)
        filesystem, inside = open_filesystem(at + query)
        info = filesystem.get_file_info(inside)
        if info.type == pafs.FileType.File and not pattern:
            file = _remote(filesystem, info, info.base_name, entry, named=True)
            yield file._replace(pinned=at if at != root else "")
        elif info.type != pafs.FileType.NotFound:
            deep = not pattern or "/" in pattern or "**" in pattern
            regex = glob_regex(pattern or "**")
            for info in filesystem.get_file_info(pafs.FileSelector(inside, recursive=deep)):
                name = info.path.removeprefix(inside).lstrip("/")
                hidden = any(part.startswith("." if pattern else ("_", ".")) for part in name.split("/"))
                location = f"{root}/{name}{query}"
                if info.type == pafs.FileType.File and regex.fullmatch(name) and not hidden:
                    file = _remote(filesystem, info, name, location)
                    yield file._replace(pinned=f"{at}/{name}" if at != root else "")
                elif info.type == pafs.FileType.File and hidden and not pattern:
                    yield Found(redact(name), location, 0, "", False, HIDDEN)
    except OSError as error:
        if entry.startswith("hf://") and isinstance(error, FileNotFoundError):
            raise CorpusError(
                f"cannot read {entry}", where=entry, why=first_line(error),
                fix="correct the path; a private or gated data set needs a token (`hf auth login` or HF_TOKEN"
                " in the environment) on each machine that reads it",
            ) from error  # fmt: skip
        cannot_read(error, entry)
    except RaydistError:
        raise
    except Exception as error:  # each filesystem of fsspec has its library's own
        raise CorpusError(
            f"cannot list {entry}", where=entry, why=f"{type(error).__name__}: {error}",
            fix="check the path, and what its storage asks for",
        ) from error  # fmt: skip


def _is_magic(segment: str) -> bool:
    return "*" in segment or "[" in segment


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


def _looked_at(files: list[Found]) -> list[tuple[str, bool]]:
    return [_look_at(file) for file in files]


def _identity(file: Found) -> str:
    return _look_at(file)[0]


def _look_at(file: Found) -> tuple[str, bool]:
    """(identity, whether it is a Git LFS pointer, as far as the file is read for that).

    The identity changes with the content. Of a small local file it is a hash, of a large one its ends', of
    another the stamp.
    """
    if is_uri(file.location) and file.stamp:
        return f"{file.size}:{file.stamp}", False
    try:
        with open_file(file.opened) as stream:
            if file.size <= MIB:  # file_digest takes a buffer of 256 KiB for each
                content = stream.read()
                is_lfs = file.size <= POINTER_BYTES and is_pointer(content)
                return xxhash.xxh3_128_hexdigest(content), is_lfs
            if file.size <= HASHED_WHOLE_BYTES:
                return hashlib.file_digest(stream, xxhash.xxh3_128).hexdigest(), False
            first = stream.read(MIB)
            stream.seek(-MIB, os.SEEK_END)
            return f"{file.size}:{file.stamp}:{xxhash.xxh3_128_hexdigest(first + stream.read(MIB))}", False
    except OSError as error:
        cannot_read(error, file.location)
