"""What a folder of captionlib holds, how far it is, and what failed in it."""

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
    """Failures of one reason.

    Attributes:
        count: how many images.
        image_id: one of them; empty where the file of the failures is gone.
        uri: where it was looked for.
        message: what was wrong with it.
    """

    count: int
    image_id: str
    uri: str
    message: str


@dataclass(frozen=True)
class DatasetReport:
    """What is known of a dataset.

    Attributes:
        folder: its address.
        kind: what a row is.
        fingerprint: of all that its rows depend on.
        columns: and their types.
        config: what made it.
        complete: every shard is done, and the run ended well.
        shards_done: of `shards`.
        shards: when it is complete.
        rows: of the shards that are done.
        size: of their files, in bytes.
        seconds: that making them took, all workers together.
        failed: images that could not be had, in the shards that are done.
        failures: by reason, the most frequent first.
        temporary_files: temporary files of runs that died; the next run that ends well removes them.
        problems: what is wrong with the files; those of their content only where they were verified.
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
    """Looks at a dataset, complete or not.

    Args:
        uri: its folder.
        verify: also read every file and compare it with the checksum in its marker.

    Raises:
        DatasetError: it is no dataset.
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
        failures=_failures(dataset, totals.reasons),
        temporary_files=len(dataset.folder.list(TEMPORARY_FOLDER)),
        problems=[*_contradictions(dataset, totals.shards), *(dataset.verify() if verify else [])],
    )


def _contradictions(dataset: ShardedDataset, done: int) -> list[str]:
    if not dataset.is_complete() or done == dataset.shards:
        return []
    return [
        f"{SUCCESS_FILE}: says that all {dataset.shards} shards are done, but only {done} have a marker of this dataset"
    ]


def _failures(dataset: ShardedDataset, reasons: Mapping[str, int]) -> dict[str, FailureReport]:
    """One example of each reason: failure files are read until there is one."""
    found: dict[str, FailureReport] = {}
    for shard, marker in sorted(dataset.read_markers().items()):
        if marker.reasons.keys() <= found.keys():
            continue
        table = dataset.read_failures(shard)
        for row in table.to_pylist() if table is not None else []:
            if row["error"] in reasons:
                example = FailureReport(reasons[row["error"]], row["image_id"], row["uri"], row["message"])
                found.setdefault(row["error"], example)
    return {reason: found.get(reason, FailureReport(count, "", "", "")) for reason, count in reasons.items()}
