"""The datastore of a captioner: features and reference captions of its training images, for reranking.

It is the file `datastore.parquet` in the checkpoint. The candidate captions of a new image are compared with the
references of the most similar training images.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from captionlib.data.arrays import numpy_to_vectors, vectors_to_numpy
from captionlib.data.shards.markers import compute_fingerprint, from_json
from captionlib.errors import CheckpointError, StorageError
from captionlib.models.checkpoints.checkpoint import LoadedCaptioner
from captionlib.models.checkpoints.encoder_file import CONFIG
from captionlib.models.checkpoints.folder import DATASTORE, FolderLike, open_folder
from captionlib.models.decoding.cider_d import CiderD

__all__ = ["Datastore", "DatastoreRows", "Neighbors", "read_datastore", "read_datastore_fingerprint", "write_datastore"]

Vectors = npt.NDArray[np.float32]

DatastoreRows = tuple[list[str], Vectors, list[list[list[int]]]]
"""Ids of training images, their features as the captioner sees them, and the token ids of their references."""

_TEMPERATURE = 0.06  # of the softmax that converts cosine similarities of neighbors to weights
_REFERENCES = pa.list_(pa.list_(pa.int32()))


class Neighbors(NamedTuple):
    """The references of the training images most similar to an image, as token ids, and their weights."""

    references: list[list[int]]
    weights: npt.NDArray[np.float64]  # sum to 1


class Datastore:
    """Finds the training images most similar to given images, by the cosine of their standardized vectors.

    `vectors` are the features of the training images, and `references` are token ids, `list<list<int32>>`.
    """

    def __init__(self, image_ids: Sequence[str], vectors: Vectors, references: pa.Array) -> None:
        self.cider = CiderD(image_references.as_py() for image_references in references)
        self._rows = {image_id: row for row, image_id in enumerate(image_ids)}
        self._references = references
        self._mean = vectors.mean(0)
        std = vectors.std(0)
        self._std = np.where(std > 0, std, 1)
        self._unit_vectors = self._normalize(vectors)

    def find_neighbors(self, vectors: Vectors, count: int, image_ids: Sequence[str] | None = None) -> list[Neighbors]:
        """Finds up to `count` neighbors of each image; more similar ones have larger weights.

        `vectors` are the features of the images. An image with a known id is not its own neighbor.
        """
        similarities = self._normalize(vectors) @ self._unit_vectors.T
        for image, image_id in enumerate(image_ids or ()):
            if image_id in self._rows:
                similarities[image, self._rows[image_id]] = -np.inf
        count = min(count, similarities.shape[1])
        nearest = np.argpartition(-similarities, count - 1, axis=1)[:, :count]
        per_image = zip(nearest, similarities, strict=True)
        return [self._collect(rows, image_similarities[rows]) for rows, image_similarities in per_image]

    def _normalize(self, vectors: Vectors) -> Vectors:
        standardized = (vectors - self._mean) / self._std
        lengths = np.linalg.norm(standardized, axis=1, keepdims=True)
        unit_vectors: Vectors = standardized / np.where(lengths > 0, lengths, 1)
        return unit_vectors

    def _collect(self, rows: npt.NDArray[np.int64], similarities: Vectors) -> Neighbors:
        weights = np.exp((similarities - similarities.max()).astype(np.float64) / _TEMPERATURE)
        per_image = self._references.take(pa.array(rows)).to_pylist()
        counts = [len(references) for references in per_image]
        references = [reference for image_references in per_image for reference in image_references]
        # The references of an image share its weight.
        return Neighbors(references, np.repeat(weights / weights.sum() / counts, counts))


def write_datastore(
    folder: FolderLike,
    captioner: LoadedCaptioner,
    features_fingerprint: str,
    splits: Sequence[str],
    batches: Iterable[DatastoreRows],
) -> None:
    """Writes the datastore into a captioner's checkpoint, completely or not at all.

    `features_fingerprint` is the fingerprint of the dataset that contains the splits.
    """
    origin = {"captioner": captioner.fingerprint, "features": features_fingerprint, "splits": list(splits)}
    schema = pa.schema(
        [
            pa.field("image_id", pa.string(), nullable=False),
            pa.field("vector", pa.list_(pa.float32(), captioner.model.projection_input_size), nullable=False),
            pa.field("references", _REFERENCES, nullable=False),
        ],
        {"captionlib": json.dumps(origin)},
    )
    with open_folder(folder).stage(DATASTORE) as path, pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for image_ids, vectors, references in batches:
            columns = [pa.array(image_ids), numpy_to_vectors(vectors), pa.array(references, _REFERENCES)]
            writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=schema))
    if not open_folder(folder).exists(CONFIG):
        raise CheckpointError(f"{open_folder(folder).uri} was removed or moved while its datastore was being written")


def read_datastore_fingerprint(folder: FolderLike, captioner: LoadedCaptioner) -> str:
    """Reads only the fingerprint of a captioner's datastore; raises the errors of `read_datastore`."""
    with _open(folder, captioner) as (_, fingerprint):
        return fingerprint


def read_datastore(folder: FolderLike, captioner: LoadedCaptioner) -> Datastore:
    """Reads the datastore of a captioner.

    Raises:
        CheckpointError: the datastore is missing or damaged, or belongs to a different captioner.
        StorageError: the storage failed.
    """
    with _open(folder, captioner) as (file, _):
        table = file.read()
    vectors = vectors_to_numpy(table["vector"])
    return Datastore(table["image_id"].to_pylist(), vectors, table["references"].combine_chunks())


@contextmanager
def _open(folder: FolderLike, captioner: LoadedCaptioner) -> Iterator[tuple[pq.ParquetFile, str]]:
    """Yields the file of the captioner's datastore, and its fingerprint."""
    source = open_folder(folder)
    command = f"`captionlib build-datastore FEATURES -c {source.uri}`"
    try:
        content = source.open(DATASTORE)
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{source.uri}: decoding.rerank.neighbors needs {DATASTORE}, which is missing; write it with {command}"
        ) from error
    try:
        with content:
            file = pq.ParquetFile(content)
            origin = from_json(file.schema_arrow.metadata[b"captionlib"])
            if origin["captioner"] != captioner.fingerprint:
                raise CheckpointError(
                    f"{source.address(DATASTORE)}: expected the datastore for captioner {captioner.fingerprint}, "
                    f"got the one for captioner {origin['captioner']}; write it again with {command}"
                )
            yield file, compute_fingerprint("datastore", origin)
    except (pa.ArrowException, KeyError, OSError, TypeError, ValueError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise StorageError(f"{source.address(DATASTORE)} cannot be read: {error.strerror}") from error
        reason = " ".join(str(error).split())  # Arrow's messages have several lines
        raise CheckpointError(
            f"{source.address(DATASTORE)} is damaged ({reason}); write it again with {command}"
        ) from error
