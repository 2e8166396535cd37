"""Datasets as folders of shards, each of which is there whole or not at all.

    folder/
      part-00000.parquet ...          rows; at the top level there are only complete files
      _dataset.json                   what it is and what made it (kind, schema version, configuration, fingerprint)
      _shards/part-00000.json ...     a marker a shard, written last: with it the shard is done
      _failures/part-00000.parquet    the images of a shard that could not be had; absent where there are none
      _SUCCESS                        the totals, once every shard is done

A shard's files appear in the order data, failures, marker. Whoever dies in between leaves a shard without a marker,
which the next run does again.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from captionlib.data.schemas import SCHEMA_VERSION
from captionlib.errors import DatasetError, FailureRatioError
from captionlib.storage import TEMPORARY, Folder

__all__ = [
    "DESCRIPTION",
    "FAILURES",
    "MARKERS",
    "SUCCESS",
    "Marker",
    "ShardedDataset",
    "Totals",
    "checksum_of",
    "fingerprint_of",
    "part_name",
    "sum_markers",
    "to_json",
]

DESCRIPTION = "_dataset.json"
SUCCESS = "_SUCCESS"
MARKERS = "_shards"
FAILURES = "_failures"


@dataclass(frozen=True)
class Marker:
    """What is known of a shard that is done."""

    shard: int
    rows: int
    failures: int
    bytes: int
    checksum: str
    seconds: float
    fingerprint: str
    reasons: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Totals:
    """What is known of all the shards that are done."""

    shards: int
    rows: int
    failures: int
    bytes: int
    seconds: float
    reasons: Mapping[str, int]

    @property
    def images(self) -> int:
        return self.rows + self.failures


def part_name(shard: int) -> str:
    """The name that a shard's data, failures and marker share, without extension."""
    return f"part-{shard:05d}"


def sum_markers(markers: Iterable[Marker]) -> Totals:
    """Adds markers up."""
    shards = rows = failures = size = 0
    seconds = 0.0
    reasons: Counter[str] = Counter()
    for marker in markers:
        shards += 1
        rows += marker.rows
        failures += marker.failures
        size += marker.bytes
        seconds += marker.seconds
        reasons.update(marker.reasons)
    return Totals(shards, rows, failures, size, round(seconds, 3), dict(reasons.most_common()))


