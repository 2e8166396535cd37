"""Summarizes a dataset: finished shards, images that could not be read (failures), speed, and inconsistencies.

A marker is the file that records that a shard is complete. Inspection writes nothing, so a job can write the dataset at
the same time. Data files are read only to verify their checksums.
"""

import os
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal

from captionlib.data.shards.dataset import ShardedDataset, open_dataset
from captionlib.data.shards.lineage import LineageStep, describe_config, list_sources, read_lineage
from captionlib.data.shards.markers import (
    JOURNAL_FILE,
    SUCCESS_FILE,
    Marker,
    ShardProgress,
    Totals,
    parse_time,
    sum_markers,
)
from captionlib.data.shards.removal import list_removed
from captionlib.data.shards.throughput import IDLE_SECONDS, Throughput, measure_throughput
from captionlib.errors import CaptionlibError, DamagedShardError, DatasetError
from captionlib.storage.folders import TEMPORARY_FOLDER

__all__ = [
    "DatasetReport",
    "FailureExample",
    "FailureReport",
    "JobReport",
    "ShardState",
    "collect_failures",
    "inspect_dataset",
]

ShardState = Literal["done", "failures", "stale", "in progress", "open"]
"""`failures`: done, but some images could not be read. `stale`: done, but the input shard has changed since. `open`:
not started."""

_EXAMPLES = 5  # failures that are shown for each reason


@dataclass(frozen=True)
class FailureExample:
    """An image that could not be read, and the message of the error."""

    image_id: str
    uri: str
    message: str


@dataclass(frozen=True)
class FailureReport:
    """The number of failures with the same reason, and a few examples, unless the failures files are missing."""

    count: int
    examples: list[FailureExample]


@dataclass(frozen=True)
class JobReport:
    """The progress of the job that writes a dataset, from what its workers have written.

    Attributes:
        state: `running` if a worker has written something in the last 5 minutes, `stopped` otherwise. `complete` if
            the dataset is complete.
        images: number of images of the input; None if it is unknown because the input cannot be read.
        shard_states: the run-length encoded states of all shards, in order. Each entry is a state and the number of
            adjacent shards with this state.
        seconds_left: estimate of the time that the job still needs; None unless it is running at a known speed.
        updated: time of this report, as a Unix time.
    """

    state: Literal["running", "stopped", "complete"]
    images: int | None
    images_done: int
    images_in_progress: int
    shard_states: list[tuple[ShardState, int]]
    throughput: Throughput | None
    seconds_left: float | None
    updated: float

    def count_shards(self, *states: ShardState) -> int:
        """Returns the number of shards in these states."""
        return sum(count for state, count in self.shard_states if state in states)


@dataclass(frozen=True)
class DatasetReport:
    """A summary of a dataset and its finished shards.

    Attributes:
        kind: manifest (images and reference captions), features, captions (generated), embeddings or duplicates.
        fingerprint: hash of everything that determines the rows.
        description: how the dataset was made, in words.
        complete: whether all shards are finished, and the fraction of failed images is within the limit of the run.
        explanation: why the dataset is not complete and what to do; empty if it is complete.
        size: size of the data files in bytes.
        seconds: time spent on the current versions of the shards, summed over workers.
        total_seconds: time spent on the current and all earlier versions of the shards, summed over workers.
        source: path or URL of the dataset that this dataset was made from; empty if there is none.
        lineage: the datasets that this dataset was made from, the oldest first.
        stale: number of shards of the source that were changed or added after this dataset was written. None if the
            source cannot be read.
        failures: failures by reason (the category of the error), the most frequent first.
        removed: reason and date of each removal from a manifest (`captionlib remove`), by hash of the image id.
        temporary_files: number of temporary files of current and crashed runs. The next successful run removes them.
        interrupted_update: whether an update was interrupted. The next command that reads the dataset completes it.
        problems: inconsistencies, including wrong checksums if `inspect_dataset` was called with `verify`.
    """

    folder: str
    kind: str
    fingerprint: str
    columns: Mapping[str, str]
    config: Mapping[str, Any]
    description: str
    created: str
    complete: bool
    explanation: str
    shards_done: int
    shards: int
    rows: int
    size: int
    seconds: float
    total_seconds: float
    source: str
    lineage: list[LineageStep]
    stale: int | None
    failed: int
    failures: Mapping[str, FailureReport]
    removed: Mapping[str, tuple[str, str]]
    job: JobReport
    temporary_files: int
    interrupted_update: bool
    problems: list[str]


def inspect_dataset(uri: str | os.PathLike[str], verify: bool = False) -> DatasetReport:
    """Summarizes a dataset. If `verify` is True, checks each data file against the checksum in its marker file."""
    dataset = open_dataset(uri, complete_update=False)
    markers = dataset.read_markers()
    totals = sum_markers(markers.values())
    complete = dataset.is_complete()
    problems = dataset.verify() if verify else []
    if complete and totals.shards < dataset.shards:
        problems = [
            f"{SUCCESS_FILE} says that all {dataset.shards} shards are finished, but only {totals.shards} have a valid "
            "marker file",
            *problems,
        ]
    stale_shards, stale_count, images = _compare_with_source(dataset, markers)
    removed: Mapping[str, tuple[str, str]] = {}
    try:
        removed = list_removed(dataset.folder).reasons
    except DatasetError as error:
        problems.append(str(error))
    return DatasetReport(
        folder=dataset.folder.uri,
        kind=dataset.kind,
        fingerprint=dataset.fingerprint,
        columns={column.name: str(column.type) for column in dataset.schema},
        config=dataset.config,
        description=describe_config(dataset.kind, dataset.config),
        created=dataset.created,
        complete=complete,
        explanation="" if complete else dataset.explain_incompleteness(totals),
        shards_done=totals.shards,
        shards=dataset.shards,
        rows=totals.rows,
        size=totals.bytes,
        seconds=totals.seconds,
        total_seconds=totals.total_seconds,
        source=dataset.source,
        lineage=read_lineage(dataset),
        stale=stale_count,
        failed=totals.failures,
        failures=_summarize_failures(dataset, markers, totals),
        removed=removed,
        job=_describe_job(dataset, complete, markers, stale_shards, images),
        temporary_files=len(dataset.folder.list(TEMPORARY_FOLDER)),
        interrupted_update=dataset.folder.exists(JOURNAL_FILE),
        problems=problems,
    )


