"""Summarizes a dataset: how much is finished, what failed and what is wrong."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from captionlib.data.shards.dataset import ShardedDataset, open_dataset
from captionlib.data.shards.markers import SUCCESS_FILE
from captionlib.storage.folders import TEMPORARY_FOLDER

__all__ = ["DatasetReport", "FailureReport", "inspect_dataset"]


@dataclass(frozen=True)
class FailureReport:
    """The failures with one reason.

    Attributes:
        count: number of images.
        image_id: id of an example; empty if the file of failures is missing.
        uri: address of the example.
        message: error message of the example.
    """

    count: int
    image_id: str
    uri: str
    message: str


@dataclass(frozen=True)
class DatasetReport:
    """A summary of a dataset.

    Attributes:
        folder: address of the dataset.
        kind: manifest, features, captions or embeddings.
        fingerprint: hash of everything that the rows depend on.
        columns: types of the columns by name.
        config: everything that the rows depend on.
        complete: whether all shards are finished and the run succeeded.
        shards_done: number of finished shards.
        shards: number of shards of the complete dataset.
        rows: number of rows in the finished shards.
        size: size of the finished shards, in bytes.
        seconds: time spent on the finished shards, summed over workers.
        failed: number of failed images in the finished shards.
        failures: failures by reason, the most frequent first.
        temporary_files: number of temporary files, of running or dead runs; the next successful run removes them.
        problems: inconsistencies; those in file contents only if the files were verified.
    """

    folder: str
    kind: str
    fingerprint: str
    columns: Mapping[str, str]
    config: Mapping[str, Any]
    complete: bool
    shards_done: int
    shards: int
    rows: int
    size: int
    seconds: float
    failed: int
    failures: Mapping[str, FailureReport]
    temporary_files: int
    problems: list[str]


def inspect_dataset(uri: str | os.PathLike[str], verify: bool = False) -> DatasetReport:
    """Summarizes a dataset, complete or not.

    Args:
        uri: the folder of the dataset.
        verify: also read every data file and compare its checksum with the marker.

    Raises:
        DatasetError: the folder is not a dataset.
    """
    dataset = open_dataset(uri)
    totals = dataset.compute_totals()
    return DatasetReport(
        folder=dataset.folder.uri,
        kind=dataset.kind,
        fingerprint=dataset.fingerprint,
        columns={column.name: str(column.type) for column in dataset.schema},
        config=dataset.config,
        complete=dataset.is_complete(),
        shards_done=totals.shards,
        shards=dataset.shards,
        rows=totals.rows,
        size=totals.bytes,
        seconds=totals.seconds,
        failed=totals.failures,
        failures=_summarize_failures(dataset, totals.reasons),
        temporary_files=len(dataset.folder.list(TEMPORARY_FOLDER)),
        problems=[*_find_contradictions(dataset, totals.shards), *(dataset.verify() if verify else [])],
    )


def _find_contradictions(dataset: ShardedDataset, done: int) -> list[str]:
    if not dataset.is_complete() or done == dataset.shards:
        return []
    return [
        f"{SUCCESS_FILE}: says that all {dataset.shards} shards are finished, but only {done} have a marker of this "
        "dataset"
    ]


def _summarize_failures(dataset: ShardedDataset, reasons: Mapping[str, int]) -> dict[str, FailureReport]:
    """Reads failures until each reason has an example."""
    examples: dict[str, FailureReport] = {}
    for shard, marker in sorted(dataset.read_markers().items()):
        if marker.reasons.keys() <= examples.keys():
            continue
        table = dataset.read_failures(shard)
        for row in table.to_pylist() if table is not None else []:
            if row["error"] in reasons:
                example = FailureReport(reasons[row["error"]], row["image_id"], row["uri"], row["message"])
                examples.setdefault(row["error"], example)
    return {reason: examples.get(reason, FailureReport(count, "", "", "")) for reason, count in reasons.items()}
