"""Imports the image features published with NeuralTalk (Karpathy's captioning code).

`dataset.json` lists the images and captions. Column N of the matrix in `vgg_feats.mat` is the feature vector of the
image with `imgid` N. The output is a features dataset: the manifest columns (image and captions) plus the vector.
"""

import os
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import PositiveInt

from captionlib.config import configclass
from captionlib.data.arrays import numpy_to_vectors
from captionlib.data.ingestion.matlab import open_matrix
from captionlib.data.shards.dataset import create_dataset
from captionlib.data.shards.markers import Totals, compute_checksum
from captionlib.data.shards.schemas import features_schema
from captionlib.data.shards.writer import write_shard
from captionlib.data.sources.karpathy import read_rows_with_imgid
from captionlib.data.sources.locations import locate, open_file
from captionlib.data.sources.rows import ImageRecord, SkipCounter, SourceOptions
from captionlib.data.sources.values import describe_value, is_unicode
from captionlib.data.sources.versions import version_from_uri
from captionlib.errors import DatasetError, DuplicateIdError
from captionlib.progress import progress_bar

__all__ = ["ImportConfig", "import_features"]

_LAYER_SIZES = frozenset({256, 512, 768, 1024, 1536, 2048, 4096})


@configclass
class ImportConfig:
    """How to import NeuralTalk's features.

    Attributes:
        variable: name of the matrix in the MATLAB file.
        feature_size: number of values of each feature vector, that is, the number of rows of the matrix. If None, any
            number of rows is accepted, but a matrix that seems to be transposed is rejected.
        image_root: folder that image paths are relative to. If None, the folder of `dataset.json` is used.
        stored_dtype: dtype of the stored features.
        shard_size: rows per shard (output file).
        model: name of the network that computed the features, shown by `captionlib inspect`.
        node: name of the layer that produced the features, shown by `captionlib inspect`.
    """

    variable: str = "feats"
    feature_size: PositiveInt | None = None
    image_root: str | None = None
    stored_dtype: Literal["float16", "float32"] = "float16"
    shard_size: PositiveInt = 1000
    model: str = "vgg16"
    node: str = "fc7"


