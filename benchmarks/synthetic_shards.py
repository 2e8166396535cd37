"""Many shards of made-up rows, and a stage in place of a model: what is left is what a shard costs by itself."""

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from captionlib.data.arrays import numpy_to_vectors
from captionlib.data.shards.dataset import ShardedDataset, create_dataset
from captionlib.data.shards.schemas import MANIFEST_SCHEMA, features_schema
from captionlib.data.shards.stages import ProcessRows, ReportFailure, ShardJob
from captionlib.data.shards.writer import write_shard

__all__ = ["SCHEMA", "MadeUpFeatures", "add_features", "job_over", "make_rows", "write_rows"]

SIZE = 64
SCHEMA = features_schema(SIZE, "float16")


def make_rows(shard: int, rows: int) -> pa.RecordBatch:
    """The rows of a manifest's shard."""
    first = shard * rows
    names = [f"{number:010d}" for number in range(first, first + rows)]
    columns = [
        pa.array(names),
        pa.array([f"s3://bucket/images/{name}.jpg" for name in names]),
        pa.array(["train"] * rows),
        pa.array([["a dog on a beach"]] * rows, MANIFEST_SCHEMA.field("captions").type),
    ]
    return pa.RecordBatch.from_arrays(columns, schema=MANIFEST_SCHEMA)


def write_rows(folder: str | os.PathLike[str], shards: int, rows: int) -> ShardedDataset:
    """A manifest of `shards` times `rows` rows."""
    dataset = create_dataset(folder, "manifest", MANIFEST_SCHEMA, config={"rows": rows}, shards=shards)
    for shard in dataset.pending_shards():
        with write_shard(dataset, shard, rows) as writer:
            writer.write(make_rows(shard, rows))
    dataset.finish()
    return dataset


def add_features(rows: pa.RecordBatch) -> pa.RecordBatch:
    """What an encoder would add, without one."""
    vectors = numpy_to_vectors(np.zeros((rows.num_rows, SIZE), np.float16))
    return pa.RecordBatch.from_arrays([*rows.columns, vectors], schema=SCHEMA)


@dataclass(frozen=True)
class MadeUpFeatures:
    """The stage from `manifest/` to `features/` without fetching, decoding and encoding.

    Attributes:
        columns: all of the manifest's.
        note: where to write when the first row came, in seconds since the epoch; empty for nowhere.
    """

    columns: Sequence[str] = tuple(MANIFEST_SCHEMA.names)
    note: str = ""

    @contextmanager
    def open(self) -> Iterator[ProcessRows]:
        """Loads nothing."""
        yield self._process

    def _process(self, batches: Iterator[pa.RecordBatch], _fail: ReportFailure) -> Iterator[tuple[pa.RecordBatch, ...]]:
        for rows in batches:
            if self.note and not os.path.exists(self.note):  # noqa: PTH110
                with open(self.note, "w", encoding="ascii") as file:  # noqa: PTH123
                    file.write(repr(time.time()))
            yield (add_features(rows),)


def job_over(source: ShardedDataset, output: str | os.PathLike[str], note: str = "") -> ShardJob:
    """The stage over all shards of a manifest."""
    config = {"input": source.fingerprint}
    dataset = create_dataset(output, "features", SCHEMA, config=config, shards=source.shards)
    return ShardJob(source, (dataset,), MadeUpFeatures(note=note))
