"""From a source of the job to its token log: plan it, make its missing slices on Ray, or estimate it."""

from __future__ import annotations

import contextlib
import functools
import threading
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raydist.corpus.formats.table import reader_of
from raydist.corpus.log import FORMAT, Shard, TokenLog, gathered, open_log, token_dtype
from raydist.corpus.log_folder import LogFolder
from raydist.corpus.slices import Slice, from_json, to_json
from raydist.corpus.source import SourceFiles, open_source
from raydist.corpus.tokenizer import TokenizerSpec, open_tokenizer
from raydist.errors import ClusterError, EmptyCorpus, LogError, RaydistError
from raydist.fingerprint import fingerprint
from raydist.job.schema import Corpus, Source

if TYPE_CHECKING:
    from raydist.corpus.pipeline import Share

SAMPLE_TEXTS = 64
SAMPLE_CHARACTERS = 4096
"""Used of each sample text: the reference library is slow."""
ESTIMATE_SLICES = 2
ESTIMATE_BYTES = 96 * 2**20
ESTIMATE_TOKENIZED_BYTES = 4 * 2**20
ASSUMED_COMPRESSION = 3.0
POLL_SECONDS = 0.5
CPU_PATIENCE_SECONDS = 20.0
VERIFYING_THREADS = 4


@dataclass(frozen=True)
class LogPlan:
    """A token log to make. It depends on the source files and the settings, not on slices made before.

    tokenizer: None if it is still to be trained.  identity: all that decides the content.
    """

    source: SourceFiles
    tokenizer: TokenizerSpec | None
    identity: dict[str, Any]
    fingerprint: str
    path: Path

    @property
    def n_files(self) -> int:
        return len(self.source.files)

    @property
    def n_bytes(self) -> int:
        """Bytes of the source files."""
        return self.source.n_bytes

    @property
    def folder(self) -> LogFolder:
        return LogFolder(self.path)

    @functools.cached_property
    def slices(self) -> list[Slice]:
        """Read from the token log's plan if there is one, because planning may read every source file."""
        known = self.written
        return from_json(known["slices"]) if known else self.source.plan()

    @property
    def written(self) -> dict[str, Any]:
        """The plan in the token log's folder; {} if there is none, or one that is damaged or another's."""
        try:
            plan = self.folder.read_plan()
        except LogError:
            return {}
        return plan if plan and fingerprint(plan["identity"]) == self.fingerprint else {}

    @property
    def n_slices(self) -> int:
        return len(self.slices)

    @functools.cached_property
    def backend(self) -> str:
        """The tokenizer's backend, chosen once, with a sample of the text."""
        assert self.tokenizer is not None
        sample = [text[:SAMPLE_CHARACTERS] for text in islice(self.source.texts(self.slices), SAMPLE_TEXTS)]
        return open_tokenizer(self.tokenizer, sample).backend

    @property
    def complete(self) -> bool:
        return self.folder.complete()


@dataclass(frozen=True)
class Progress:
    """Slices of a token log, and what the finished ones hold. n_bytes: of cleaned UTF-8 text."""

    n_slices: int
    n_done: int
    n_documents: int
    n_tokens: int
    n_bytes: int


@dataclass(frozen=True)
class Estimate:
    """n_bytes: of cleaned UTF-8 text.  n_tokens: 0 if there is no tokenizer yet.

    mean_words: words per document.  unique_share: share of distinct texts. Both describe the sample.
    """

    n_documents: int
    n_tokens: int
    n_bytes: int
    mean_words: float
    unique_share: float


def plan_log(source: Source, corpus: Corpus, tokenizer: TokenizerSpec | None, tokens_dir: Path) -> LogPlan:
    """Needs no Ray. tokenizer: None if it is still to be trained; then the plan serves for `estimate` only.

    Raises CorpusError if there are no files, or no text column.
    """
    files = open_source(source, corpus)
    used = tokenizer.fingerprint if tokenizer else None
    identity = {"format": FORMAT, "source": files.identity(), "tokenizer": used}
    name = fingerprint(identity)
    return LogPlan(files, tokenizer, identity, name, tokens_dir / name)


def build_log(
    plan: LogPlan,
    *,
    on_error: str,
    on_progress: Callable[[Progress], None] = lambda now: None,
    stop: int | None = None,
    share: Share | None = None,
    verify: bool = False,
) -> TokenLog:
    """The token log of `plan`. Only missing slices are made, on the Ray that the caller has started.

    verify: read the shards that exist, and make those again whose bytes are not what was written. Damaged
    records are always made again.
    on_error: "fail" raises BadRecords for unreadable records, "quarantine" leaves them out; in both cases
    finished slices are kept.  stop: make only the slices before this number, and return the token log as far
    as it goes. Raises EmptyCorpus if no document is left, ClusterError if no CPU is free.
    """
    slices = _Slices(plan, verify)
    slices.begin()
    if on_error == "fail" and not plan.complete:
        slices.leave_out_bad()
    _refuse_bad(slices, on_error)
    if wanted := [number for number in slices.missing if stop is None or number < stop]:
        with _reporting(slices, on_progress):
            _make(slices, wanted, on_error, share)
    slices.poll()
    if stop is None and slices.missing:
        raise LogError(f"{len(slices.missing)} slices of the token log were not made", where=str(plan.path))
    _refuse_bad(slices, on_error)
    if slices.missing:
        return open_log(plan.path, growing=True)
    if slices.repaired or not _has_manifest(slices):
        _finish(slices)
    return open_log(plan.path)