def import_features(
    dataset_json: str | os.PathLike[str],
    features_mat: str | os.PathLike[str],
    output: str | os.PathLike[str],
    config: ImportConfig | None = None,
    *,
    overwrite: bool = False,
    progress: bool = False,
) -> Totals:
    """Writes a features dataset, or resumes an interrupted import.

    Example:
        >>> totals = captionlib.import_features("scenes/dataset.json", "vgg_feats.mat", "imported")
        >>> totals.rows
        26

    Args:
        dataset_json: path or URL of Karpathy's `dataset.json`.
        features_mat: path or URL of a MATLAB file of any version.
        output: folder to write the features dataset to.
        config: import options.
        overwrite: replace a features dataset that was imported from different files.
        progress: show a progress bar.

    Raises:
        DatasetError: a file cannot be read, or the files do not match.
        DuplicateIdError: two images have the same id.
        FingerprintError: the output was imported from different files, and `overwrite` is False.
    """
    config = config or ImportConfig()
    json_address, mat_address = os.fspath(dataset_json), os.fspath(features_mat)
    location = locate(json_address).require("Karpathy's dataset.json")
    options = SourceOptions(image_root=config.image_root)
    rows_with_imgid = list(read_rows_with_imgid(location, options, SkipCounter(strict=True)))
    with open_matrix(mat_address, config.variable) as matrix:
        _check_orientation(rows_with_imgid, matrix, config.feature_size, mat_address)
        columns = _find_columns(rows_with_imgid, matrix, mat_address)
        rows = [row for _, row in rows_with_imgid]
        for row in rows:
            row.version = version_from_uri(row.uri)  # changes when the image file changes
        dataset = create_dataset(
            output,
            "features",
            features_schema(len(matrix), config.stored_dtype),
            config={
                "input": _compute_checksum(json_address),
                "image_root": config.image_root,
                "shard_size": config.shard_size,
                "encoder": _describe_encoder(config, len(matrix), _compute_checksum(mat_address)),
            },
            shards=-(-len(rows) // config.shard_size),
            overwrite=overwrite,
        )
        with progress_bar("import-features", len(rows), "images", progress) as bar:
            bar.skip(sum(marker.rows for marker in dataset.read_markers().values()))  # one marker per finished shard
            for shard in dataset.pending_shards():
                selected = slice(shard * config.shard_size, (shard + 1) * config.shard_size)
                vectors = _read_vectors(matrix, columns[selected], config.stored_dtype, mat_address)
                with write_shard(dataset, shard, len(rows[selected])) as writer:
                    writer.write(_to_batch(rows[selected], vectors, dataset.schema))
                bar.update(len(rows[selected]))
    return dataset.finish()


def _compute_checksum(address: str) -> str:
    with open_file(locate(address)) as file:
        return compute_checksum(file)


def _check_orientation(
    rows_with_imgid: Sequence[tuple[object, ImageRecord]], matrix: npt.NDArray[Any], size: int | None, address: str
) -> None:
    """Checks that the matrix has a column, not a row, for each image.

    If `dataset.json` lists only some of the images, only the number of rows should be a common size of a network layer.
    """
    rows, columns = matrix.shape
    images = max((imgid for imgid, _ in rows_with_imgid if isinstance(imgid, int)), default=-1) + 1
    if size is not None:
        transposed = rows != size == columns
    elif images in (rows, columns):
        transposed = columns != images
    else:
        transposed = columns in _LAYER_SIZES and rows not in _LAYER_SIZES and images <= rows
    if transposed:
        raise DatasetError(
            f"{address}: expected a column for each of {images} images, got {rows} rows and {columns} "
            "columns, so the matrix seems to be transposed; save its transpose, or set feature_size if the rows are "
            "features"
        )
    if size not in (None, rows):
        raise DatasetError(f"{address}: expected {size} rows (feature_size), got {rows}; correct feature_size")


def _find_columns(
    rows_with_imgid: Sequence[tuple[object, ImageRecord]], matrix: npt.NDArray[Any], address: str
) -> npt.NDArray[np.int64]:
    """Returns the matrix column of each image, after checking that the two files match."""
    size, count = matrix.shape
    seen: set[str] = set()
    for imgid, row in rows_with_imgid:  # row.origin is the file and entry that the row came from
        if isinstance(imgid, bool) or not isinstance(imgid, int) or imgid < 0:
            raise DatasetError(f"{row.origin}: expected a column number as imgid, got {describe_value(imgid)}")
        if imgid >= count:
            raise DatasetError(
                f"{address}: expected a column for each image, got {count} columns of {size} values "
                f"and an image with imgid {imgid} ({row.origin}); check that both files belong to the same dataset"
            )
        if row.image_id in seen:
            raise DuplicateIdError(f"{row.origin}: expected one row per image, got a second row for {row.image_id!r}")
        seen.add(row.image_id)
        if not is_unicode(row.image_id + row.uri + row.split + "".join(row.captions)):
            raise DatasetError(f"{row.origin}: expected valid Unicode, got lone surrogates; correct the entry")
    if not rows_with_imgid:
        raise DatasetError("dataset.json has no images")
    return np.array([imgid for imgid, _ in rows_with_imgid], np.int64)


def _describe_encoder(config: ImportConfig, size: int, checksum: str) -> dict[str, Any]:
    return {
        "model": config.model,
        "node": config.node,
        "weights": "imported",  # not the name of a checkpoint, because the network is not available
        "features_sha256": checksum.removeprefix("sha256:"),
        "stored_dtype": config.stored_dtype,
        "shape": [size],
    }


def _read_vectors(
    matrix: npt.NDArray[Any], columns: npt.NDArray[np.int64], dtype: str, address: str
) -> npt.NDArray[np.floating]:
    """Returns an array `[columns, size]`. Each column is read once, in ascending order."""
    ascending, inverse = np.unique(columns, return_inverse=True)
    with np.errstate(over="ignore"):  # checked below
        vectors: npt.NDArray[np.floating] = matrix.T[ascending].astype(dtype)[inverse]
    if len(invalid := columns[~np.isfinite(vectors).all(1)]):
        raise DatasetError(
            f"{address}: expected finite numbers within the range of {dtype}, but column {invalid[0]} contains a value "
            "that is not finite or is out of range; set stored_dtype=float32, or check the file"
        )
    return vectors


def _to_batch(rows: Sequence[ImageRecord], vectors: npt.NDArray[np.floating], schema: pa.Schema) -> pa.RecordBatch:
    # An ImageRecord has no sizes or hashes, so these columns are null. The last column contains the vectors.
    columns = [pa.array([getattr(row, each.name, None) for row in rows], each.type) for each in schema][:-1]
    return pa.RecordBatch.from_arrays([*columns, numpy_to_vectors(vectors)], schema=schema)
