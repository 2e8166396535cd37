"""Compares two outputs of a stage: rows, failures, totals and files."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from captionlib.data.shards.dataset import ShardedDataset, open_dataset
from captionlib.data.shards.markers import DESCRIPTION_FILE, FAILURES_FOLDER, MARKERS_FOLDER, SUCCESS_FILE, part_name
from captionlib.errors import DatasetError
from captionlib.search.index import open_index
from captionlib.search.index_folder import read_description
from captionlib.storage.folders import TEMPORARY_FOLDER, Folder

__all__ = ["compare_datasets", "compare_indexes"]


def compare_datasets(expected: Path, got: Path) -> list[str]:
    """Returns a description of each difference between two datasets."""
    try:
        before, now = open_dataset(expected).require_complete(), open_dataset(got).require_complete()
    except DatasetError as error:
        return [str(error)]
    if before.fingerprint != now.fingerprint:
        return [f"fingerprint: expected {before.fingerprint}, got {now.fingerprint}"]
    return [*_compare_rows(before, now), *_find_duplicate_ids(now), *_find_unexpected_files(now)]


def compare_indexes(expected: Path, got: Path, queries: list[str]) -> list[str]:
    """Returns a description of each difference between two indexes, in metadata, files and search results."""
    before, now = (read_description(Folder(path)) for path in (expected, got))
    if before is None or now is None:
        return [
            f"{path}: not an index" for path, description in ((expected, before), (got, now)) if description is None
        ]
    # File names contain checksums. Only the text index may differ, because Tantivy names its files at random.
    names = ("fingerprint", "config", "layout", "shards", "vectors", "trained", "vectors_count")
    different = [f"{name} differs" for name in names if getattr(before, name) != getattr(now, name)]
    return different or list(_compare_results(expected, got, queries))


def _compare_rows(before: ShardedDataset, now: ShardedDataset) -> Iterator[str]:
    for shard in range(before.shards):
        name, expected_marker, marker = part_name(shard), before.read_marker(shard), now.read_marker(shard)
        if expected_marker is None or marker is None:
            yield f"{name}: no marker"
            continue
        if not before.read(shard).equals(now.read(shard)):
            yield f"{name}: rows differ"
        failures = before.read_failures(shard), now.read_failures(shard)
        if (failures[0] is None) != (failures[1] is None) or (failures[0] and not failures[0].equals(failures[1])):
            yield f"{name}: failures differ"
        if (expected_marker.rows, expected_marker.failures, expected_marker.checksum) != (
            marker.rows,
            marker.failures,
            marker.checksum,
        ):
            yield f"{name}: markers differ"


def _find_duplicate_ids(dataset: ShardedDataset) -> Iterator[str]:
    counts = Counter(
        image_id
        for shard in range(dataset.shards)
        for image_id in dataset.read(shard, ["image_id"])["image_id"].to_pylist()
    )
    yield from (f"image {image_id} occurs {count} times" for image_id, count in counts.items() if count > 1)


def _find_unexpected_files(dataset: ShardedDataset) -> Iterator[str]:
    """Describes files that do not belong to the dataset, such as partial writes, and missing files."""
    parts = {f"{part_name(shard)}.parquet" for shard in range(dataset.shards)}
    metadata = {DESCRIPTION_FILE, SUCCESS_FILE, MARKERS_FOLDER, FAILURES_FOLDER, TEMPORARY_FOLDER}
    yield from (f"{name}: unexpected file" for name in dataset.folder.list() if name not in parts | metadata)
    yield from (f"{name}: missing" for name in parts - set(dataset.folder.list()))


def _compare_results(expected: Path, got: Path, queries: list[str]) -> Iterator[str]:
    indexes = open_index(expected), open_index(got)
    for query in queries:
        before, now = (index.search_text(query, limit=len(index)) for index in indexes)
        if not before.equals(now):
            yield f"{query!r}: results differ; expected {before.num_rows} rows, got {now.num_rows}"
