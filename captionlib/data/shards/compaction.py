"""Merges small shards of datasets and splits large ones, without recomputing any row.

The manifest is the dataset that lists the images. All other datasets are made from it, shard by shard, and contain a
row or a failure (the record of an unreadable image) for each image. First, the manifest is atomically divided into new
shards. Then, in each other dataset, each row and failure moves to the shard that now contains its image.

Each compaction has an id, which the compacted datasets store as `compaction_id`. If compaction is interrupted, some
datasets still have the old shards and a different id. Running the same command again moves their rows.
"""

import math
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import xxhash

from captionlib.data.row_buffer import RowBuffer
from captionlib.data.shards.dataset import ShardedDataset, open_dataset
from captionlib.data.shards.markers import STALE, Marker, compute_fingerprint, sum_markers
from captionlib.data.shards.schemas import FAILURES_SCHEMA
from captionlib.data.shards.stages import match_images, replace_columns
from captionlib.data.shards.update import update_shards
from captionlib.data.shards.writer import write_shard
from captionlib.errors import ConfigError

__all__ = ["Compaction", "choose_shard_size", "plan_compaction"]

_MIN_SHARD_SIZE = 1000
_KINDS = ("manifest", "features", "captions", "embeddings")  # inputs before outputs


def choose_shard_size(images: int) -> int:
    """Returns the default number of images per shard: the square root of `10 * images`, rounded up to thousands.

    A million images have 250 shards of 4,000, and 10 million have 1,000 shards of 10,000: enough shards to process in
    parallel, and few enough files for queries.
    """
    return max(1, math.ceil(math.sqrt(10 * images) / _MIN_SHARD_SIZE)) * _MIN_SHARD_SIZE


@dataclass(frozen=True)
class Compaction:
    """The compaction of a dataset; created by `plan_compaction`.

    Attributes:
        dataset: the dataset, as it was when the compaction was planned.
        shard_size: new number of images per shard. If None, the images are divided like those of the dataset that
            this one was made from.
        images: number of rows and failures of the dataset.
    """

    dataset: ShardedDataset
    shard_size: int | None
    images: int

    def run(self, report_moved: Callable[[int], object] = lambda rows: None) -> ShardedDataset:
        """Atomically replaces the shards of the dataset, and returns the new dataset.

        Calls `report_moved` with the number of rows and failures that were moved since the last call.
        """
        if self.shard_size is not None:
            _divide(self.dataset, self.shard_size, self.images, report_moved)
        else:
            source = open_dataset(self.dataset.source).require_complete()
            if source.compaction_id != self.dataset.compaction_id:
                _match_shards(self.dataset, source, report_moved)
        return open_dataset(self.dataset.folder.uri)


def plan_compaction(datasets: Sequence[ShardedDataset], shard_size: int | None = None) -> list[Compaction]:
    """Checks datasets before any of them changes. Returns their compactions in the order in which they must run.

    Args:
        datasets: a manifest, or features from `captionlib import-features`, and datasets that were made from them.
        shard_size: images per shard. If None, see `choose_shard_size`.

    Raises:
        ConfigError: a dataset has a kind that always has a single shard.
        DamagedShardError: a marker (the file that records that a shard is complete) is missing or damaged.
        DatasetError: the manifest, the imported features or the source of a dataset is not complete.
    """
    for dataset in datasets:
        if dataset.kind not in _KINDS:
            raise ConfigError(
                f"{dataset.folder.uri}: expected a dataset of kind {', '.join(_KINDS)}, got {dataset.kind}, which has "
                "a single shard; omit it"
            )
        (open_dataset(dataset.source) if dataset.source else dataset).require_complete()
    return [_plan(dataset, shard_size) for dataset in sorted(datasets, key=lambda dataset: _KINDS.index(dataset.kind))]


def _plan(dataset: ShardedDataset, shard_size: int | None) -> Compaction:
    markers = dataset.require_markers() if dataset.source else dataset.require_all_markers()
    images = sum(marker.images for marker in markers.values())
    return Compaction(dataset, None if dataset.source else shard_size or choose_shard_size(images), images)


