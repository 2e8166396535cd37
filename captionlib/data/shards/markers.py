"""Markers: JSON files that describe complete shards of a dataset. A shard without a marker is not complete."""

import hashlib
import json
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from typing import Any, BinaryIO

from pydantic import TypeAdapter

from captionlib.data.shards.schemas import SCHEMA_VERSIONS
from captionlib.storage.folders import Folder

__all__ = [
    "BLOCK_BYTES",
    "DESCRIPTION_FILE",
    "FAILURES_FOLDER",
    "JOURNAL_FILE",
    "MARKERS_FOLDER",
    "PROGRESS_EXTENSION",
    "REMOVED_FILE",
    "SAMPLE_FOLDER",
    "STALE",
    "SUCCESS_FILE",
    "UPDATE_FOLDER",
    "Marker",
    "ShardProgress",
    "Totals",
    "compute_block_checksum",
    "compute_checksum",
    "compute_checksums",
    "compute_fingerprint",
    "data_file",
    "decode_marker",
    "decode_progress",
    "decode_totals",
    "encode_progress",
    "failures_file",
    "format_time",
    "from_json",
    "from_json_with_checksum",
    "marker_file",
    "parse_time",
    "part_name",
    "progress_file",
    "read_marker",
    "sum_markers",
    "to_json",
    "to_json_with_checksum",
    "write_marker",
]

DESCRIPTION_FILE = "_dataset.json"
SUCCESS_FILE = "_SUCCESS"
MARKERS_FOLDER = "__shards"
FAILURES_FOLDER = "__failures"
PROGRESS_EXTENSION = ".progress"
JOURNAL_FILE = "_update.json"  # lists the new shards of a committed update until they are in place
UPDATE_FOLDER = "__update"  # new shards of an update
REMOVED_FILE = "_removed.json"  # hashes of the ids of images that `captionlib remove` removed
SAMPLE_FOLDER = "__sample"  # temporary sample of the input, if a stage processes only some of its rows

STALE = "stale"
"""Stored in a marker as `input_checksum` so that the next run of the stage processes the shard again."""

BLOCK_BYTES = 256 << 10
"""Size of a block of a data file. Each block has a checksum, so a reader of one column verifies only what it reads."""

_MAX_JSON_DEPTH = 100
_RECORD_CHECKSUM = "crc32"  # key of the checksum in a JSON file


@dataclass(frozen=True)
class Marker:
    """Describes a finished shard or, if `previous` is set, one that is being replaced.

    Attributes:
        shard: number of the shard.
        rows: number of rows.
        failures: number of images that could not be read.
        bytes: size of the data file.
        checksum: checksum of the data file; see `compute_checksum`.
        seconds: time taken to write the shard.
        total_seconds: time taken to write this and all earlier versions of the shard.
        finished: when the shard was finished, as an ISO 8601 time in UTC. Empty if unknown.
        fingerprint: hash of everything that determines the rows, except for the input; see `compute_fingerprint`.
        input_checksum: checksum of the data file of the input shard that this shard was made from; empty if there is
            none. For a dataset of duplicates, a hash of the checksums of all input shards.
        blocks: concatenated checksums of the blocks of the data file; see `compute_block_checksum`.
        failures_checksum: checksum of the failures file; empty if there is none.
        reasons: number of failures by reason.
        previous: marker of the version that is being replaced, or None. During the replacement, the data file may
            belong to either version.
    """

    shard: int
    rows: int
    failures: int
    bytes: int
    checksum: str
    seconds: float
    fingerprint: str
    input_checksum: str = ""
    blocks: str = ""
    failures_checksum: str = ""
    reasons: Mapping[str, int] = field(default_factory=dict)
    previous: "Marker | None" = None
    finished: str = ""
    total_seconds: float = 0.0

    @property
    def images(self) -> int:
        """Number of images of the input: those with an output row, and those that could not be read."""
        return self.rows + self.failures

    @property
    def versions(self) -> Iterator["Marker"]:
        """Yields the markers of the versions that the data file may belong to, the newest first."""
        marker: Marker | None = self
        while marker is not None:
            yield marker
            marker = marker.previous


