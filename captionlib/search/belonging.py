"""Captions and embeddings of the same images, put side by side, and refused where they are not of the same images."""

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from captionlib.data.arrays import vectors_to_numpy
from captionlib.data.shards.dataset import ShardedDataset
from captionlib.data.shards.markers import part_name
from captionlib.errors import DatasetError

__all__ = ["check_datasets", "check_shard", "read_vectors", "sample_vectors"]

_BATCH_ROWS = 8192
_SAMPLED_SHARDS = 64


def check_datasets(captions: ShardedDataset, embeddings: ShardedDataset) -> None:
    """Looks for signs that two datasets are of different images, without reading their rows.

    Raises:
        DatasetError: they are.
    """
    if captions.shards != embeddings.shards:
        raise _stranger(captions, embeddings, f"expected {captions.shards} shards, got {embeddings.shards}")
    there, here = captions.read_markers(), embeddings.read_markers()
    for shard in sorted(there.keys() & here.keys()):
        expected = there[shard].rows + there[shard].failures
        got = here[shard].rows + here[shard].failures
        if expected != got:
            raise _stranger(captions, embeddings, f"{part_name(shard)} has {expected} images there and {got} here")


def check_shard(captions: ShardedDataset, embeddings: ShardedDataset, shard: int) -> npt.NDArray[np.int64]:
    """Where the images of a shard of embeddings are among its captions.

    Returns:
        `[embeddings] int64`, places in the shard of the captions; -1 where an image has no caption because it failed.

    Raises:
        DatasetError: an image is in one of them alone, and did not fail in the other.
    """
    names, others = (_ids(dataset, shard) for dataset in (captions, embeddings))
    found = pc.fill_null(pc.index_in(others, value_set=names), -1)
    places: npt.NDArray[np.int64] = found.to_numpy(zero_copy_only=False).astype(np.int64)
    without_caption = others.filter(pa.array(places < 0))
    without_vector = names.filter(pc.invert(pc.is_in(names, value_set=others)))
    for dataset, missing in ((captions, without_caption), (embeddings, without_vector)):
        stranger = _first_unexplained(dataset, shard, missing)
        if stranger is not None:
            where = f"{part_name(shard)} of {dataset.folder.uri}"
            raise _stranger(captions, embeddings, f"image {stranger} has neither a row nor a failure in {where}")
    return places


def read_vectors(embeddings: ShardedDataset, shard: int) -> npt.NDArray[np.float32]:
    """The vectors of a shard, `[rows, size]`, of unit length also after their rounding to float16."""
    return np.concatenate([_empty(embeddings), *_vector_batches(embeddings, shard)])


def sample_vectors(
    embeddings: ShardedDataset, shards: Sequence[int], wanted: int, seed: int
) -> npt.NDArray[np.float32]:
    """About so many vectors, spread over the shards, `[rows, size]`; memory holds these alone."""
    chosen = [shards[place] for place in np.unique(np.linspace(0, len(shards) - 1, _SAMPLED_SHARDS).astype(int))]
    rows = sum(marker.rows for marker in embeddings.read_markers(chosen).values())
    share = min(1.0, 1.05 * wanted / max(1, rows))
    generator = np.random.default_rng(seed)
    pieces = [
        batch[generator.random(len(batch)) < share] for shard in chosen for batch in _vector_batches(embeddings, shard)
    ]
    return np.concatenate([_empty(embeddings), *pieces])


def _vector_batches(embeddings: ShardedDataset, shard: int) -> Iterator[npt.NDArray[np.float32]]:
    for batch in embeddings.read_batches(shard, ["embedding"], _BATCH_ROWS):
        vectors = vectors_to_numpy(batch["embedding"]).astype(np.float32)
        yield vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


def _empty(embeddings: ShardedDataset) -> npt.NDArray[np.float32]:
    return np.empty((0, embeddings.schema.field("embedding").type.list_size), np.float32)


def _ids(dataset: ShardedDataset, shard: int) -> pa.Array:
    return pa.concat_arrays(
        [pa.array([], pa.string()), *(batch["image_id"] for batch in dataset.read_batches(shard, ["image_id"], 65_536))]
    )


def _first_unexplained(dataset: ShardedDataset, shard: int, missing: pa.Array) -> str | None:
    """The first of these images that did not fail in the shard."""
    if not len(missing):
        return None
    failures = dataset.read_failures(shard)
    if failures is not None:
        failed = failures["image_id"].combine_chunks()
        missing = missing.filter(pc.invert(pc.is_in(missing, value_set=failed)))
    return str(missing[0]) if len(missing) else None


def _stranger(captions: ShardedDataset, embeddings: ShardedDataset, what: str) -> DatasetError:
    return DatasetError(
        f"captions {captions.folder.uri} and embeddings {embeddings.folder.uri} do not belong together: {what}; "
        "make both from the same manifest or features, in one pass or in two"
    )
