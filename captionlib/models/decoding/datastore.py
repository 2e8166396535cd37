"""What a captioner remembers of the images it learned from: a vector and the sentences of each.

Kept as `datastore.parquet` beside the checkpoint, where `captionlib build-datastore` writes it. What was said of the images that
are most like a new one is evidence of what is to be said of it (consensus.py).
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
from captionlib.data.shards.markers import compute_fingerprint
from captionlib.errors import CheckpointError
from captionlib.models.checkpoints.checkpoint import LoadedCaptioner
from captionlib.models.checkpoints.folder import DATASTORE, FolderLike, open_folder
from captionlib.models.decoding.cider_d import CiderD
from captionlib.models.decoding.rerank import Neighbors

__all__ = [
    "Datastore",
    "DatastoreEntries",
    "datastore_fingerprint",
    "datastore_schema",
    "read_datastore",
    "write_datastore",
]

Vectors = npt.NDArray[np.float32]

_TEMPERATURE = 0.06  # of the weights of neighbors, over the cosines of their vectors


class DatastoreEntries(NamedTuple):
    """Some images to remember.

    Attributes:
        image_ids: of each.
        vectors: `[images, size]`, as the captioner has them.
        sentences: of each image, as word ids.
    """

    image_ids: list[str]
    vectors: Vectors
    sentences: list[list[list[int]]]


class Datastore:
    """Finds the training images most like others: by the cosine of their vectors, each number brought to mean 0 and
    deviation 1 over the training images.

    Args:
        image_ids: of the training images.
        vectors: `[images, size]`, as the captioner has them.
        sentences: a list an image, of lists of word ids.
        fingerprint: what tells it from other memories.
    """

    def __init__(self, image_ids: Sequence[str], vectors: Vectors, sentences: pa.Array, fingerprint: str) -> None:
        self.fingerprint = fingerprint
        self.cider = CiderD(one.as_py() for one in sentences)
        self._places = {image_id: place for place, image_id in enumerate(image_ids)}
        self._sentences = sentences
        self._mean = vectors.mean(0)
        std = vectors.std(0)
        self._std = np.where(std > 0, std, 1)
        self._directions = self._direct(vectors)

    def find_neighbors(self, vectors: Vectors, count: int, keys: Sequence[str] | None = None) -> list[Neighbors]:
        """What was said of the images most like each of some others; the most alike count most.

        Args:
            vectors: `[images, size]`, as the captioner has them.
            count: how many neighbors an image has, at most.
            keys: the ids of the images; an image is no neighbour of its own. None knows of none.
        """
        likeness = self._direct(vectors) @ self._directions.T
        for row, key in enumerate(keys or ()):
            if key in self._places:
                likeness[row, self._places[key]] = -np.inf
        count = min(count, likeness.shape[1])
        nearest = np.argpartition(-likeness, count - 1, axis=1)[:, :count]
        return [self._say(places, row[places]) for places, row in zip(nearest, likeness, strict=True)]

    def _direct(self, vectors: Vectors) -> Vectors:
        """Standardised and brought to length 1; what is of length 0 stays."""
        standard = (vectors - self._mean) / self._std
        lengths = np.linalg.norm(standard, axis=1, keepdims=True)
        directions: Vectors = standard / np.where(lengths > 0, lengths, 1)
        return directions

    def _say(self, places: npt.NDArray[np.int64], likeness: Vectors) -> Neighbors:
        weights = np.exp((likeness - likeness.max()).astype(np.float64) / _TEMPERATURE)
        said = self._sentences.take(pa.array(places)).to_pylist()
        of_sentences = [weight / len(some) for weight, some in zip(weights / weights.sum(), said, strict=True)]
        return Neighbors([one for some in said for one in some], np.repeat(of_sentences, [len(some) for some in said]))


def datastore_schema(captioner: LoadedCaptioner, features: str, splits: Sequence[str]) -> pa.Schema:
    """The columns of `datastore.parquet`, and whose it is.

    Args:
        captioner: whose.
        features: the fingerprint of the dataset of the images.
        splits: which of them.
    """
    size = captioner.model.vector_size
    origin = {"captioner": captioner.fingerprint, "features": features, "splits": list(splits)}
    return pa.schema(
        [
            pa.field("image_id", pa.string(), nullable=False),
            pa.field("vector", pa.list_(pa.float32(), size), nullable=False),
            pa.field("sentences", pa.list_(pa.list_(pa.int32())), nullable=False),
        ],
        {"captionlib": json.dumps(origin)},
    )


def write_datastore(folder: FolderLike, schema: pa.Schema, images: Iterable[DatastoreEntries]) -> None:
    """Writes the memory of a captioner into its folder, whole or not at all.

    Args:
        folder: of the captioner.
        schema: see `datastore_schema`.
        images: some at a time.
    """
    with (
        open_folder(folder).stage(DATASTORE) as path,
        pq.ParquetWriter(path, schema, compression="zstd") as writer,
    ):
        for image_ids, vectors, sentences in images:
            columns = [
                pa.array(image_ids, pa.string()),
                numpy_to_vectors(vectors),
                pa.array(sentences, schema.field("sentences").type),
            ]
            writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=schema))


def datastore_fingerprint(folder: FolderLike, captioner: LoadedCaptioner) -> str:
    """What tells the memory of a captioner from others; reads none of it.

    Raises:
        CheckpointError: there is none, it is another captioner's, or it is damaged.
    """
    with _open(folder, captioner) as (_, fingerprint):
        return fingerprint


def read_datastore(folder: FolderLike, captioner: LoadedCaptioner) -> Datastore:
    """Reads the memory that lies beside a captioner.

    Raises:
        CheckpointError: there is none, it is another captioner's, or it is damaged.
    """
    with _open(folder, captioner) as (file, fingerprint):
        table = file.read()
    vectors = vectors_to_numpy(table["vector"])
    return Datastore(table["image_id"].to_pylist(), vectors, table["sentences"].combine_chunks(), fingerprint)


@contextmanager
def _open(folder: FolderLike, captioner: LoadedCaptioner) -> Iterator[tuple[pq.ParquetFile, str]]:
    """The file, to be read in here, and its fingerprint."""
    source = open_folder(folder)
    remember = f"`captionlib build-datastore FEATURES -c {source.uri}` writes it"
    try:
        content = source.open(DATASTORE)
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{source.uri}: decoding.rerank.neighbors needs {DATASTORE}, got none there; {remember}"
        ) from error
    try:
        with content:
            file = pq.ParquetFile(content)
            origin = json.loads(file.schema_arrow.metadata[b"captionlib"])
            if origin["captioner"] != captioner.fingerprint:
                raise CheckpointError(
                    f"{source.address(DATASTORE)}: expected the memory of captioner {captioner.fingerprint}, got that of "
                    f"{origin['captioner']}; {remember} again"
                )
            yield file, compute_fingerprint("memory", origin)
    except (pa.ArrowException, KeyError, OSError, TypeError, ValueError) as error:
        why = " ".join(str(error).split())  # Arrow says it in several lines
        raise CheckpointError(f"{source.address(DATASTORE)} is damaged ({why}); {remember} again") from error
