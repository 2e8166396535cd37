"""Provides shards of synthetic rows and a stage without a model, to measure the cost of a shard itself."""

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from benchmarks.synthetic_datasets import write_dataset
from captionlib.data.arrays import numpy_to_vectors
from captionlib.data.shards.dataset import ShardedDataset, create_dataset
from captionlib.data.shards.schemas import MANIFEST_SCHEMA, add_missing_columns, features_schema
from captionlib.data.shards.stages import ProcessRows, ReportFailure, ShardJob

__all__ = ["SCHEMA", "ZeroFeatures", "add_features", "create_job", "make_rows", "write_rows"]

SIZE = 64
SCHEMA = features_schema(SIZE, "float16")


def make_rows(shard: int, rows: int) -> pa.RecordBatch:
    first = shard * rows
    names = [f"{number:010d}" for number in range(first, first + rows)]
    columns = {
        "image_id": names,
        "uri": [f"s3://bucket/images/{name}.jpg" for name in names],
        "version": ["1"] * rows,
        "split": ["train"] * rows,
        "captions": [["a dog on a beach"]] * rows,
    }
    return pa.RecordBatch.from_pydict(columns, MANIFEST_SCHEMA)


def write_rows(folder: str | os.PathLike[str], shards: int, rows: int) -> ShardedDataset:
    config = {"rows": rows}
    return write_dataset(folder, "manifest", MANIFEST_SCHEMA, shards, lambda shard: make_rows(shard, rows), config)


def add_features(rows: pa.RecordBatch) -> pa.RecordBatch:
    vectors = numpy_to_vectors(np.zeros((rows.num_rows, SIZE), np.float16))
    return add_missing_columns(rows.append_column("features", vectors), SCHEMA)


@dataclass(frozen=True)
class ZeroFeatures:
    """Stage from a manifest to a features dataset that does not fetch, decode or encode images.

    Attributes:
        columns: columns that the stage reads, all of the manifest.
        first_row_file: file to write the time of the first row to, in seconds since the epoch. If empty, no file is
            written.
    """

    columns: Sequence[str] = tuple(MANIFEST_SCHEMA.names)
    first_row_file: str = ""

    @contextmanager
    def open(self) -> Iterator[ProcessRows]:
        """Loads nothing."""
        yield self._process

    def _process(self, batches: Iterator[pa.RecordBatch], _fail: ReportFailure) -> Iterator[tuple[pa.RecordBatch, ...]]:
        for rows in batches:
            if self.first_row_file and not os.path.exists(self.first_row_file):  # noqa: PTH110
                with open(self.first_row_file, "w", encoding="ascii") as file:  # noqa: PTH123
                    file.write(repr(time.time()))
            yield (add_features(rows),)


def create_job(source: ShardedDataset, output: str | os.PathLike[str], first_row_file: str = "") -> ShardJob:
    dataset = create_dataset(output, "features", SCHEMA, config={}, source=source)
    return ShardJob(source, (dataset,), ZeroFeatures(first_row_file=first_row_file))
