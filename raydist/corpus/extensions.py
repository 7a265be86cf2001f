"""What a file's name says about its content."""

from __future__ import annotations

from typing import Literal, cast

from raydist.errors import CorpusError

Kind = Literal["parquet", "jsonl", "json", "csv", "text", "arrow"]
Compression = Literal["gz", "zst", "bz2"]

EXTENSIONS: dict[Kind, tuple[str, ...]] = {
    "parquet": ("parquet", "pq"),
    "jsonl": ("jsonl", "ndjson"),
    "json": ("json",),
    "csv": ("csv", "tsv"),
    "text": ("txt", "text", "md", "py"),
    "arrow": ("arrow", "feather", "ipc"),
}
FORMATS = {extension: kind for kind, extensions in EXTENSIONS.items() for extension in extensions}
COMPRESSIONS: tuple[Compression, ...] = ("gz", "zst", "bz2")
BLOCK_FORMATS: tuple[Kind, ...] = ("parquet", "arrow")  # these compress inside and need random access


def split_name(name: str) -> tuple[str, Compression | None]:
    """("csv", "gz") of a/b.CSV.gz: the extension in lower case, and the compression around it."""
    *stem, last = name.rsplit("/", 1)[-1].lower().split(".")
    if last in COMPRESSIONS and stem:
        return (stem[-1] if len(stem) > 1 else ""), last
    return (last if stem else ""), None


def is_known(name: str) -> bool:
    """Whether `format: auto` can read a file of this name."""
    extension, compression = split_name(name)
    return extension in FORMATS and not (compression and FORMATS[extension] in BLOCK_FORMATS)


def detect_format(name: str, asked: str) -> tuple[Kind, Compression | None]:
    """The format and compression of a file; `asked` overrides the extension's format unless "auto".

    CorpusError: an extension that says nothing, or compressed parquet or Arrow.
    """
    extension, compression = split_name(name)
    kind = FORMATS.get(extension) if asked == "auto" else cast(Kind, asked)
    if kind is None:
        known = ", ".join(f".{extension}" for extension in FORMATS)
        raise CorpusError(
            f"the format of {name} is unknown",
            where=name,
            why=f"its name ends in none of {known} (and .gz, .zst or .bz2 after those)",
            fix="set the source's format: parquet, jsonl, json, csv, text or arrow",
        )
    if compression and kind in BLOCK_FORMATS:
        raise CorpusError(
            f"{name} is {kind} inside .{compression}",
            where=name,
            why=f"{kind} files are read in parts and hold their own compression",
            fix=f"decompress the file, leaving .{kind}",
        )
    return kind, compression
