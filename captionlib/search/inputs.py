"""Reads the captions and embeddings that an index is built from, and checks that they cover the same images."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from captionlib.data.arrays import vectors_to_numpy
from captionlib.data.shards.dataset import ShardedDataset, open_dataset
from captionlib.data.shards.markers import DESCRIPTION_FILE, Marker, compute_checksum, part_name
from captionlib.data.shards.schemas import add_missing_columns
from captionlib.data.sources.versions import find_modified_times
from captionlib.errors import CaptionlibError, DatasetError
from captionlib.search.index_folder import InputShard
from captionlib.search.rows import DETAILS_BATCH_ROWS, DETAILS_SCHEMA, RESULT_COLUMNS, ROW_SCHEMA
from captionlib.storage.folders import Folder, scratch_folder

__all__ = [
    "ManifestShards",
    "check_datasets_match",
    "check_same_ranker",
    "find_kept_rows",
    "find_manifest",
    "match_embeddings_to_captions",
    "open_shard",
    "read_caption_rows",
    "read_details",
    "read_embeddings",
    "sample_embeddings",
    "to_unit_vectors",
]

_VECTOR_BATCH_ROWS = 8192
_TEXT_BATCH_ROWS = 65_536
_SAMPLED_SHARDS = 64
_SEED = 0


def check_datasets_match(captions: ShardedDataset, embeddings: ShardedDataset) -> None:
    """Raises DatasetError if the numbers of images in a shard differ."""
    if captions.shards != embeddings.shards:
        problem = f"the captions have {captions.shards} shards, the embeddings have {embeddings.shards}"
        raise _mismatch_error(captions, embeddings, problem)
    caption_markers, embedding_markers = captions.read_markers(), embeddings.read_markers()
    for shard in sorted(caption_markers.keys() & embedding_markers.keys()):
        in_captions, in_embeddings = caption_markers[shard].images, embedding_markers[shard].images
        if in_captions != in_embeddings:
            problem = (
                f"{part_name(shard)} has {in_captions} images in the captions, but {in_embeddings} in the embeddings"
            )
            raise _mismatch_error(captions, embeddings, problem)


def check_same_ranker(embeddings: Sequence[ShardedDataset]) -> None:
    """Raises DatasetError if different rankers (image-text retrieval models) computed the embeddings."""
    for dataset in embeddings[1:]:
        first, other = (
            (str(each.config.get("ranker", "")), each.schema.field("embedding").type.list_size)
            for each in (embeddings[0], dataset)
        )
        if first != other:
            raise DatasetError(
                f"expected embeddings of one ranker, got {first[0]} (dimension {first[1]}) in "
                f"{embeddings[0].folder.uri} and {other[0]} (dimension {other[1]}) in {dataset.folder.uri}; "
                "embed all images with the same ranker"
            )


@contextmanager
def open_shard(dataset: ShardedDataset, shard: int, checksum: str) -> Iterator[pq.ParquetFile]:
    """Opens a shard after verifying its checksum. The open file stays readable if the shard is replaced."""
    name = f"{part_name(shard)}.parquet"
    with scratch_folder() as temporary:
        path = temporary / name
        try:
            if dataset.folder.is_local:
                path = Path(dataset.folder.path(name))
            else:
                dataset.folder.download(name, path)
            file = path.open("rb")
        except FileNotFoundError as error:
            raise DatasetError(f"{dataset.folder.address(name)} is missing; write the dataset again") from error
        with file:
            if compute_checksum(file) != checksum:
                raise DatasetError(
                    f"{dataset.folder.address(name)} has changed since this command started, or is damaged: expected "
                    f"{checksum}; run the command again; if that does not help, write the dataset again"
                )
            yield pq.ParquetFile(file)


def find_kept_rows(parquet: pq.ParquetFile, excluded_ids: Collection[str]) -> npt.NDArray[np.bool_]:
    """Returns a mask of the rows of a captions shard whose images are not in `excluded_ids`."""
    if not excluded_ids:
        return np.ones(parquet.metadata.num_rows, np.bool_)
    ids = _read_image_ids(parquet).to_pylist()
    return np.fromiter((image_id not in excluded_ids for image_id in ids), np.bool_, len(ids))


def read_caption_rows(
    parquet: pq.ParquetFile, mask: npt.NDArray[np.bool_], kept_images: Mapping[str, str]
) -> Iterator[pa.RecordBatch]:
    """Yields the rows of a captions shard that `mask` selects, with the columns of `ROW_SCHEMA`.

    `kept_images` maps the id of each duplicate to the id of the image that is kept from its group.
    """
    stored = pa.schema([ROW_SCHEMA.field(name) for name in (*RESULT_COLUMNS, "version")])
    for batch in _read_selected(parquet, stored.names, mask, _TEXT_BATCH_ROWS):
        rows = add_missing_columns(batch, stored)
        duplicate_of = pa.nulls(rows.num_rows, pa.string())
        if kept_images:
            duplicate_of = pa.array(map(kept_images.get, rows["image_id"].to_pylist()), pa.string())
        # The version of an image is a string that changes with its file, and can contain the modification time.
        columns = [*rows.columns, find_modified_times(rows["version"]), duplicate_of]
        yield pa.RecordBatch.from_arrays(columns, schema=ROW_SCHEMA)


def read_details(
    parquet: pq.ParquetFile, mask: npt.NDArray[np.bool_], references: pa.Table | None
) -> Iterator[pa.RecordBatch]:
    """Yields the rows of a captions shard that `mask` selects, with the columns of `DETAILS_SCHEMA`.

    `references` has the columns image_id and captions of the manifest. It is None if the manifest is not available.
    """
    ids = None if references is None else references["image_id"].combine_chunks()
    for batch in _read_selected(parquet, ["image_id", *DETAILS_SCHEMA.names], mask, DETAILS_BATCH_ROWS):
        columns = {name: batch[name] for name in DETAILS_SCHEMA.names if name in batch.schema.names}
        if references is not None:
            columns["references"] = references["captions"].take(pc.index_in(batch["image_id"], value_set=ids))
            columns["references"] = columns["references"].combine_chunks()
        # Missing image-text scores become nulls. Casting converts fixed-size lists of attention weights to lists.
        yield pa.RecordBatch.from_arrays(
            [
                columns[field.name].cast(field.type) if field.name in columns else pa.nulls(batch.num_rows, field.type)
                for field in DETAILS_SCHEMA
            ],
            schema=DETAILS_SCHEMA,
        )


def _read_selected(
    parquet: pq.ParquetFile, columns: Sequence[str], mask: npt.NDArray[np.bool_], batch_rows: int
) -> Iterator[pa.RecordBatch]:
    start = 0
    for batch in parquet.iter_batches(batch_rows, columns=list(columns)):
        is_selected = mask[start : start + batch.num_rows]
        start += batch.num_rows
        yield batch if is_selected.all() else batch.filter(pa.array(is_selected))


def find_manifest(captions: ShardedDataset) -> "ManifestShards | None":
    """Returns the manifest (table of images) that captions were generated from, or None if it is missing.

    The captions may have been generated from a features dataset that was extracted from the manifest. If some of these
    datasets are local and others remote, the manifest is ignored, because not every machine can read all of them.
    Raises DatasetError if a dataset exists, but cannot be read.
    """
    markers = [captions.require_markers()]
    dataset = captions
    try:
        while dataset.kind != "manifest":
            source = Folder(dataset.source)
            if not source.uri or source.is_local != captions.folder.is_local or not source.exists(DESCRIPTION_FILE):
                return None
            dataset = open_dataset(source.uri)
            markers.append(dataset.require_markers())
        return ManifestShards(dataset, _match_shards(markers))
    except CaptionlibError as error:
        raise DatasetError(
            f"the reference captions of {captions.folder.uri} cannot be read: {error}; to build the index without "
            "them, set references=false"
        ) from error


@dataclass(frozen=True)
class ManifestShards:
    """A manifest, and the checksums of the shards that have not changed since the captions were generated."""

    dataset: ShardedDataset
    checksums: Mapping[int, str]

    def read_references(self, shard: int) -> pa.Table:
        """Returns the columns image_id and captions of a shard."""
        with open_shard(self.dataset, shard, self.checksums[shard]) as parquet:
            return parquet.read(columns=["image_id", "captions"])


def _match_shards(markers: Sequence[Mapping[int, Marker]]) -> dict[int, str]:
    """Returns the checksums of the shards of the manifest that have not changed since the captions were generated.

    `markers` starts with those of the captions and ends with those of the manifest. Each dataset is made from the next.
    """
    matches = {}
    for shard in set.intersection(*map(set, markers)):
        chain = [each[shard] for each in markers]
        if all(output.input_checksum == source.checksum for output, source in pairwise(chain)):
            matches[shard] = chain[-1].checksum
    return matches


def match_embeddings_to_captions(
    captions: ShardedDataset,
    embeddings: ShardedDataset,
    shard: int,
    caption_file: pq.ParquetFile,
    embedding_file: pq.ParquetFile,
) -> npt.NDArray[np.int64]:
    """Returns, for each embedding of a shard, the row of its caption, `[embeddings]`; -1 if captioning failed.

    Raises DatasetError if an image has neither a row nor a recorded failure in one of the datasets.
    """
    captioned, embedded = map(_read_image_ids, (caption_file, embedding_file))
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


def read_embeddings(parquet: pq.ParquetFile) -> npt.NDArray[np.float32]:
    """Reads the vectors of a shard, `[rows, dimension]`, scaled to unit length."""
    empty = to_unit_vectors(parquet.schema_arrow.empty_table()["embedding"])
    batches = parquet.iter_batches(_VECTOR_BATCH_ROWS, columns=["embedding"])
    return np.concatenate([empty, *(to_unit_vectors(batch["embedding"]) for batch in batches)])


def sample_embeddings(shards: Sequence[tuple[ShardedDataset, InputShard]], count: int) -> npt.NDArray[np.float32]:
    """Returns about `count` vectors from evenly spaced shards of embeddings datasets, `[sample, dimension]`.

    The sample and one shard are held in memory.
    """
    chosen = [shards[position] for position in np.unique(np.linspace(0, len(shards) - 1, _SAMPLED_SHARDS).astype(int))]
    rows = sum(shard.rows for _, shard in chosen)
    fraction = min(1.0, 1.05 * count / max(1, rows))  # the size of the sample varies, so aim for 5% more
    generator = np.random.default_rng(_SEED)
    samples = []
    for embeddings, shard in chosen:
        with open_shard(embeddings, shard.shard, shard.embeddings) as parquet:
            vectors = read_embeddings(parquet)
        samples.append(vectors[generator.random(len(vectors)) < fraction])
    return np.concatenate(samples)


def to_unit_vectors(column: pa.FixedSizeListArray | pa.ChunkedArray) -> npt.NDArray[np.float32]:
    """Converts vectors to `[rows, dimension]` and scales them to unit length. Stored float16 vectors are rounded."""
    vectors = vectors_to_numpy(column).astype(np.float32)
    unit: npt.NDArray[np.float32] = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    return unit


def _read_image_ids(parquet: pq.ParquetFile) -> pa.Array:
    batches = parquet.iter_batches(_TEXT_BATCH_ROWS, columns=["image_id"])
    return pa.concat_arrays([pa.array([], pa.string()), *(batch["image_id"] for batch in batches)])


def _find_missing_without_failure(dataset: ShardedDataset, shard: int, missing: pa.Array) -> str | None:
    """Returns the first id in `missing` that is not recorded as a failure; None if all are."""
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
