"""Samples the input of a stage, and estimates the time and output size for the rest of the input.

A stage is a step that reads one dataset (a folder of Parquet shards) and writes another, such as feature extraction.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from captionlib.data.shards.dataset import ShardedDataset, create_dataset
from captionlib.data.shards.markers import SAMPLE_FOLDER, data_file
from captionlib.data.shards.writer import write_shard
from captionlib.errors import ConfigError
from captionlib.storage.folders import Folder, resolve_address

__all__ = ["Estimate", "StageInput", "estimate_remaining", "open_stage_input"]

_MAX_SHARD_ROWS = 10_000


@dataclass(frozen=True)
class StageInput:
    """The input of a stage: a dataset, or a sample of its rows.

    Attributes:
        dataset: the dataset that the stage reads.
        limit: maximum number of rows of the sample. If None, `dataset` is the whole input and not a sample.
    """

    dataset: ShardedDataset
    limit: int | None = None

    @property
    def input_arguments(self) -> dict[str, Any]:
        """The arguments of `create_dataset` that record what the output of the stage was made from.

        A sample is removed after the run, so it is not recorded as `source`.
        """
        if self.limit is None:
            return {"source": self.dataset}
        return {"shards": self.dataset.shards, "manifest_id": self.dataset.manifest_id}

    @property
    def config(self) -> dict[str, int]:
        """Settings for the configuration of the output, so that a run on all images does not resume one on a sample."""
        return {} if self.limit is None else {"sample": self.limit}


@contextmanager
def open_stage_input(
    source: ShardedDataset, output: str | os.PathLike[str], limit: int | None, workers: int
) -> Iterator[StageInput]:
    """Yields the whole dataset if `limit` is None, and otherwise a sample of up to `limit` evenly spaced rows.

    The sample is written to a subfolder of the output, because all workers can read the output. It has one shard per
    worker, or more if it is large. It is removed when the `with` block ends.

    Raises:
        ConfigError: the output is the dataset itself.
        DamagedShardError: a shard of the dataset is damaged.
    """
    if limit is None:
        yield StageInput(source)
        return
    if resolve_address(source.folder.uri) == resolve_address(output):
        raise ConfigError(f"{source.folder.uri} is the input of this command; use another folder for the output")
    folder = Folder(output)
    try:
        yield StageInput(_write_sample(source, folder.address(SAMPLE_FOLDER), limit, workers), limit)
    finally:
        folder.remove(SAMPLE_FOLDER)


def _write_sample(source: ShardedDataset, address: str, limit: int, workers: int) -> ShardedDataset:
    # A marker is the file that records that a shard is complete.
    starts = np.cumsum([0, *(marker.rows for _, marker in sorted(source.require_markers().items()))])
    total = int(starts[-1])
    count = min(limit, total)
    positions = ((np.arange(count) + 0.5) * total / max(1, count)).astype(np.int64)
    parts = np.array_split(positions, max(1, min(count, max(workers, -(-count // _MAX_SHARD_ROWS)))))
    sample = create_dataset(
        address,
        source.kind,
        source.schema,
        config=source.config,
        shards=len(parts),
        manifest_id=source.manifest_id,
        overwrite=True,
    )
    for shard, part in enumerate(parts):
        with write_shard(sample, shard, len(part)) as writer:
            for rows in _read_rows(source, starts, part):
                writer.write(rows)
    sample.finish()
    return sample


def _read_rows(
    source: ShardedDataset, starts: npt.NDArray[np.int64], positions: npt.NDArray[np.int64]
) -> Iterator[pa.RecordBatch]:
    """Yields the rows at ascending positions in the dataset. `starts` are the positions of the shards' first rows."""
    shards = np.searchsorted(starts, positions, side="right") - 1
    for shard in np.unique(shards):
        start, wanted = int(starts[shard]), positions[shards == shard]
        for batch in source.read_batches(int(shard)):
            inside = wanted[(wanted >= start) & (wanted < start + batch.num_rows)]
            if len(inside):
                yield batch.take(pa.array(inside - start))
            start += batch.num_rows


@dataclass(frozen=True)
class Estimate:
    """The estimated cost of processing the images that are not in the sample.

    Attributes:
        images: number of images that are not in the sample.
        images_per_second: total speed of all workers.
        seconds: time to process the images at this speed.
        bytes: size of the output for the images.
        failures: number of images that cannot be read.
    """

    images: int
    images_per_second: float
    seconds: float
    bytes: int
    failures: int


def estimate_remaining(source: ShardedDataset, outputs: Sequence[ShardedDataset], workers: int) -> Estimate:
    """Estimates the cost of processing the images of a dataset that are not in the sample.

    `outputs` are the complete outputs for the sample. The time does not include starting workers or loading models.
    """
    totals = outputs[0].compute_totals()  # `totals.images` is the number of images in the sample
    remaining = max(0, source.compute_totals().rows - totals.images)
    ratio = remaining / max(1, totals.images)
    rate = totals.images / max(totals.seconds, 1e-3) * workers
    size = sum(_count_bytes(output) for output in outputs)
    seconds = remaining / rate if remaining else 0.0
    return Estimate(remaining, rate, seconds, round(size * ratio), round(totals.failures * ratio))


def _count_bytes(dataset: ShardedDataset) -> int:
    """Returns the compressed size of the columns, without the footers, which dominate small files."""
    size = 0
    for shard in range(dataset.shards):
        with dataset.folder.open(data_file(shard)) as file:
            metadata = pq.read_metadata(file)
        groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
        size += sum(group.column(n).total_compressed_size for group in groups for n in range(group.num_columns))
    return size
