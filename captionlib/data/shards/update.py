"""Replaces several shards of a dataset atomically.

    folder/
      __update/ID/                    new shards: the same files as in a dataset
      __shards/part-00000.json        marker: records that a shard is complete, with the checksums of its files
      _update.json                    journal: names the new shards

The new shards are written to `__update`, committed by writing the journal, and then moved into place. If the process
dies before the commit, the next update removes the new shards. If it dies later, `open_dataset` moves the remaining
shards. Several processes may do this at once, because moving a shard again has no effect.
"""

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from captionlib.data.shards.dataset import ShardedDataset, open_dataset
from captionlib.data.shards.markers import (
    DESCRIPTION_FILE,
    FAILURES_FOLDER,
    JOURNAL_FILE,
    MARKERS_FOLDER,
    UPDATE_FOLDER,
    Marker,
    from_json_with_checksum,
    part_name,
    read_marker,
    to_json_with_checksum,
    write_marker,
)
from captionlib.errors import DatasetError
from captionlib.storage.folders import Folder

__all__ = ["complete_update", "drop_uncommitted_updates", "update_shards"]


@contextmanager
def update_shards(dataset: ShardedDataset, shards: int, **changes: Any) -> Iterator[ShardedDataset]:
    """Yields a staging dataset. The shards written to it replace those of `dataset` when the block ends.

    Shards that are not written stay as they are. If the block raises, nothing changes.

    Example:
        >>> with update_shards(dataset, shards=dataset.shards) as staged:
        ...     with write_shard(staged, 3, rows.num_rows) as writer:
        ...         writer.write(rows)

    Args:
        dataset: the dataset. It stays complete if it is.
        shards: number of shards after the update. Each of them must be written in the block or exist already.
        changes: new values of `config`, of `fingerprint` (hash of everything that determines the rows), or of
            `compaction_id` (id of the compaction that divided the images into these shards). A new fingerprint
            requires that all shards are written.

    Raises:
        DatasetError: a different update of the dataset was committed at the same time.
    """
    folder = dataset.folder
    checksum_before = dataset.compute_content_checksum()
    drop_uncommitted_updates(folder)
    update_id = uuid.uuid4().hex
    staging = Folder(folder.address(f"{UPDATE_FOLDER}/{update_id}"))
    staged = replace(dataset, folder=staging, shards=max(shards, dataset.shards), **changes)
    was_complete = dataset.is_complete()
    try:
        yield staged
        written = {part_name(shard): _join_checksums(marker) for shard, marker in sorted(staged.read_markers().items())}
        staged_files = [*staging.list(), *staging.list(MARKERS_FOLDER)]
        if written.keys() != {name.partition(".")[0] for name in staged_files if name.startswith("part-")}:
            raise DatasetError(
                f"{staging.uri} was changed or removed while it was being written; run the command again"
            )
        if folder.exists(JOURNAL_FILE) or open_dataset(folder.uri).compute_content_checksum() != checksum_before:
            raise DatasetError(
                f"{folder.uri}: another command updated this dataset at the same time; run this one again"
            )
    except BaseException:
        folder.remove(f"{UPDATE_FOLDER}/{update_id}")
        raise
    journal = {
        "id": update_id,
        "written": written,
        "previous_shards": dataset.shards,
        "complete": was_complete,
        "description": {"shards": shards, **changes},
    }
    folder.write(JOURNAL_FILE, to_json_with_checksum(journal))
    complete_update(folder)


def drop_uncommitted_updates(folder: Folder) -> None:
    """Removes the staged shards of updates that were interrupted before their commit."""
    if not folder.exists(JOURNAL_FILE):
        folder.remove(UPDATE_FOLDER)