def _divide(dataset: ShardedDataset, size: int, images: int, report_moved: Callable[[int], object]) -> None:
    """Divides all rows into shards of `size` rows, unless the dataset has these shards already."""
    shards = -(-images // size)
    largest = max(marker.rows for marker in dataset.require_all_markers().values())
    if dataset.config.get("shard_size") == size and dataset.shards == shards and largest <= size:
        return
    config = {**dataset.config, "shard_size": size}
    changes = {
        "config": config,
        "fingerprint": compute_fingerprint(dataset.kind, config),
        "compaction_id": uuid.uuid4().hex,
    }
    buffer = RowBuffer(batch for shard in range(dataset.shards) for batch in dataset.read_batches(shard))
    with update_shards(dataset, shards, **changes) as staged:
        for shard in range(shards):
            rows = min(size, images - shard * size)
            with write_shard(staged, shard, rows) as writer:
                for batch in buffer.take(rows):
                    writer.write(batch)
                    report_moved(batch.num_rows)


def _match_shards(dataset: ShardedDataset, source: ShardedDataset, report_moved: Callable[[int], object]) -> None:
    """Moves each row and failure to the shard that contains its image in `source`."""
    locations = _ImageLocations.read(dataset)
    input_markers = source.require_all_markers()
    with update_shards(dataset, source.shards, compaction_id=source.compaction_id) as staged:
        for shard, input_marker in sorted(input_markers.items()):
            report_moved(_write_moved_rows(dataset, locations, source, input_marker, staged, shard))


@dataclass(frozen=True)
class _ImageLocations:
    """The shard of each image of a dataset, in 12 bytes per image.

    Attributes:
        hashes: `[images] uint64`, hashes of the image ids, ascending.
        shards: `[images] int32`, the shard of each image, in the same order.
        seconds_per_image: mean time per image to write the shards, including their earlier versions.
    """

    hashes: npt.NDArray[np.uint64]
    shards: npt.NDArray[np.int32]
    seconds_per_image: float

    @classmethod
    def read(cls, dataset: ShardedDataset) -> "_ImageLocations":
        hashes, shards = [np.empty(0, np.uint64)], [np.empty(0, np.int32)]
        markers = dataset.require_markers()
        for shard in sorted(markers):
            hashes += [_hash_ids(dataset.read(shard, ["image_id"])), _hash_ids(_read_failures(dataset, shard))]
            shards.append(np.full(len(hashes[-2]) + len(hashes[-1]), shard, np.int32))
        order = np.argsort(all_hashes := np.concatenate(hashes))
        seconds = sum_markers(markers.values()).total_seconds
        return cls(all_hashes[order], np.concatenate(shards)[order], seconds / max(1, len(all_hashes)))

    def find_shards(self, images: pa.Table) -> list[int]:
        wanted = _hash_ids(images)
        positions = np.searchsorted(self.hashes, wanted)
        inside = positions < len(self.hashes)
        found = positions[inside][self.hashes[positions[inside]] == wanted[inside]]
        return [int(shard) for shard in np.unique(self.shards[found])]


def _hash_ids(images: pa.Table) -> npt.NDArray[np.uint64]:
    ids = images["image_id"].to_pylist()
    return np.array([xxhash.xxh3_64_intdigest(image_id.encode()) for image_id in ids], np.uint64)


def _read_failures(dataset: ShardedDataset, shard: int) -> pa.Table:
    failures = dataset.read_failures(shard)
    return FAILURES_SCHEMA.empty_table() if failures is None else failures


class _Matches(NamedTuple):
    """For each row and failure of an old shard, its position in a shard of the source; -1 if it is not there."""

    rows: npt.NDArray[np.int64]
    failures: npt.NDArray[np.int64]


def _find_matches(dataset: ShardedDataset, shard: int, input_rows: pa.Table) -> _Matches:
    rows = dataset.read(shard, ["image_id", "uri", "version"])
    return _Matches(match_images(rows, input_rows), match_images(_read_failures(dataset, shard), input_rows))


def _write_moved_rows(
    dataset: ShardedDataset,
    locations: _ImageLocations,
    source: ShardedDataset,
    input_marker: Marker,
    staged: ShardedDataset,
    shard: int,
) -> int:
    """Writes a shard of `staged` with the rows and failures that `dataset` has for the images of the input shard.

    If an image is missing or out of order, the shard is `STALE`. Returns the number of moved rows and failures.
    """
    shared_columns = [name for name in source.schema.names if name in dataset.schema.names]
    input_rows = source.read(shard, shared_columns, input_marker)
    matches = {old: _find_matches(dataset, old, input_rows) for old in locations.find_shards(input_rows)}
    rows = _concatenate_found([match.rows for match in matches.values()])
    images = len(rows) + len(_concatenate_found([match.failures for match in matches.values()]))
    is_current = images == input_rows.num_rows and bool((np.diff(rows) > 0).all())
    input_checksum = input_marker.checksum if is_current else STALE
    with write_shard(staged, shard, images, input_checksum, images * locations.seconds_per_image) as writer:
        failures: list[tuple[int, dict[str, str | None]]] = []
        for old, match in matches.items():
            start = 0
            for batch in dataset.read_batches(old):
                kept = _select(
                    pa.Table.from_batches([batch]), match.rows[start : start + batch.num_rows], input_rows
                ).combine_chunks()
                for each in kept.to_batches():
                    writer.write(each)
                start += batch.num_rows
            kept = _select(_read_failures(dataset, old), match.failures, input_rows)
            failures += zip(_concatenate_found([match.failures]).tolist(), kept.to_pylist(), strict=True)
        writer.failures += [row for _, row in sorted(failures, key=lambda each: each[0])]
    return images


def _concatenate_found(positions: Sequence[npt.NDArray[np.int64]]) -> npt.NDArray[np.int64]:
    joined = np.concatenate([np.empty(0, np.int64), *positions])
    return joined[joined >= 0]


def _select(table: pa.Table, positions: npt.NDArray[np.int64], input_rows: pa.Table) -> pa.Table:
    """Returns the rows whose position is not -1. Columns that `input_rows` also has are copied from there."""
    found = positions >= 0
    return replace_columns(table.filter(pa.array(found)), input_rows.take(positions[found]))
