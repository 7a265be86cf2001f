"""A source: its files, how they are read and cleaned, and its slices in planned order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from raydist.corpus.clean import Cleaner, make_cleaner
from raydist.corpus.files import LeftOut, look_up, refuse_pointers, refuse_unused, unchanged
from raydist.corpus.formats import ReadOptions, Record, check_column
from raydist.corpus.formats.records import UTF_8
from raydist.corpus.locations import File
from raydist.corpus.slices import Slice, plan_slices, read_slice
from raydist.errors import CorpusError
from raydist.job.schema import Corpus, Source


@dataclass(frozen=True)
class SourceFiles:
    """All that decides the documents of a source and their order.

    files: with on_error "quarantine" also those of unknown formats, each of which is one bad file.
    clean: the job's steps.  left_out: what is not used and decides nothing.
    """

    files: tuple[File, ...]
    options: ReadOptions
    clean: tuple[Any, ...]
    slice_bytes: int
    left_out: LeftOut = field(default_factory=dict)

    @property
    def n_bytes(self) -> int:
        """Size of all files, compressed as they are."""
        return sum(file.size for file in self.files)

    def identity(self) -> dict[str, Any]:
        """JSON that is equal exactly when documents and order are. Folders of the files do not matter."""
        options = {key: value for key, value in asdict(self.options).items() if value is not None}
        if self.options.encoding == UTF_8:
            del options["encoding"]  # as in token logs from before there was a choice
        return {
            "files": [[file.name, file.size, file.identity] for file in self.files],
            "options": options,
            "clean": make_cleaner(self.clean).fingerprint,
            "slice_bytes": self.slice_bytes,
        }

    def plan(self) -> list[Slice]:
        """Raises CorpusError if a file that is cut into parts changes meanwhile."""
        with unchanged([file for file in self.files if file.size > self.slice_bytes]):
            return plan_slices(self.files, self.options, self.slice_bytes)

    def files_of(self, slice_: Slice) -> list[File]:
        """Those that the slice reads."""
        return [self.files[index] for index in sorted({part.file for part in slice_.parts})]

    def texts(self, slices: Sequence[Slice]) -> Iterator[str]:
        """The cleaned documents of `slices`, read in this process; unreadable and empty ones are left out."""
        clean = make_cleaner(self.clean)
        for slice_ in slices:
            for chunk in read_slice(self.files, slice_, self.options):
                for file, record in chunk:
                    if isinstance(record, Record) and (text := cleaned(clean, record, self.files[file].name)):
                        yield text


def cleaned(clean: Cleaner, record: Record, file: str) -> str:
    """The record's text after cleaning, "" if that drops it. CorpusError if a step fails on it."""
    try:
        text = clean(record.text) or ""
        text.encode()
    except Exception as error:  # a step may be the user's own function
        raise CorpusError(
            f"a cleaning step failed: {type(error).__name__}: {error}",
            where=f"{file}, {record.unit} {record.row}",
            why="every document passes through corpus.clean",
            fix="correct the step: it takes a str and returns a str, or None to drop the document",
        ) from error
    return text


def open_source(source: Source, corpus: Corpus) -> SourceFiles:
    """Lists the files.

    Raises CorpusError if there are none, if the first one lacks the text column or, with on_error "fail",
    if some have no known format or are Git LFS's pointers.
    """
    listing = look_up(source)
    if listing.unused and corpus.on_error == "fail":
        refuse_unused(listing)
    if listing.pointers and corpus.on_error == "fail":
        refuse_pointers(listing)
    options = ReadOptions(
        *(source.format, source.text_column, source.document, source.encoding),
        *(source.records, source.delimiter, source.quote),
    )
    _refuse_options_without_effect(listing.files, options)
    check_column(next((file for file in listing.files if file.size), listing.files[0]), options)
    files = tuple(sorted((*listing.files, *listing.unused), key=lambda file: file.name))
    return SourceFiles(files, options, tuple(corpus.clean), corpus.slice_bytes, listing.left_out)


def _refuse_options_without_effect(files: Sequence[File], options: ReadOptions) -> None:
    """CorpusError for an option of a format that no file has."""
    formats = {file.format for file in files}
    for name, value, of in [
        ("records", options.records, "json"),
        ("delimiter", options.delimiter, "csv"),
        ("quote", options.quote, "csv"),
    ]:
        if value is not None and of not in formats:
            raise CorpusError(
                f"the source's {name} has no effect: none of its files is read as {of}",
                where=files[0].location, why=f"they are read as {', '.join(sorted(formats))}",
                fix=f"drop {name}, or set the source's format to {of}",
            )  # fmt: skip
