"""Finds duplicate images: exact copies by the hash of their bytes, and near-duplicates by their embeddings.

Images are visited in order of size (the largest first, then by id). An image that is not yet in a group starts a new
group and is its kept image. All later images that are not yet in a group join it if their similarity to the kept image
reaches the threshold. Every image of a group is therefore similar to the kept image, and groups do not grow through
chains of small differences.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from captionlib.data.shards.dataset import ShardedDataset, create_dataset, open_dataset
from captionlib.data.shards.markers import DESCRIPTION_FILE
from captionlib.data.shards.schemas import DUPLICATES_SCHEMA
from captionlib.data.shards.writer import write_shard
from captionlib.errors import ConfigError
from captionlib.progress import ProgressBar, progress_bar
from captionlib.search.config import IndexConfig, VectorLayout
from captionlib.search.inputs import check_same_ranker, to_unit_vectors
from captionlib.storage.folders import Addresses, Folder, list_addresses

__all__ = ["DEFAULT_THRESHOLD", "DuplicateSummary", "find_duplicates", "read_duplicate_summary"]

DEFAULT_THRESHOLD = 0.94  # see `near-duplicates` in benchmarks/README.md

_QUERY_BATCH_ROWS = 256
_TRAINING_VECTORS_PER_LIST = 50
_TRAINING_SHARDS = 64
_MIN_NPROBE = 8  # near-duplicates are in the same inverted list or in adjacent ones
_SEED = 1

Indices = npt.NDArray[np.int64]
Shard = tuple[ShardedDataset, int]


@dataclass(frozen=True)
class DuplicateSummary:
    """Counts of images, groups of two or more images, and duplicates: images that are not the kept one of a group."""

    images: int
    groups: int
    duplicates: int


@dataclass(frozen=True)
class _Images:
    """All images in order of size: the largest first, then by id."""

    ids: pa.StringArray
    hashes: pa.StringArray  # hashes of the bytes; null if unknown
    positions: Indices  # row numbers, counted over all shards


@dataclass(frozen=True)
class _Groups:
    """The group of each image, in the order of `_Images`."""

    kept_image: Indices
    similarity: npt.NDArray[np.float32]  # cosine similarity to the kept image


def find_duplicates(
    embeddings: Addresses,
    output: str | os.PathLike[str],
    threshold: float = DEFAULT_THRESHOLD,
    *,
    overwrite: bool = False,
    progress: bool = False,
) -> DuplicateSummary:
    """Groups duplicate images and writes a dataset of kind `duplicates` with a row for each image of a group.

    The vectors of all images are held in memory as float16.

    Example:
        >>> captionlib.find_duplicates("embeddings", "duplicates").images
        26

    Args:
        embeddings: a complete embeddings dataset, or several, whose images are compared with each other.
        output: folder to write.
        threshold: minimum cosine similarity, in (0, 1], of the embeddings of near-duplicates. If 1, only exact copies
            are duplicates.
        overwrite: whether to replace a dataset that has a different threshold or was made from other manifests.
        progress: whether to show a progress bar.

    Raises:
        ConfigError: `threshold` is out of range.
        DatasetError: `embeddings` are not complete embeddings datasets of one ranker (image-text retrieval model).
        FingerprintError: the output contains a dataset with a different threshold or from other manifests, and
            `overwrite` is False.
    """
    if not 0 < threshold <= 1:
        raise ConfigError(f"threshold: expected a number above 0 and at most 1, got {threshold}")
    inputs = _open_inputs(embeddings)
    check_same_ranker(inputs)
    # Identifies the manifests (tables of images) that the embeddings were computed from.
    manifest_ids = "+".join(each.manifest_id for each in inputs)
    dataset = create_dataset(
        output,
        "duplicates",
        DUPLICATES_SCHEMA,
        config={"threshold": threshold},
        shards=1,
        source=inputs[0] if len(inputs) == 1 else None,
        manifest_id=manifest_ids,
        overwrite=overwrite,
    )
    checksum = _compute_checksum(inputs)
    if not _is_current(dataset, checksum):
        table = _group_duplicates(inputs, threshold, progress)
        dataset.mark_incomplete()
        with write_shard(dataset, 0, table.num_rows, checksum) as writer:
            writer.write(table)
    dataset.finish()
    return _summarize(dataset, inputs)


def read_duplicate_summary(
    embeddings: Addresses, duplicates: str | os.PathLike[str], threshold: float
) -> DuplicateSummary | None:
    """Returns the counts that `find_duplicates` wrote. Returns None if they are missing or out of date."""
    inputs = _open_inputs(embeddings)
    if not Folder(duplicates).exists(DESCRIPTION_FILE):
        return None
    dataset = open_dataset(duplicates, "duplicates")
    current = dataset.config.get("threshold") == threshold and _is_current(dataset, _compute_checksum(inputs))
    return _summarize(dataset, inputs) if current and dataset.is_complete() else None


def _open_inputs(embeddings: Addresses) -> list[ShardedDataset]:
    return [open_dataset(address, "embeddings").require_complete() for address in list_addresses(embeddings)]


def _compute_checksum(inputs: Sequence[ShardedDataset]) -> str:
    return "+".join(each.compute_content_checksum() for each in inputs)


def _is_current(dataset: ShardedDataset, checksum: str) -> bool:
    marker = dataset.read_marker(0)  # records that the shard is complete; None if it is not
    return marker is not None and marker.input_checksum == checksum


def _summarize(dataset: ShardedDataset, inputs: Sequence[ShardedDataset]) -> DuplicateSummary:
    kept = dataset.read(0, ["kept"])["kept"].to_numpy()
    images = sum(each.compute_totals().rows for each in inputs)
    return DuplicateSummary(images, int(kept.sum()), int((~kept).sum()))


def _group_duplicates(inputs: Sequence[ShardedDataset], threshold: float, progress: bool) -> pa.Table:
    shards = [
        (each, shard) for each in inputs for shard, marker in sorted(each.require_all_markers().items()) if marker.rows
    ]
    images = _read_images(shards, inputs[0].schema)
    groups = _Groups(np.arange(len(images.ids)), np.ones(len(images.ids), np.float32))
    first = _find_first_copies(images.hashes)
    unique = np.flatnonzero(first == groups.kept_image)  # images that are not exact copies of earlier ones
    dimension = inputs[0].schema.field("embedding").type.list_size
    if threshold < 1:
        with progress_bar("deduplicate", len(unique), "images", progress) as bar:
            index = _index_vectors(shards, len(images.ids), dimension)
            _group_similar(index, images.positions, unique, groups, threshold, bar)
    groups.kept_image[:], groups.similarity[:] = groups.kept_image[first], groups.similarity[first]
    return _build_table(images.ids, groups)


def _read_images(shards: Sequence[Shard], schema: pa.Schema) -> _Images:
    columns = ["image_id", "width", "height", "content_hash"]
    empty = pa.schema([schema.field(name) for name in columns]).empty_table()
    tables = [each.read(shard, columns).select(columns) for each, shard in shards]
    table = pa.concat_tables([empty, *tables]).combine_chunks()
    pixels = pc.multiply(table["width"].cast(pa.int64()), table["height"].cast(pa.int64()))
    order = pc.sort_indices(
        table.append_column("pixels", pixels), [("pixels", "descending"), ("image_id", "ascending")]
    )
    ids, hashes = (table[name].take(order).combine_chunks() for name in ("image_id", "content_hash"))
    return _Images(ids, hashes, order.to_numpy().astype(np.int64))


def _find_first_copies(hashes: pa.StringArray) -> Indices:
    """Returns, for each image, the index of the first image with the same hash. A null hash equals no other."""
    indices = np.arange(len(hashes))
    first: Indices = pc.index_in(hashes, value_set=hashes).to_numpy().astype(np.int64)
    return np.where(hashes.is_valid().to_numpy(zero_copy_only=False), first, indices)


def _index_vectors(shards: Sequence[Shard], rows: int, dimension: int) -> Any:
    """Returns a Faiss index of all vectors as float16, numbered in the order of the shards."""
    layout = VectorLayout.choose(IndexConfig(vectors="sq8"), rows, dimension)  # only nlist and nprobe are used
    index = faiss.index_factory(dimension, f"IVF{layout.nlist},SQfp16", faiss.METRIC_INNER_PRODUCT)
    index.cp.seed = _SEED
    index.cp.spherical = True
    index.cp.min_points_per_centroid = 1  # disables the warning about few vectors per list
    if shards:
        chosen = [shards[index] for index in np.unique(np.linspace(0, len(shards) - 1, _TRAINING_SHARDS).astype(int))]
        per_shard = -(-layout.nlist * _TRAINING_VECTORS_PER_LIST // len(chosen))
        index.train(np.concatenate([_read_vectors(*shard)[:per_shard] for shard in chosen]))
    for shard in shards:
        index.add(_read_vectors(*shard))
    index.make_direct_map()
    index.nprobe = min(layout.nlist, max(_MIN_NPROBE, layout.nprobe))
    return index


def _read_vectors(embeddings: ShardedDataset, shard: int) -> npt.NDArray[np.float32]:
    return to_unit_vectors(embeddings.read(shard, ["embedding"])["embedding"])


def _group_similar(
    index: Any, positions: Indices, unique: Indices, groups: _Groups, threshold: float, bar: ProgressBar
) -> None:
    """Adds each image in `unique` to the group of the first similar kept image. Changes `groups` in place."""
    image_by_position = np.empty_like(positions)
    image_by_position[positions] = np.arange(len(positions))
    is_unique = np.zeros(len(positions), np.bool_)
    is_unique[unique] = True
    for start in range(0, len(unique), _QUERY_BATCH_ROWS):
        batch = unique[start : start + _QUERY_BATCH_ROWS]
        batch = batch[groups.kept_image[batch] == batch]  # the rest are already in a group
        vectors = index.reconstruct_batch(positions[batch]) if len(batch) else np.empty((0, index.d), np.float32)
        # The margin allows for rounding, which makes the product of a vector with itself slightly less than 1.
        offsets, similarity, found = index.range_search(vectors, threshold - 1e-3)
        for query, image in enumerate(batch):
            if groups.kept_image[image] != image:
                continue
            matches = slice(int(offsets[query]), int(offsets[query + 1]))
            members, scores = image_by_position[found[matches]], similarity[matches]
            joins = (members > image) & is_unique[members] & (groups.kept_image[members] == members)
            groups.kept_image[members[joins]], groups.similarity[members[joins]] = image, scores[joins]
        bar.update(min(_QUERY_BATCH_ROWS, len(unique) - start))


def _build_table(ids: pa.StringArray, groups: _Groups) -> pa.Table:
    """Returns the rows of all groups of two or more images, with the kept image of each group first."""
    sizes = np.bincount(groups.kept_image, minlength=len(ids))
    images = np.flatnonzero(sizes[groups.kept_image] > 1)
    images = images[np.lexsort((images, groups.kept_image[images]))]
    kept = groups.kept_image[images]
    columns = [ids.take(images), ids.take(kept), pa.array(kept == images), pa.array(groups.similarity[images])]
    return pa.Table.from_arrays(columns, schema=DUPLICATES_SCHEMA)