@dataclass(frozen=True)
class ShardProgress:
    """What a worker has reported about a shard that it is writing.

    Attributes:
        shard: number of the shard.
        images: number of images processed so far.
        started: when the worker started the shard, as an ISO 8601 time in UTC.
        updated: when the worker reported this.
    """

    shard: int
    images: int
    started: str
    updated: str


@dataclass(frozen=True)
class Totals:
    """Totals over the finished shards of a dataset; see `Marker` for the other attributes.

    Attributes:
        checksum: hash of the checksums of all data files, in order. It changes when any row changes.
    """

    shards: int
    rows: int
    failures: int
    bytes: int
    seconds: float
    reasons: Mapping[str, int]
    checksum: str = ""
    total_seconds: float = 0.0

    @property
    def images(self) -> int:
        """Number of images of the input: those with an output row, and those that could not be read."""
        return self.rows + self.failures

    def exceeds(self, max_failure_ratio: float | None) -> bool:
        """Returns whether the fraction of failed images exceeds `max_failure_ratio`.

        If `max_failure_ratio` is None, returns whether all images failed.
        """
        if max_failure_ratio is None:
            return self.rows == 0 and self.failures > 0
        return self.failures > max_failure_ratio * self.images

    def describe_failures(self) -> str:
        """Returns the number of failed images, their fraction and the reasons."""
        reasons = ", ".join(f"{reason}: {count:,}" for reason, count in self.reasons.items())
        return f"{self.failures:,} of {self.images:,} images ({self.failures / self.images:.1%}) failed ({reasons})"


def part_name(shard: int) -> str:
    """Returns the name of the files of a shard, without the extension."""
    return f"part-{shard:05d}"


def data_file(shard: int) -> str:
    return f"{part_name(shard)}.parquet"


def failures_file(shard: int) -> str:
    return f"{FAILURES_FOLDER}/{part_name(shard)}.parquet"


def marker_file(shard: int) -> str:
    return f"{MARKERS_FOLDER}/{part_name(shard)}.json"


def progress_file(shard: int) -> str:
    return f"{MARKERS_FOLDER}/{part_name(shard)}{PROGRESS_EXTENSION}"


def format_time(seconds: float) -> str:
    """Returns a Unix time as an ISO 8601 time in UTC, such as `2026-06-01T12:00:00.000+00:00`."""
    return datetime.fromtimestamp(seconds, timezone.utc).isoformat(timespec="milliseconds")


def parse_time(text: str) -> float:
    """Converts an ISO 8601 time to a Unix time. Raises ValueError if the text is not a time."""
    return datetime.fromisoformat(text.replace("Z", "+00:00")).timestamp()  # Python 3.10 does not parse Z


_MARKER, _PROGRESS, _TOTALS = TypeAdapter(Marker), TypeAdapter(ShardProgress), TypeAdapter(Totals)


def decode_marker(content: bytes) -> Marker:
    """Decodes a marker. Raises ValueError if the content is damaged or not a marker."""
    marker = _MARKER.validate_python(from_json_with_checksum(content))
    if marker.finished:
        parse_time(marker.finished)
    return marker


def read_marker(folder: Folder, name: str) -> Marker | None:
    """Returns the marker in a file, or None if the file is missing or damaged."""
    for content in folder.read_many([name]):
        with suppress(ValueError):
            return decode_marker(content)
    return None


def write_marker(folder: Folder, marker: Marker) -> None:
    folder.write(marker_file(marker.shard), to_json_with_checksum(asdict(marker)))


def encode_progress(progress: ShardProgress) -> bytes:
    return to_json_with_checksum(asdict(progress))


def decode_progress(content: bytes) -> ShardProgress:
    """Decodes a progress file. Raises ValueError if the content is damaged."""
    progress = _PROGRESS.validate_python(from_json_with_checksum(content))
    parse_time(progress.started)
    parse_time(progress.updated)
    return progress


