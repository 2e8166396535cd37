"""Markers: JSON files, each of which marks a shard of a dataset as finished and describes it."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from captionlib.data.shards.schemas import SCHEMA_VERSION

__all__ = [
    "DESCRIPTION_FILE",
    "FAILURES_FOLDER",
    "MARKERS_FOLDER",
    "SUCCESS_FILE",
    "Marker",
    "Totals",
    "compute_checksum",
    "compute_fingerprint",
    "part_name",
    "sum_markers",
    "to_json",
]

DESCRIPTION_FILE = "_dataset.json"
SUCCESS_FILE = "_SUCCESS"
MARKERS_FOLDER = "_shards"
FAILURES_FOLDER = "_failures"


@dataclass(frozen=True)
class Marker:
    """Describes a finished shard.

    Attributes:
        failures: number of images that could not be read.
        bytes: size of the data file.
        checksum: checksum of the data file; see `compute_checksum`.
        seconds: time taken to write the shard.
        fingerprint: hash of everything that determines the rows; see `compute_fingerprint`.
        reasons: number of failures by reason.
    """

    shard: int
    rows: int
    failures: int
    bytes: int
    checksum: str
    seconds: float
    fingerprint: str
    reasons: Mapping[str, int] = field(default_factory=dict)

    @property
    def images(self) -> int:
        return self.rows + self.failures


@dataclass(frozen=True)
class Totals:
    """Totals over the finished shards of a dataset; see `Marker` for the attributes."""

    shards: int
    rows: int
    failures: int
    bytes: int
    seconds: float
    reasons: Mapping[str, int]

    @property
    def images(self) -> int:
        return self.rows + self.failures

    def exceeds(self, max_failure_ratio: float | None) -> bool:
        """Returns whether more images failed than allowed. If `max_failure_ratio` is None, all but one may fail."""
        if max_failure_ratio is None:
            return self.rows == 0 and self.failures > 0
        return self.failures > max_failure_ratio * self.images

    def describe_failures(self) -> str:
        """Returns the number of failed images, their fraction and the reasons."""
        reasons = ", ".join(f"{reason}: {count:,}" for reason, count in self.reasons.items())
        return f"{self.failures:,} of {self.images:,} images ({self.failures / self.images:.1%}) failed ({reasons})"


def part_name(shard: int) -> str:
    """Returns the file name of a shard's data, failures and marker, without the extension."""
    return f"part-{shard:05d}"


def sum_markers(markers: Iterable[Marker]) -> Totals:
    """Sums the markers of a dataset."""
    shards = rows = failures = size = 0
    seconds, reasons = 0.0, Counter[str]()
    for marker in markers:
        shards += 1
        rows += marker.rows
        failures += marker.failures
        size += marker.bytes
        seconds += marker.seconds
        reasons.update(marker.reasons)
    return Totals(shards, rows, failures, size, round(seconds, 3), dict(reasons.most_common()))


def compute_fingerprint(kind: str, config: Mapping[str, Any]) -> str:
    """Returns a hash of everything that determines the rows of a dataset: kind, schema version and configuration."""
    identity = {"kind": kind, "schema_version": SCHEMA_VERSION, "config": config}
    canonical = json.dumps(identity, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()


def compute_checksum(file: BinaryIO) -> str:
    """Returns the SHA-256 of a file as `sha256:HEX`."""
    digest = hashlib.sha256()
    while block := file.read(16 << 20):
        digest.update(block)
    return f"sha256:{digest.hexdigest()}"


def to_json(content: Mapping[str, Any] | Sequence[Any]) -> bytes:
    """Encodes values as indented UTF-8 JSON, the format of all of captionlib's JSON files."""
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
