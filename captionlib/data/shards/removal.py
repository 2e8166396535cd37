"""Removes images from datasets.

A manifest is the dataset of image paths and reference captions that all other datasets are made from. A file in its
folder lists hashes of the ids of removed images, so that later updates do not add them again. A marker is the file that
records that a shard is complete; it contains the checksum of the input shard.
"""

import hashlib
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from captionlib.data.shards.dataset import ShardedDataset, open_dataset
from captionlib.data.shards.markers import (
    DESCRIPTION_FILE,
    REMOVED_FILE,
    SAMPLE_FOLDER,
    STALE,
    from_json_with_checksum,
    to_json_with_checksum,
)
from captionlib.data.shards.update import drop_uncommitted_updates, update_shards
from captionlib.data.shards.writer import write_shard
from captionlib.errors import DamagedShardError, DatasetError
from captionlib.storage.folders import Folder

__all__ = ["Removal", "RemovedImages", "copy_removed_ids_to_new_manifests", "list_removed", "plan_removal"]


@dataclass(frozen=True)
class RemovedImages:
    """The removed images of a manifest.

    Attributes:
        reasons: reason and date of each removal, by the hash of the image id.
    """

    reasons: Mapping[str, tuple[str, str]]

    def __contains__(self, image_id: str) -> bool:
        return bool(self.reasons) and _hash_id(image_id) in self.reasons


def list_removed(folder: Folder) -> RemovedImages:
    """Reads the list of removed images of a manifest.

    Raises:
        DatasetError: the list is damaged.
    """
    try:
        images = from_json_with_checksum(folder.read(REMOVED_FILE))["images"]
        return RemovedImages({digest: (image["reason"], image["date"]) for digest, image in images.items()})
    except (FileNotFoundError, NotADirectoryError):
        return RemovedImages({})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DatasetError(
            f"{folder.address(REMOVED_FILE)} is damaged ({error!r}); restore it from a copy, or delete it and remove "
            "the images again"
        ) from error


def copy_removed_ids_to_new_manifests(manifests: Sequence[Folder]) -> None:
    """Copies the removed ids that all existing manifests have in common to the manifests that do not exist yet."""
    is_new = [not folder.exists(DESCRIPTION_FILE) for folder in manifests]
    lists = [list_removed(folder).reasons for folder, new in zip(manifests, is_new, strict=True) if not new]
    if not lists:
        return
    shared = {digest: lists[0][digest] for digest in set.intersection(*map(set, lists))}
    for folder, new in zip(manifests, is_new, strict=True):
        if new and shared:
            _write_list(folder, shared)


def _write_list(folder: Folder, removed: Mapping[str, tuple[str, str]]) -> None:
    images = {digest: {"reason": reason, "date": date} for digest, (reason, date) in removed.items()}
    folder.write(REMOVED_FILE, to_json_with_checksum({"images": images}))


def _hash_id(image_id: str) -> str:
    return hashlib.sha256(image_id.encode()).hexdigest()


