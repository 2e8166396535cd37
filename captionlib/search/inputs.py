"""Reads the captions and embeddings that an index is built from, and checks that they cover the same images."""

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from captionlib.data.arrays import vectors_to_numpy
from captionlib.data.shards.dataset import ShardedDataset
from captionlib.data.shards.markers import part_name
from captionlib.errors import DatasetError

__all__ = ["check_datasets_match", "match_embeddings_to_captions", "read_embeddings", "sample_embeddings"]

_BATCH_ROWS = 8192
_SAMPLED_SHARDS = 64
_SEED = 0


def check_datasets_match(captions: ShardedDataset, embeddings: ShardedDataset) -> None:
    """Compares the datasets' image counts, read from their markers: files that mark shards as complete.

    Raises:
        DatasetError: the datasets cover different images.
    """
    if captions.shards != embeddings.shards:
        problem = f"the captions have {captions.shards} shards, the embeddings have {embeddings.shards}"
        raise _mismatch_error(captions, embeddings, problem)
    caption_markers, embedding_markers = captions.read_markers(), embeddings.read_markers()
    for shard in sorted(caption_markers.keys() & embedding_markers.keys()):
        images, embedded = (
            markers[shard].rows + markers[shard].failures for markers in (caption_markers, embedding_markers)
        )
        if images != embedded:
            problem = f"{part_name(shard)} has {images} images in the captions, but {embedded} in the embeddings"
            raise _mismatch_error(captions, embeddings, problem)


def match_embeddings_to_captions(
    captions: ShardedDataset, embeddings: ShardedDataset, shard: int
) -> npt.NDArray[np.int64]:
    """Returns for each embedding in a shard the position of its caption, `[embeddings]`; -1 if captioning failed.

    Raises:
        DatasetError: an image is in one dataset, but has neither a row nor a recorded failure in the other.
    """
    captioned, embedded = (_read_image_ids(dataset, shard) for dataset in (captions, embeddings))
    indices = pc.fill_null(pc.index_in(embedded, value_set=captioned), -1)
    positions: npt.NDArray[np.int64] = indices.to_numpy(zero_copy_only=False).astype(np.int64)
    without_caption = embedded.filter(pa.array(positions < 0))
    without_embedding = captioned.filter(pc.invert(pc.is_in(captioned, value_set=embedded)))
    for dataset, missing in ((captions, without_caption), (embeddings, without_embedding)):
        image_id = _find_missing_without_failure(dataset, shard, missing)
        if image_id is not None:
            problem = f"image {image_id} has neither a row nor a failure in {part_name(shard)} of {dataset.folder.uri}"
            raise _mismatch_error(captions, embeddings, problem)
    return positions


def read_embeddings(embeddings: ShardedDataset, shard: int) -> npt.NDArray[np.float32]:
    """Reads the vectors of a shard, `[rows, dimension]`, rescaled to unit length because they are stored as float16."""
    return np.concatenate([_empty_vectors(embeddings), *_read_vector_batches(embeddings, shard)])


def sample_embeddings(embeddings: ShardedDataset, shards: Sequence[int], count: int) -> npt.NDArray[np.float32]:
    """Samples about `count` vectors from evenly spaced shards, `[rows, dimension]`; memory contains only the sample."""
    chosen = [shards[position] for position in np.unique(np.linspace(0, len(shards) - 1, _SAMPLED_SHARDS).astype(int))]
    rows = sum(marker.rows for marker in embeddings.read_markers(chosen).values())
    fraction = min(1.0, 1.05 * count / max(1, rows))
    generator = np.random.default_rng(_SEED)
    samples = [
        batch[generator.random(len(batch)) < fraction]
        for shard in chosen
        for batch in _read_vector_batches(embeddings, shard)
    ]
    return np.concatenate([_empty_vectors(embeddings), *samples])


def _read_vector_batches(embeddings: ShardedDataset, shard: int) -> Iterator[npt.NDArray[np.float32]]:
    for batch in embeddings.read_batches(shard, ["embedding"], _BATCH_ROWS):
        vectors = vectors_to_numpy(batch["embedding"]).astype(np.float32)
        yield vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


def _empty_vectors(embeddings: ShardedDataset) -> npt.NDArray[np.float32]:
    return np.empty((0, embeddings.schema.field("embedding").type.list_size), np.float32)


def _read_image_ids(dataset: ShardedDataset, shard: int) -> pa.Array:
    batches = dataset.read_batches(shard, ["image_id"], 65_536)
    return pa.concat_arrays([pa.array([], pa.string()), *(batch["image_id"] for batch in batches)])


def _find_missing_without_failure(dataset: ShardedDataset, shard: int, missing: pa.Array) -> str | None:
    """Returns the first missing image that is not among the failures: images that could not be processed."""
    if not len(missing):
        return None
    failures = dataset.read_failures(shard)
    if failures is not None:
        failed = failures["image_id"].combine_chunks()
        missing = missing.filter(pc.invert(pc.is_in(missing, value_set=failed)))
    return str(missing[0]) if len(missing) else None


def _mismatch_error(captions: ShardedDataset, embeddings: ShardedDataset, problem: str) -> DatasetError:
    return DatasetError(
        f"captions {captions.folder.uri} and embeddings {embeddings.folder.uri} cover different images: {problem}; "
        "create both from the same manifest or features dataset"
    )