class _Slices:
    """The commit records of a token log that is being made. repaired: it was complete, but lacked files."""

    def __init__(self, plan: LogPlan, verify: bool = False) -> None:
        self.plan, self.folder = plan, plan.folder
        self.records: dict[int, dict[str, Any]] = {}
        self.poll()
        if verify:
            self._leave_out_damaged()
        self.repaired = plan.complete and bool(self.missing)

    def begin(self) -> None:
        """Write the plan, the first file of the folder."""
        if not self.plan.written:
            slices = to_json(self.plan.slices)
            self.folder.write_plan(
                {"identity": self.plan.identity, "log": _head(self.plan), "slices": slices}
            )

    def poll(self) -> None:
        """Add the slices that were committed since.

        A slice does not count if one of its files is missing or its record is damaged.
        """
        committed = set(self.folder.committed())
        for number in self.missing:
            record = None
            with contextlib.suppress(LogError):
                record = self.folder.read_commit(number) if number in committed else None
            if record is not None and self.folder.is_whole(number, record):
                self.records[number] = record

    def _leave_out_damaged(self) -> None:
        """Slices with a shard whose bytes are not those that were written are committed no more."""
        numbers = list(self.records)
        with ThreadPoolExecutor(VERIFYING_THREADS) as pool:
            for number, intact in zip(numbers, pool.map(self._is_intact, numbers), strict=True):
                if not intact:
                    self.folder.remove_commit(number)
                    del self.records[number]

    def leave_out_bad(self) -> None:
        """Slices with records that could not be read are read again: a later version may read them."""
        for number in self.bad:
            self.folder.remove_commit(number)
            del self.records[number]

    def _is_intact(self, number: int) -> bool:
        try:
            for shard in self.records[number]["shards"]:
                Shard(path=self.folder.shard(shard["name"]), **shard).verify()
        except LogError:
            return False
        return True

    @property
    def missing(self) -> list[int]:
        return [number for number in range(self.plan.n_slices) if number not in self.records]

    @property
    def shards(self) -> list[dict[str, Any]]:
        """In planned order."""
        return [shard for number in sorted(self.records) for shard in self.records[number]["shards"]]

    @property
    def bad(self) -> list[int]:
        """Slices with records that could not be read."""
        return [number for number in sorted(self.records) if self.records[number]["n_quarantined"]]

    def total(self, key: str) -> int:
        return sum(record[key] for record in self.records.values())

    def shard_total(self, key: str) -> int:
        return sum(shard[key] for shard in self.shards)

    def progress(self) -> Progress:
        totals = (self.shard_total(key) for key in ("n_documents", "n_tokens", "n_bytes"))
        return Progress(self.plan.n_slices, len(self.records), *totals)


def _refuse_bad(slices: _Slices, on_error: str) -> None:
    from raydist.corpus.pipeline import BAD_SHOWN, bad_records

    if on_error == "fail" and slices.bad:
        first = (bad for number in slices.bad for bad in slices.folder.read_quarantine(number))
        raise bad_records(list(islice(first, BAD_SHOWN)), slices.total("n_quarantined"), slices.folder)


def _make(slices: _Slices, wanted: Sequence[int], on_error: str, share: Share | None) -> None:
    from raydist.corpus.pipeline import WHOLE_CLUSTER, LogDatasink, write_slices

    plan = slices.plan
    assert plan.tokenizer is not None
    _require_cpu()
    missing = {number: plan.slices[number] for number in wanted}
    sink = LogDatasink(plan.folder, fail_on_bad=on_error == "fail")
    try:
        write_slices(plan.source, missing, plan.tokenizer, plan.backend, sink, share or WHOLE_CLUSTER)
    except RaydistError:
        # Another process may have made them first, and tidied the folder while this one worked.
        slices.poll()
        if set(wanted) & set(slices.missing):
            raise


def _require_cpu() -> None:
    """ClusterError if no CPU becomes free: Ray Data would wait for ever if other work reserves them all."""
    import ray

    deadline = time.monotonic() + CPU_PATIENCE_SECONDS
    while (free := ray.available_resources().get("CPU", 0.0)) < 1:
        if time.monotonic() > deadline:
            total = ray.cluster_resources().get("CPU", 0.0)
            raise ClusterError(
                f"no CPU is free to prepare the corpus: {free:g} of {total:g} CPUs of the cluster",
                why="reading and tokenizing run as Ray tasks of one CPU each",
                fix="wait until other work ends, or add CPUs to the cluster",
            )
        time.sleep(0.2)