def fingerprint_of(kind: str, config: Mapping[str, Any]) -> str:
    """A hash of all that a dataset's rows depend on; equal configurations have equal fingerprints on every machine."""
    identity = {"kind": kind, "schema_version": SCHEMA_VERSION, "config": config}
    canonical = json.dumps(identity, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()


def checksum_of(file: BinaryIO) -> str:
    """The SHA-256 of a file's content, as markers carry it."""
    digest = hashlib.sha256()
    while block := file.read(16 << 20):
        digest.update(block)
    return f"sha256:{digest.hexdigest()}"


def to_json(content: Mapping[str, Any] | Sequence[Any]) -> bytes:
    """How captionlib writes its JSON files."""
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


@dataclass(frozen=True)
class ShardedDataset:
    """A dataset in a folder. Pickles to an address and a description, so it travels to workers.

    Attributes:
        folder: where it is.
        kind: what a row is: manifest, features, captions or embeddings.
        config: all that the rows depend on.
        fingerprint: the hash of kind, schema version and config.
        shards: how many parts it has when it is complete.
        schema: the Arrow schema of its parts.
    """

    folder: Folder
    kind: str
    config: Mapping[str, Any]
    fingerprint: str
    shards: int
    schema: pa.Schema

    def done(self) -> set[int]:
        """The shards that have a marker, by one listing."""
        names = (name for name in self.folder.list(MARKERS) if name.endswith(".json"))
        found = {int(name.removeprefix("part-").removesuffix(".json")) for name in names}
        return {shard for shard in found if shard < self.shards}

    def pending(self) -> list[int]:
        """The shards that are still to be done."""
        return sorted(set(range(self.shards)) - self.done())

    def marker(self, shard: int) -> Marker | None:
        """The marker of a shard, None where it is not done."""
        try:
            content = self.folder.read(f"{MARKERS}/{part_name(shard)}.json")
        except FileNotFoundError:
            return None
        marker = Marker(**json.loads(content))
        return marker if marker.fingerprint == self.fingerprint else None

    def markers(self, shards: Iterable[int] | None = None) -> dict[int, Marker]:
        """The markers of these shards, or of all that are done."""
        return {marker.shard: marker for marker in self.read_markers(self.done() if shards is None else shards)}

    def read_markers(self, shards: Iterable[int]) -> Iterator[Marker]:
        """The markers of these shards in any order, fetched concurrently; memory holds some of them."""
        for content in self.folder.read_many(f"{MARKERS}/{part_name(shard)}.json" for shard in sorted(shards)):
            marker = Marker(**json.loads(content))
            if marker.fingerprint == self.fingerprint:
                yield marker

    def totals(self) -> Totals:
        """Of all the shards that are done, by reading all of their markers."""
        return sum_markers(self.read_markers(self.done()))

    def recorded_totals(self) -> Totals | None:
        """What `_SUCCESS` tells; None where it is not there."""
        try:
            content = json.loads(self.folder.read(SUCCESS))
        except FileNotFoundError:
            return None
        return Totals(**content) if content.pop("fingerprint") == self.fingerprint else None

    def is_complete(self) -> bool:
        return self.folder.exists(SUCCESS)

    def reopen(self) -> None:
        """Says that shards are going to be written: until `finish` the dataset is not complete."""
        self.folder.remove_file(SUCCESS)

    def require_complete(self) -> "ShardedDataset":
        """Itself.

        Raises:
            DatasetError: some of its shards are not done.
        """
        if not self.is_complete():
            raise DatasetError(
                f"{self.folder.uri} is not complete: expected {self.shards} shards, {len(self.done())} are done, "
                "or the last run ended with too many failures; run the command that writes it again"
            )
        return self

    def part_path(self, shard: int) -> str:
        """The path of a shard's data, as the folder's file system spells it."""
        return self.folder.path(f"{part_name(shard)}.parquet")

    def read(self, shard: int, columns: Sequence[str] | None = None) -> pa.Table:
        """A whole shard."""
        with self.folder.open(f"{part_name(shard)}.parquet") as file:
            return pq.read_table(file, columns=list(columns) if columns is not None else None)

    def read_batches(
        self, shard: int, columns: Sequence[str] | None = None, batch_size: int = 256
    ) -> Iterator[pa.RecordBatch]:
        """A shard in pieces of `batch_size` rows; memory holds one row group."""
        with self.folder.open(f"{part_name(shard)}.parquet") as file:
            parquet = pq.ParquetFile(file, pre_buffer=True)  # the columns of a row group come by a request or two
            for group in range(parquet.num_row_groups):
                yield from parquet.iter_batches(
                    batch_size, row_groups=[group], columns=list(columns) if columns is not None else None
                )

    def read_failures(self, shard: int) -> pa.Table | None:
        """The failures of a shard, None where there are none."""
        name = f"{FAILURES}/{part_name(shard)}.parquet"
        if not self.folder.exists(name):
            return None
        with self.folder.open(name) as file:
            return pq.read_table(file)

    def forget(self, shard: int) -> None:
        """Takes a shard's marker away: until it is written again, neither shard nor dataset is done."""
        self.reopen()
        self.folder.remove_file(f"{MARKERS}/{part_name(shard)}.json")

    def finish(self, max_failure_ratio: float = 1.0) -> Totals:
        """Checks that every shard is done and writes `_SUCCESS`, unless it is there.

        Raises:
            DatasetError: a shard is missing.
            FailureRatioError: more than `max_failure_ratio` of the images failed.
        """
        recorded = None if self.pending() else self.recorded_totals()
        totals = recorded or self.totals()
        if totals.shards < self.shards:
            missing = sorted(set(range(self.shards)) - set(self.markers()))
            raise DatasetError(
                f"{self.folder.uri}: expected {self.shards} shards, {len(missing)} are not done "
                f"(the first is {part_name(missing[0])}); run the command again, it goes on where it stopped"
            )
        if totals.failures > max_failure_ratio * totals.images:
            self.reopen()
            raise FailureRatioError(_describe_failures(self, totals, max_failure_ratio))
        if recorded is None:
            self.folder.write(SUCCESS, to_json({**asdict(totals), "fingerprint": self.fingerprint}))
            self.folder.remove(TEMPORARY)
        return totals

    def verify(self) -> list[str]:
        """What is wrong with the parts that are done, a line each: missing, or other than their marker says."""
        problems = []
        names = set(self.folder.list())
        for shard, marker in self.markers().items():
            name = f"{part_name(shard)}.parquet"
            if name not in names:
                problems.append(f"{name}: missing")
                continue
            with self.folder.open(name) as file:
                checksum = checksum_of(file)
            if checksum != marker.checksum:
                problems.append(f"{name}: expected {marker.checksum}, got {checksum}")
        return problems


def _describe_failures(dataset: ShardedDataset, totals: Totals, max_failure_ratio: float) -> str:
    reasons = ", ".join(f"{reason}: {count}" for reason, count in totals.reasons.items())
    return (
        f"{dataset.folder.uri}: {totals.failures} of {totals.images} images failed "
        f"({totals.failures / totals.images:.1%}, allowed {max_failure_ratio:.1%}; {reasons}). All rows are kept: "
        f"see {FAILURES}/, then run again with --retry-failures, or with a higher --max-failure-ratio"
    )