def complete_update(folder: Folder) -> None:
    """Moves the shards of a committed update into place, if there is one.

    Raises:
        DatasetError: the journal is damaged, or staged shards are missing.
    """
    try:
        content = folder.read(JOURNAL_FILE)
    except FileNotFoundError:
        return
    journal = _decode_journal(folder, content)
    staging = f"{UPDATE_FOLDER}/{journal['id']}"
    _require_staged(folder, staging, journal["written"])
    for name, checksums in journal["written"].items():
        _move_shard(folder, staging, name, checksums)
    old = from_json_with_checksum(folder.read(DESCRIPTION_FILE))
    if (new := {**old, **journal["description"]}) != old:
        folder.write(DESCRIPTION_FILE, to_json_with_checksum(new))
    dataset = open_dataset(folder.uri, complete_update=False)
    for shard in range(dataset.shards, journal["previous_shards"]):
        dataset.remove_shard(shard)
    if journal["complete"]:
        _finish(dataset)
    folder.remove_if_equal(JOURNAL_FILE, content)  # another process may have completed this update, and begun the next
    drop_uncommitted_updates(folder)


def _finish(dataset: ShardedDataset) -> None:
    try:
        dataset.finish(max_failure_ratio=1.0)
    except DatasetError:
        if not dataset.folder.exists(DESCRIPTION_FILE):
            raise
        dataset.mark_incomplete()  # a job is replacing a shard, and marks the dataset as complete at its end


def _decode_journal(folder: Folder, content: bytes) -> dict[str, Any]:
    try:
        journal = from_json_with_checksum(content)
        if missing := {"id", "written", "previous_shards", "complete", "description"} - journal.keys():
            raise ValueError(f"expected the keys {', '.join(sorted(missing))}, got none")
    except ValueError as error:
        raise DatasetError(
            f"{folder.address(JOURNAL_FILE)} is damaged ({error!r}); write the dataset again with --overwrite"
        ) from error
    return journal


def _require_staged(folder: Folder, staging: str, written: dict[str, str]) -> None:
    """Raises DatasetError if a shard of the update is neither staged nor in place.

    If no shard is in place, the update is dropped before the error is raised. `written` contains the checksums of the
    new files of each shard, by its part name, such as `part-00000`.
    """
    moved, missing = [], []
    for name, checksums in written.items():
        current = read_marker(folder, f"{MARKERS_FOLDER}/{name}.json")
        if current is not None and _join_checksums(current) == checksums:
            moved.append(name)
        elif read_marker(folder, f"{staging}/{MARKERS_FOLDER}/{name}.json") is None:
            missing.append(name)
    if missing and not moved:
        folder.remove_file(JOURNAL_FILE)
    if missing:
        raise _missing_shard_error(folder, staging, missing[0])


def _missing_shard_error(folder: Folder, staging: str, name: str) -> DatasetError:
    return DatasetError(
        f"{folder.address(staging)}: expected the new version of {name}, got no file, probably because two commands "
        "updated this dataset at the same time; run this command again"
    )


def _move_shard(folder: Folder, staging: str, name: str, checksums: str) -> None:
    """Moves a staged shard into place. While its files are moved, the marker describes the old and the new version."""
    new = read_marker(folder, f"{staging}/{MARKERS_FOLDER}/{name}.json")
    current = read_marker(folder, f"{MARKERS_FOLDER}/{name}.json")
    if new is None and (current is None or _join_checksums(current) != checksums):
        raise _missing_shard_error(folder, staging, name)
    if new is None or current == new:
        return  # the shard has been moved already
    if current is not None and _join_checksums(current) != _join_checksums(new):
        write_marker(folder, replace(new, previous=replace(current, previous=None)))
    folder.move(f"{staging}/{name}.parquet", f"{name}.parquet")
    failures = f"{FAILURES_FOLDER}/{name}.parquet"
    if new.failures:
        folder.move(f"{staging}/{failures}", failures)
    else:
        folder.remove_file(failures)
    write_marker(folder, new)


def _join_checksums(marker: Marker) -> str:
    return f"{marker.checksum} {marker.failures_checksum}"