@contextmanager
def _reporting(slices: _Slices, on_progress: Callable[[Progress], None]) -> Iterator[None]:
    """Call `on_progress` from a thread whenever slices were committed, and once at each end."""
    done = threading.Event()

    def watch() -> None:
        last = None
        while not done.wait(POLL_SECONDS):
            slices.poll()
            if (progress := slices.progress()) != last:
                on_progress(progress)
                last = progress

    thread = threading.Thread(target=watch, name="raydist-prepare-progress", daemon=True)
    on_progress(slices.progress())
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        slices.poll()
        on_progress(slices.progress())


def _finish(slices: _Slices) -> None:
    """Tidy the folder and write the manifest, last. EmptyCorpus if there is no document."""
    plan = slices.plan
    n_documents, n_bad = slices.shard_total("n_documents"), slices.total("n_quarantined")
    if n_documents == 0:
        raise EmptyCorpus(
            "no document is left in this source",
            where=", ".join(file.name for file in plan.source.files[:5]),
            why=f"its {plan.n_files} files hold {slices.total('n_empty')} documents without text after "
            f"cleaning and {n_bad} unreadable records",
            fix="check path, text_column and corpus.clean",
        )
    slices.folder.tidy(slices.records)
    if slices.bad:
        slices.folder.join_quarantines(slices.bad)
    slices.folder.write_manifest(_manifest(slices))


def _manifest(slices: _Slices) -> dict[str, Any]:
    records = [slices.records[number] for number in sorted(slices.records)]
    left_out = slices.plan.source.left_out
    return {**_head(slices.plan), **gathered(records), **({"left_out": left_out} if left_out else {})}


def _has_manifest(slices: _Slices) -> bool:
    """Whether there is a manifest that says what the commit records say.

    What its source left out may differ: other files with other neighbours make the same token log.
    """
    try:
        found, expected = slices.folder.read_manifest(), _manifest(slices)
    except (FileNotFoundError, LogError):
        return False
    return {**found, "left_out": None} == {**expected, "left_out": None}


def _head(plan: LogPlan) -> dict[str, Any]:
    """The part of the manifest that is known before the first token."""
    assert plan.tokenizer is not None
    return {
        "format": FORMAT,
        "fingerprint": plan.fingerprint,
        "dtype": token_dtype(plan.tokenizer.vocab_size).name,
        "vocab_size": plan.tokenizer.vocab_size,
        "eos_token_id": plan.tokenizer.eos_token_id,
        "tokenizer": plan.tokenizer.fingerprint,
    }


def estimate(plan: LogPlan) -> Estimate:
    """Documents, tokens and text of the token log, estimated from its first slices; exact for a complete one.

    Slices are in hashed order, so the first ones are a random sample.
    """
    sample, covered = _sample(plan)
    n_sampled = max(1, len(sample))
    mean_words = sum(len(text.split()) for text in sample) / n_sampled
    unique_share = len(set(sample)) / n_sampled
    if plan.complete:
        log = open_log(plan.path)
        return Estimate(log.n_documents, log.n_tokens, log.n_bytes, mean_words, unique_share)
    scale = plan.n_bytes / max(covered, 1)
    n_bytes = sum(len(text.encode()) for text in sample) * scale
    n_tokens = n_bytes * _tokens_per_byte(plan.tokenizer, sample) if plan.tokenizer else 0.0
    return Estimate(round(len(sample) * scale), round(n_tokens), round(n_bytes), mean_words, unique_share)


def _sample(plan: LogPlan) -> tuple[list[str], float]:
    """Documents of the first slices, and how many bytes of source files they came from."""
    texts: list[str] = []
    covered, n_bytes = 0.0, 0
    for slice_ in plan.slices[:ESTIMATE_SLICES]:
        before = n_bytes
        for text in plan.source.texts([slice_]):
            texts.append(text)
            n_bytes += len(text.encode())
            if n_bytes - before > ESTIMATE_BYTES:  # a large file that cannot be split: its rest stays unread
                file = plan.source.files[slice_.parts[0].file]
                compressed = file.compression or reader_of(file).compresses
                ratio = ASSUMED_COMPRESSION if compressed else 1
                covered += min(slice_.n_bytes, (n_bytes - before) / ratio)
                break
        else:
            covered += slice_.n_bytes
    return texts, covered


def _tokens_per_byte(spec: TokenizerSpec, sample: Sequence[str]) -> float:
    sizes = list(accumulate(len(text.encode()) for text in sample))
    n = max(1, bisect_right(sizes, ESTIMATE_TOKENIZED_BYTES))
    tokenizer = open_tokenizer(spec, [text[:SAMPLE_CHARACTERS] for text in sample[:SAMPLE_TEXTS]])
    _, offsets = tokenizer.encode_batch(sample[:n])
    return int(offsets[-1]) / sizes[n - 1] if sizes else 0.0
