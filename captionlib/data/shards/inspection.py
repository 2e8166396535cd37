"""Summarizes a dataset: finished shards, images that could not be read (failures), and inconsistencies."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from captionlib.data.shards.dataset import ShardedDataset, open_dataset
from captionlib.data.shards.markers import SUCCESS_FILE
from captionlib.errors import CaptionlibError, DamagedShardError
from captionlib.storage.folders import TEMPORARY_FOLDER

__all__ = ["DatasetReport", "FailureReport", "inspect_dataset"]


@dataclass(frozen=True)
class FailureReport:
    """The number of failures with the same reason, and one of these failures as an example.

    All fields but `count` are empty if the failures file is missing.
    """

    count: int
    image_id: str
    uri: str
    message: str


@dataclass(frozen=True)
class DatasetReport:
    """A summary of a dataset and its finished shards.

    Attributes:
        kind: manifest (images and reference captions), features, captions (generated), embeddings or duplicates.
        fingerprint: hash of everything that determines the rows.
        columns: type of each column by name.
        complete: whether all shards are finished, and the fraction of failed images is within the limit of the run.
        explanation: why the dataset is not complete and what to do; empty if it is complete.
        size: size of the data files in bytes.
        seconds: time spent on the shards, summed over workers.
        source: path or URL of the dataset that this dataset was made from; empty if there is none.
        stale: number of shards of the source that have changed, or been added, since this dataset was written. None if
            the source cannot be read.
        failed: number of images that could not be read.
        failures: failures by reason (the category of the error), the most frequent first.
        temporary_files: number of temporary files of current and crashed runs. The next successful run removes them.
        problems: inconsistencies, including wrong checksums if `inspect_dataset` was called with `verify`.
    """

    folder: str
    kind: str
    fingerprint: str
    columns: Mapping[str, str]
    config: Mapping[str, Any]
    complete: bool
    explanation: str
    shards_done: int
    shards: int
    rows: int
    size: int
    seconds: float
    source: str
    stale: int | None
    failed: int
    failures: Mapping[str, FailureReport]
    temporary_files: int
    problems: list[str]


def inspect_dataset(uri: str | os.PathLike[str], verify: bool = False) -> DatasetReport:
    """Summarizes a dataset. If `verify` is set, checks each data file against the checksum in its marker file."""
    dataset = open_dataset(uri)
    totals = dataset.compute_totals()
    problems = dataset.verify() if verify else []
    complete = dataset.is_complete()
    if complete and totals.shards < dataset.shards:
        problems.insert(
            0,
            f"{SUCCESS_FILE} says that all {dataset.shards} shards are finished, but only {totals.shards} have a "
            "valid marker file (which marks a shard as finished)",
        )
    return DatasetReport(
        folder=dataset.folder.uri,
        kind=dataset.kind,
        fingerprint=dataset.fingerprint,
        columns={column.name: str(column.type) for column in dataset.schema},
        config=dataset.config,
        complete=complete,
        explanation="" if complete else dataset.explain_incompleteness(totals),
        shards_done=totals.shards,
        shards=dataset.shards,
        rows=totals.rows,
        size=totals.bytes,
        seconds=totals.seconds,
        source=dataset.source,
        stale=_count_stale_shards(dataset),
        failed=totals.failures,
        failures=_summarize_failures(dataset, totals.reasons),
        temporary_files=len(dataset.folder.list(TEMPORARY_FOLDER)),
        problems=problems,
    )


def _count_stale_shards(dataset: ShardedDataset) -> int | None:
    if not dataset.source:
        return 0
    try:
        source = open_dataset(dataset.source)
        source_markers = source.read_markers()
    except (CaptionlibError, OSError):
        return None
    markers = dataset.read_markers()
    if dataset.kind == "duplicates":  # one shard, made from all shards of the source
        return sum(marker.input_checksum != source.compute_content_checksum() for marker in markers.values())
    changed = sum(
        shard in source_markers and marker.input_checksum != source_markers[shard].checksum
        for shard, marker in markers.items()
    )
    return changed + sum(shard >= dataset.shards for shard in source_markers)


def _summarize_failures(dataset: ShardedDataset, reasons: Mapping[str, int]) -> dict[str, FailureReport]:
    """Reads failures until each reason has an example."""
    examples: dict[str, FailureReport] = {}
    for shard, marker in sorted(dataset.read_markers().items()):
        if marker.reasons.keys() <= examples.keys():
            continue
        try:
            table = dataset.read_failures(shard)
        except DamagedShardError:  # found by `verify`
            continue
        for row in table.to_pylist() if table is not None else []:
            if row["error"] in reasons:
                example = FailureReport(reasons[row["error"]], row["image_id"], row["uri"], row["message"])
                examples.setdefault(row["error"], example)
    return {reason: examples.get(reason, FailureReport(count, "", "", "")) for reason, count in reasons.items()}
