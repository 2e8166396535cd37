"""Writes datasets for benchmarks."""

import os
from collections.abc import Callable, Mapping
from typing import Any

import pyarrow as pa

from captionlib.data.shards.dataset import ShardedDataset, create_dataset
from captionlib.data.shards.writer import write_shard

__all__ = ["write_dataset"]


def write_dataset(
    folder: str | os.PathLike[str],
    kind: str,
    schema: pa.Schema,
    shards: int,
    make_rows: Callable[[int], pa.RecordBatch],
    config: Mapping[str, Any] = {},
) -> ShardedDataset:
    """Writes the rows that `make_rows` returns for each shard."""
    dataset = create_dataset(folder, kind, schema, config=config, shards=shards)
    for shard in range(shards):
        rows = make_rows(shard)
        with write_shard(dataset, shard, rows.num_rows) as writer:
            writer.write(rows)
    dataset.finish()
    return dataset
