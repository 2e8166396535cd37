"""Tells in what two outputs differ: every row, failure and total, and every file that a reader would see."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import captionlib.search
from captionlib.data.shards.dataset import ShardedDataset, open_dataset
from captionlib.data.shards.markers import DESCRIPTION_FILE, FAILURES_FOLDER, MARKERS_FOLDER, SUCCESS_FILE, part_name
from captionlib.errors import DatasetError
from captionlib.search.index_folder import IndexDescription, read_description
from captionlib.storage.folders import TEMPORARY_FOLDER, Folder

__all__ = ["compare_datasets", "compare_indexes"]


def compare_datasets(expected: Path, got: Path) -> list[str]:
    """In what a dataset differs from the one that it should equal, a phrase each; none where it is equal."""
    try:
        before, now = open_dataset(expected).require_complete(), open_dataset(got).require_complete()
    except DatasetError as error:
        return [str(error)]
    if before.fingerprint != now.fingerprint:
        return [f"fingerprint: expected {before.fingerprint}, got {now.fingerprint}"]
    return [*_compare_rows(before, now), *_find_repeated(now), *_find_strangers(now)]


def compare_indexes(expected: Path, got: Path, questions: list[str]) -> list[str]:
    """Likewise for indexes: what they say they are, every file that is the same for the same rows, and answers."""
    before, now = (read_description(Folder(path)) for path in (expected, got))
    if before is None or now is None:
        return [f"{path}: no index" for path, one in ((expected, before), (got, now)) if one is None]
    names = (
        "fingerprint",
        "config",
        "layout",
        "shards",
        "end_row",
        "captions_count",
        "vectors_count",
        "text",
        "vectors",
    )
    found = [f"{name} differs" for name in names if getattr(before, name) != getattr(now, name)]
    return found or [*_compare_files(before, expected, got), *_compare_answers(expected, got, questions)]


def _compare_rows(before: ShardedDataset, now: ShardedDataset) -> Iterator[str]:
    for shard in range(before.shards):
        name, wanted, marker = part_name(shard), before.read_marker(shard), now.read_marker(shard)
        if wanted is None or marker is None:
            yield f"{name}: no marker"
            continue
        if not before.read(shard).equals(now.read(shard)):
            yield f"{name}: other rows"
        failures = before.read_failures(shard), now.read_failures(shard)
        if (failures[0] is None) != (failures[1] is None) or (failures[0] and not failures[0].equals(failures[1])):
            yield f"{name}: other failures"
        if (wanted.rows, wanted.failures, wanted.checksum) != (marker.rows, marker.failures, marker.checksum):
            yield f"{name}: its marker tells something else"


def _find_repeated(dataset: ShardedDataset) -> Iterator[str]:
    counts = Counter(
        image_id
        for shard in range(dataset.shards)
        for image_id in dataset.read(shard, ["image_id"])["image_id"].to_pylist()
    )
    yield from (f"image {image_id} is there {count} times" for image_id, count in counts.items() if count > 1)


def _find_strangers(dataset: ShardedDataset) -> Iterator[str]:
    """Files that are neither a part nor beside one: half-written ones above all."""
    parts = {f"{part_name(shard)}.parquet" for shard in range(dataset.shards)}
    beside = {DESCRIPTION_FILE, SUCCESS_FILE, MARKERS_FOLDER, FAILURES_FOLDER, TEMPORARY_FOLDER}
    yield from (f"{name}: a file too many" for name in dataset.folder.list() if name not in parts | beside)
    yield from (f"{name}: missing" for name in parts - set(dataset.folder.list()))


def _compare_files(description: IndexDescription, expected: Path, got: Path) -> Iterator[str]:
    for name in description.files:
        if not (got / name).exists():
            yield f"{name}: missing"
        elif (got / name).is_file() and (got / name).read_bytes() != (expected / name).read_bytes():
            yield f"{name}: other content"


def _compare_answers(expected: Path, got: Path, questions: list[str]) -> Iterator[str]:
    indexes = captionlib.search.open(expected), captionlib.search.open(got)
    for question in questions:
        answers = [index.search_text(question, limit=len(index)) for index in indexes]
        if not answers[0].equals(answers[1]):
            yield f"{question!r}: expected {answers[0].num_rows} rows, got {answers[1].num_rows}, or others"