@dataclass(frozen=True)
class Removal:
    """The shards of a dataset that contain images to remove; created by `plan_removal`.

    Attributes:
        dataset: the dataset.
        image_ids: ids of the images to remove.
        is_current: for each shard with images to remove, whether it was made from the current version of its input.
        found: those of `image_ids` that the dataset contains, as rows or as failures (unreadable images).
        uris: paths and URLs of the images in `found`.
        reason: why the images are removed; stored in the list of a manifest.
        unreadable: unreadable unfinished shards, which are removed because they may contain the images.
    """

    dataset: ShardedDataset
    image_ids: pa.StringArray
    is_current: Mapping[int, bool]
    found: frozenset[str]
    uris: frozenset[str]
    reason: str
    unreadable: tuple[int, ...] = ()

    def run(self) -> None:
        """Removes the images from all shards atomically. Run this for a manifest before the datasets made from it."""
        dataset = self.dataset
        if dataset.kind == "manifest":
            self._add_to_list()
        _remove_unfinished_files(dataset.folder)
        for shard in self.unreadable:
            dataset.remove_shard(shard)
        if dataset.kind == "duplicates":
            for shard in self.is_current:
                dataset.remove_shard(shard)  # the groups may change; `captionlib deduplicate` writes the shard again
        elif self.is_current:
            source = open_dataset(dataset.source) if dataset.source else None
            with update_shards(dataset, dataset.shards) as staged:
                for shard in self.is_current:
                    self._rewrite(staged, shard, "" if source is None else self._find_input_checksum(source, shard))

    def _find_input_checksum(self, source: ShardedDataset, shard: int) -> str:
        marker = source.read_marker(shard)
        return marker.checksum if self.is_current[shard] and marker is not None else STALE

    def _rewrite(self, staged: ShardedDataset, shard: int, input_checksum: str) -> None:
        rows = self.dataset.read(shard)
        rows = rows.filter(pc.invert(pc.is_in(rows["image_id"], value_set=self.image_ids)))
        failures = self.dataset.read_failures(shard)
        kept = [] if failures is None else [row for row in failures.to_pylist() if row["image_id"] not in self.found]
        marker = self.dataset.read_marker_even_if_unfinished(shard)
        earlier_seconds = marker.total_seconds if marker is not None else 0.0
        with write_shard(staged, shard, rows.num_rows + len(kept), input_checksum, earlier_seconds) as writer:
            writer.write(rows)
            writer.failures += kept

    def _add_to_list(self) -> None:
        folder = self.dataset.folder
        date = time.strftime("%Y-%m-%d", time.gmtime())
        removed = {_hash_id(image_id): (self.reason, date) for image_id in self.image_ids.to_pylist()}
        _write_list(folder, {**list_removed(folder).reasons, **removed})


def _remove_unfinished_files(folder: Folder) -> None:
    """Removes what killed commands left, because it may contain removed images."""
    folder.remove(SAMPLE_FOLDER)
    folder.remove_temporary_files()
    drop_uncommitted_updates(folder)


def plan_removal(dataset: ShardedDataset, image_ids: Collection[str], reason: str = "") -> Removal:
    """Finds the shards that contain images to remove. Call this for all datasets before running any of the removals.

    Args:
        dataset: a dataset of any kind.
        image_ids: ids of the images.
        reason: why the images are removed; stored in the list of a manifest.

    Raises:
        DamagedShardError: the dataset is complete, but a marker is missing or damaged, so images might be overlooked.
    """
    wanted = pa.array(sorted(image_ids), pa.string())
    markers = dataset.require_markers()
    source = None
    if dataset.source and dataset.kind != "duplicates":
        source = open_dataset(dataset.source).require_markers()
    is_current: dict[int, bool] = {}
    found: set[str] = set()
    uris: set[str] = set()
    unreadable: list[int] = []
    for shard in sorted(dataset.list_stored_shards()):
        marker = markers.get(shard)
        try:
            matches = _find(dataset, shard, wanted)
        except DamagedShardError:
            if marker is not None:
                raise
            unreadable.append(shard)
            continue
        if matches:
            found.update(image_id for image_id, _ in matches)
            uris.update(uri for _, uri in matches)
            is_current[shard] = marker is not None and (
                source is None or (shard in source and source[shard].checksum == marker.input_checksum)
            )
    return Removal(dataset, wanted, is_current, frozenset(found), frozenset(uris), reason, tuple(unreadable))


def _find(dataset: ShardedDataset, shard: int, wanted: pa.StringArray) -> list[tuple[str, str]]:
    """Returns the ids and URIs of the wanted images in a shard."""
    columns = [name for name in ("image_id", "uri") if name in dataset.schema.names]
    tables = [dataset.read(shard, columns)]
    if (failures := dataset.read_failures(shard)) is not None:
        tables.append(failures.select(columns))
    matches: list[tuple[str, str]] = []
    for table in tables:
        selected = table.filter(pc.is_in(table["image_id"], value_set=wanted))
        uris: Sequence[str] = selected["uri"].to_pylist() if "uri" in columns else [""] * selected.num_rows
        matches += zip(selected["image_id"].to_pylist(), uris, strict=True)
    return matches