def decode_totals(content: bytes) -> tuple[Totals, str]:
    """Decodes `_SUCCESS`: the totals and the fingerprint of the dataset. Raises ValueError if it is damaged."""
    record = from_json_with_checksum(content)
    return _TOTALS.validate_python(record), str(record.get("fingerprint"))


def sum_markers(markers: Iterable[Marker]) -> Totals:
    shards = rows = failures = size = 0
    seconds, total_seconds, reasons = 0.0, 0.0, Counter[str]()
    checksums: dict[int, str] = {}
    for marker in markers:
        shards += 1
        rows += marker.rows
        failures += marker.failures
        size += marker.bytes
        seconds += marker.seconds
        total_seconds += marker.total_seconds
        reasons.update(marker.reasons)
        checksums[marker.shard] = marker.checksum
    digest = hashlib.sha256("\n".join(checksums[shard] for shard in sorted(checksums)).encode()).hexdigest()
    return Totals(
        *(shards, rows, failures, size, round(seconds, 3)),
        *(dict(reasons.most_common()), f"sha256:{digest}", round(total_seconds, 3)),
    )


def compute_fingerprint(kind: str, config: Mapping[str, Any]) -> str:
    """Returns a hash of what determines the rows of a dataset, except for its input."""
    identity = {"kind": kind, "schema_version": SCHEMA_VERSIONS.get(kind, 1), "config": config}
    canonical = json.dumps(identity, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()


def compute_checksum(file: BinaryIO) -> str:
    """Returns the SHA-256 of a file as `sha256:HEX`."""
    return compute_checksums(file)[0]


def compute_checksums(file: BinaryIO) -> tuple[str, str]:
    """Returns the SHA-256 of a file as `sha256:HEX`, and the concatenated checksums of its blocks."""
    digest, blocks = hashlib.sha256(), []
    while block := file.read(BLOCK_BYTES):
        digest.update(block)
        blocks.append(compute_block_checksum(block))
    return f"sha256:{digest.hexdigest()}", "".join(blocks)


def compute_block_checksum(block: bytes | memoryview) -> str:
    """Returns the CRC-32 of a block as 8 hexadecimal digits."""
    return f"{zlib.crc32(block):08x}"


def to_json(content: Mapping[str, Any] | Sequence[Any]) -> bytes:
    """Encodes values as indented UTF-8 JSON, the format of all of captionlib's JSON files."""
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


def from_json(content: str | bytes) -> Any:
    """Decodes JSON. Raises ValueError if the content is not JSON, or is nested more than 100 levels deep."""
    try:
        value = json.loads(content)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    level = [value]
    for _ in range(_MAX_JSON_DEPTH):
        nested = (node.values() if isinstance(node, dict) else node for node in level if isinstance(node, (dict, list)))
        level = [child for children in nested for child in children if isinstance(child, (dict, list))]
        if not level:
            return value
    raise ValueError("nested too deeply")


def to_json_with_checksum(content: Mapping[str, Any]) -> bytes:
    """Encodes values as JSON that contains their checksum; see `from_json_with_checksum`."""
    return to_json({**content, _RECORD_CHECKSUM: _compute_record_checksum(content)})


def from_json_with_checksum(content: bytes) -> dict[str, Any]:
    """Decodes the result of `to_json_with_checksum`. A JSON object without a checksum is accepted.

    Raises:
        ValueError: the content is not a JSON object, or does not match its checksum.
    """
    record = from_json(content)
    if not isinstance(record, dict):
        raise ValueError(f"expected an object, got {type(record).__name__}")
    expected = record.pop(_RECORD_CHECKSUM, None)
    if expected is not None and expected != _compute_record_checksum(record):
        raise ValueError("the content does not match its checksum")
    return record


def _compute_record_checksum(content: Mapping[str, Any]) -> str:
    return compute_block_checksum(json.dumps(content, sort_keys=True).encode())
