"""NeuralTalk's features into `features/`: images and sentences of `dataset.json`, their vectors of `vgg_feats.mat`.

The matrix has a column an image, whose number is the image's `imgid`.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from captionlib.data.arrays import numpy_to_vectors
from captionlib.data.ingestion.matlab import Matrix, open_matrix
from captionlib.data.shards.dataset import create_dataset
from captionlib.data.shards.markers import Totals, compute_checksum
from captionlib.data.shards.schemas import MANIFEST_SCHEMA, features_schema
from captionlib.data.shards.writer import write_shard
from captionlib.data.sources.karpathy import read_numbered
from captionlib.data.sources.locations import locate
from captionlib.data.sources.rows import ManifestRow, SourceOptions
from captionlib.errors import ConfigError, DatasetError, DuplicateIdError
from captionlib.progress import progress_bar

__all__ = ["ImportConfig", "import_features"]


@dataclass(frozen=True)
class ImportConfig:
    """How NeuralTalk's files are read.

    Attributes:
        variable: the matrix in the MATLAB file.
        image_root: what the images' paths are relative to, in place of the folder of `dataset.json`.
        stored_dtype: what the numbers are rounded to.
        shard_size: rows a shard.
        model: the network that made the features; told where they are inspected, and nothing else.
        node: where it was cut.
    """

    variable: str = "feats"
    image_root: str | None = None
    stored_dtype: Literal["float16", "float32"] = "float16"
    shard_size: int = 1000
    model: str = "vgg16"
    node: str = "fc7"

    def __post_init__(self) -> None:
        if self.shard_size < 1:
            raise ConfigError(f"shard_size: expected at least 1, got {self.shard_size}")


def import_features(
    dataset_json: str | os.PathLike[str],
    features_mat: str | os.PathLike[str],
    output: str | os.PathLike[str],
    config: ImportConfig | None = None,
    *,
    overwrite: bool = False,
    progress: bool = False,
) -> Totals:
    """Writes the features dataset, or goes on where a former run stopped.

    Args:
        dataset_json: Karpathy's `dataset.json`.
        features_mat: the MATLAB file, of any version.
        output: the folder of the features dataset.
        config: how they are read.
        overwrite: replace features of other files.
        progress: show a bar.

    Raises:
        DatasetError: a file cannot be read, or they do not belong together.
        DuplicateIdError: two images have the same id.
        FingerprintError: the output holds the features of other files, and `overwrite` is off.
    """
    config = config or ImportConfig()
    json_address, mat_address = os.fspath(dataset_json), os.fspath(features_mat)
    location = locate(json_address)
    if not location.fs.exists(location.path):
        raise DatasetError(f"{json_address} does not exist; expected Karpathy's dataset.json")
    numbered = list(read_numbered(location, SourceOptions(image_root=config.image_root)))
    with open_matrix(mat_address, config.variable) as matrix:
        columns = _find_columns(numbered, matrix, mat_address)
        rows = [row for _, row in numbered]
        content = checksum_of_file(mat_address)
        dataset = create_dataset(
            output,
            "features",
            features_schema(matrix.rows, config.stored_dtype),
            config={
                "input": checksum_of_file(json_address),
                "image_root": config.image_root,
                "shard_size": config.shard_size,
                "encoder": _describe_encoder(config, matrix.rows, content),
            },
            shards=-(-len(rows) // config.shard_size),
            overwrite=overwrite,
        )
        with progress_bar("import-features", len(rows), "images", progress) as bar:
            bar.skip(sum(marker.rows for marker in dataset.read_markers().values()))
            for shard in dataset.pending_shards():
                chosen = slice(shard * config.shard_size, (shard + 1) * config.shard_size)
                vectors = _read_vectors(matrix, columns[chosen], config.stored_dtype, mat_address)
                with write_shard(dataset, shard, len(rows[chosen])) as writer:
                    writer.write(_to_batch(rows[chosen], vectors, dataset.schema))
                bar.update(len(rows[chosen]))
    return dataset.finish()


def checksum_of_file(address: str) -> str:
    """The SHA-256 of a file's content."""
    location = locate(address)
    with location.fs.open(location.path, "rb") as file:
        return compute_checksum(file)


def _find_columns(
    numbered: Sequence[tuple[object, ManifestRow]], matrix: Matrix, address: str
) -> npt.NDArray[np.int64]:
    """The column of each image."""
    seen: set[str] = set()
    for imgid, row in numbered:
        if isinstance(imgid, bool) or not isinstance(imgid, int) or imgid < 0:
            raise DatasetError(f"{row.origin}: expected an imgid, the number of a column, got {imgid!r}")
        if imgid >= matrix.columns:
            raise DatasetError(
                f"{address}: expected a column for each image, got {matrix.columns} columns of {matrix.rows} numbers "
                f"and an image of imgid {imgid} ({row.origin}); do both files belong to the same data set?"
            )
        if row.image_id in seen:
            raise DuplicateIdError(f"{row.origin}: image id {row.image_id} is there twice; expected one row an image")
        seen.add(row.image_id)
    if not numbered:
        raise DatasetError("dataset.json has no images")
    return np.array([imgid for imgid, _ in numbered], np.int64)


def _describe_encoder(config: ImportConfig, size: int, content: str) -> dict[str, Any]:
    """What captioners compare, so that one is never given the features of another file's network."""
    return {
        "model": config.model,
        "node": config.node,
        "weights": "imported",
        "features_sha256": content.removeprefix("sha256:"),
        "stored_dtype": config.stored_dtype,
        "shape": [size],
    }


def _read_vectors(matrix: Matrix, columns: npt.NDArray[np.int64], dtype: str, address: str) -> npt.NDArray[np.floating]:
    """Columns as rows `[columns, size]`; files are read in ascending order, each column once."""
    ascending, inverse = np.unique(columns, return_inverse=True)
    with np.errstate(over="ignore"):  # found below
        vectors = np.asarray(matrix.read(ascending)).astype(dtype)[inverse]
    if len(bad := columns[~np.isfinite(vectors).all(1)]):
        raise DatasetError(
            f"{address}: column {bad[0]} has numbers that do not fit into {dtype}, or are none; "
            "take float32, or check the file"
        )
    return vectors


def _to_batch(rows: Sequence[ManifestRow], vectors: npt.NDArray[np.floating], schema: pa.Schema) -> pa.RecordBatch:
    plain = {name: [getattr(row, name) for row in rows] for name in MANIFEST_SCHEMA.names}
    columns = [pa.array(plain[field.name], field.type) for field in MANIFEST_SCHEMA]
    return pa.RecordBatch.from_arrays([*columns, numpy_to_vectors(vectors)], schema=schema)