def collect_failures(dataset: ShardedDataset) -> dict[str, FailureReport]:
    """Returns the unreadable images of a dataset and of those that it was made from, if they can be read, by reason."""
    counts, examples = Counter[str](), defaultdict[str, list[FailureExample]](list)
    for each in [*list_sources(dataset)[0], dataset]:
        markers = each.read_markers()
        for reason, failure in _summarize_failures(each, markers, sum_markers(markers.values())).items():
            counts[reason] += failure.count
            examples[reason] += failure.examples
    return {reason: FailureReport(count, examples[reason][:_EXAMPLES]) for reason, count in counts.most_common()}


def _compare_with_source(
    dataset: ShardedDataset, markers: Mapping[int, Marker]
) -> tuple[set[int], int | None, int | None]:
    """Returns the stale shards, the number of stale and newly added shards, and the number of images of the source.

    Both numbers are None if the source cannot be read. A dataset without a source has its own number of images, or None
    until it is complete.
    """
    if not dataset.source:
        totals = dataset.read_totals()
        return set(), 0, totals.images if totals else None
    try:
        source = open_dataset(dataset.source, complete_update=False)
        source_markers = source.read_markers()
    except (CaptionlibError, OSError):
        return set(), None, None
    images = sum(marker.rows for marker in source_markers.values())
    if dataset.kind == "duplicates":  # one shard, made from all shards of the source
        checksum = source.compute_content_checksum()
        stale = {shard for shard, marker in markers.items() if marker.input_checksum != checksum}
        return stale, len(stale), images
    stale = {
        shard
        for shard, marker in markers.items()
        if shard in source_markers and marker.input_checksum != source_markers[shard].checksum
    }
    return stale, len(stale) + sum(shard >= dataset.shards for shard in source_markers), images


def _describe_job(
    dataset: ShardedDataset, complete: bool, markers: Mapping[int, Marker], stale: Set[int], images: int | None
) -> JobReport:
    now = time.time()
    progress = {} if complete else dataset.read_progress(range(dataset.shards))
    active = {shard: each for shard, each in progress.items() if now - parse_time(each.updated) <= IDLE_SECONDS}
    throughput = measure_throughput(markers.values(), active.values())
    last_activity = max(
        throughput.last_activity if throughput else 0.0, parse_time(dataset.created) if dataset.created else 0.0
    )
    done = sum(marker.images for shard, marker in markers.items() if shard not in stale)
    in_progress = sum(each.images for each in active.values())
    running = not complete and now - last_activity <= IDLE_SECONDS
    seconds_left = None
    if running and markers and throughput and throughput.images_per_second > 0:
        total = images or dataset.shards * done / len(markers)  # if unknown, assume shards of equal size
        seconds_left = max(0, total - done - in_progress) / throughput.images_per_second
    return JobReport(
        state="complete" if complete else "running" if running else "stopped",
        images=images,
        images_done=done,
        images_in_progress=in_progress,
        shard_states=_list_states(dataset.shards, markers, stale, active),
        throughput=throughput,
        seconds_left=seconds_left,
        updated=now,
    )


def _list_states(
    shards: int, markers: Mapping[int, Marker], stale: Set[int], active: Mapping[int, ShardProgress]
) -> list[tuple[ShardState, int]]:
    def get_state(shard: int) -> ShardState:
        if shard in active:
            return "in progress"
        if shard not in markers:
            return "open"
        if shard in stale:
            return "stale"
        return "failures" if markers[shard].failures else "done"

    return [(state, len(list(group))) for state, group in groupby(map(get_state, range(shards)))]


def _summarize_failures(
    dataset: ShardedDataset, markers: Mapping[int, Marker], totals: Totals
) -> dict[str, FailureReport]:
    examples: dict[str, list[FailureExample]] = {reason: [] for reason in totals.reasons}
    for shard, marker in sorted(markers.items()):
        if any(len(examples[reason]) < _EXAMPLES for reason in marker.reasons):
            for row in _read_failures(dataset, shard):
                found = examples.get(row["error"], [])
                if len(found) < _EXAMPLES:
                    found.append(FailureExample(row["image_id"], row["uri"], row["message"]))
    return {reason: FailureReport(count, examples[reason]) for reason, count in totals.reasons.items()}


def _read_failures(dataset: ShardedDataset, shard: int) -> Iterable[Mapping[str, Any]]:
    try:
        table = dataset.read_failures(shard)
    except DamagedShardError:  # `verify` reports it
        return []
    return table.to_pylist() if table is not None else []
