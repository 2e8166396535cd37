"""Builds a search index: plans the build, trains centroids, adds shards in parallel, and publishes the result.

A shard is one Parquet file of captions, with the embeddings of the same images. Every step can run on any machine and
can safely be repeated.
"""

import os
import shutil
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, fields, replace
from datetime import datetime, timezone
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from captionlib.config import describe_differences, to_dict
from captionlib.data.selection import hash_ids, read_kept_images
from captionlib.data.shards.dataset import ShardedDataset, open_dataset
from captionlib.data.shards.markers import Marker, from_json_with_checksum, part_name, to_json_with_checksum
from captionlib.errors import ConfigError, DatasetError, DuplicateIdError, FingerprintError
from captionlib.search.config import IndexConfig, VectorLayout
from captionlib.search.filters import FacetGrouper
from captionlib.search.index_folder import (
    SUBFOLDERS,
    IndexDescription,
    IndexedDataset,
    IndexedDuplicates,
    IndexedShard,
    InputShard,
    check_hash,
    fetch_path,
    hash_json,
    is_index_file,
    publish_path,
    read_description,
    temporary_folder,
    write_description,
)
from captionlib.search.inputs import (
    ManifestShards,
    check_datasets_match,
    check_same_ranker,
    find_kept_rows,
    find_manifest,
    match_embeddings_to_captions,
    open_shard,
    read_caption_rows,
    read_details,
    read_embeddings,
    sample_embeddings,
)
from captionlib.search.rows import (
    find_repeated_id,
    number_rows,
    read_rows,
    write_details,
    write_failures,
    write_rows,
)
from captionlib.search.text_index import write_text_index
from captionlib.search.vector_index import RowMove, merge_indexes, write_partial_index, write_trained_index
from captionlib.storage.folders import TEMPORARY_FOLDER, Addresses, Folder, list_addresses, resolve_address

__all__ = ["IndexBuild", "plan_build"]

_TRAINING_VECTORS_PER_LIST = 50
_MIN_TRAINING_VECTORS = 20_000  # a product quantizer learns 256 codes per byte, regardless of the number of lists


@dataclass(frozen=True)
class IndexBuild:
    """A planned build. It can be pickled, so workers can run its steps. A step does nothing if it is already done."""

    folder: Folder  # of the index
    captions: tuple[ShardedDataset, ...]
    embeddings: tuple[ShardedDataset, ...]  # in the order of the captions; empty if the index is text-only
    config: IndexConfig
    duplicates: IndexedDuplicates | None = None
    # For each captions dataset, the manifest (table of images and references) that it was generated from; None if it is
    # missing, or if the index contains no references.
    manifests: tuple[ManifestShards | None, ...] = ()
    shards: tuple[InputShard, ...] = ()  # all shards of the index, in the order of their rows
    base: IndexDescription | None = None  # version whose files are reused; None to build the index from scratch
    added: tuple[int, ...] = ()  # positions in `shards` of the shards that `base` does not contain
    removed: int = 0  # number of shards that only `base` contains
    pending: int = 0  # number of unfinished shards; their earlier rows, if any, stay in the index
    layout: VectorLayout | None = None  # None if the index is text-only
    replaced_layout: VectorLayout | None = None  # layout of the existing index if it does not suit the number of rows
    overwritten: str | None = None  # creation time of the index that is replaced because of `overwrite`

    @cached_property
    def fingerprint(self) -> str:
        """Hash of everything that determines the search results."""
        identity = {
            "captions": [dataset.fingerprint for dataset in self.captions],
            "embeddings": [dataset.fingerprint for dataset in self.embeddings],
            "config": to_dict(self.config),
            "layout": to_dict(self.layout) if self.layout else None,
            "shards": [asdict(shard) for shard in self.shards],
            "duplicates": self.duplicates and self.duplicates.checksum,
        }
        return hash_json(identity)

    def is_done(self) -> bool:
        """Returns whether the folder already contains the result of this build."""
        current = self._read_current()
        return current is not None and current.fingerprint == self.fingerprint and current.created != self.overwritten

    def train(self) -> None:
        """Trains the centroids of the inverted lists, unless those of `base` are used."""
        if self.layout is None or self.base is not None or self.folder.exists(self._trained_file):
            return
        count = max(self.layout.nlist * _TRAINING_VECTORS_PER_LIST, _MIN_TRAINING_VECTORS)
        sample = sample_embeddings([(self.embeddings[shard.dataset], shard) for shard in self.shards], count)
        with self.folder.stage(self._trained_file) as path:
            write_trained_index(self.layout, sample, path)

    def add_shard(self, position: int) -> None:
        """Writes the rows and the partial vector index of the shard `shards[position]`."""
        if self._read_result(position) is not None:
            return
        shard = self.shards[position]
        captions = self.captions[shard.dataset]
        with temporary_folder(self.folder) as local, open_shard(captions, shard.shard, shard.captions) as caption_file:
            kept_images = _read_kept_images(self.duplicates)
            kept = find_kept_rows(caption_file, () if self.config.keep_duplicates else kept_images)
            if kept.sum() != shard.rows:
                raise _changed_error(self.duplicates)
            write_rows(local / "rows", read_caption_rows(caption_file, kept, kept_images))
            manifest = self.manifests[shard.dataset] if shard.manifest else None
            references = None if manifest is None else manifest.read_references(shard.shard)
            write_details(local / "details", read_details(caption_file, kept, references))
            files = {
                "rows_file": publish_path(self.folder, local / "rows", "rows/", ".arrow"),
                "details_file": publish_path(self.folder, local / "details", "details/", ".arrow"),
                "failures_file": "",
            }
            if failures := captions.read_failures(shard.shard):
                write_failures(local / "failures", failures)
                files["failures_file"] = publish_path(self.folder, local / "failures", "failures/", ".arrow")
            if self.embeddings:
                self._write_partial_index(position, caption_file, kept, local)
        # The shard is done when this file exists.
        self.folder.write(self._result_file(position), to_json_with_checksum(files))

    def _read_result(self, position: int) -> dict[str, str] | None:
        """Returns the files of a shard; None if the shard is not done, a file is missing or the result is damaged."""
        try:
            files: dict[str, str] = from_json_with_checksum(self.folder.read(self._result_file(position)))
        except (FileNotFoundError, ValueError):
            return None
        needed = [*files.values(), self._partial_file(position)] if self.embeddings else files.values()
        return files if all(self.folder.exists(name) for name in needed if name) else None

    def _write_partial_index(
        self, position: int, caption_file: pq.ParquetFile, kept: npt.NDArray[np.bool_], local: Path
    ) -> None:
        shard = self.shards[position]
        captions, embeddings = self.captions[shard.dataset], self.embeddings[shard.dataset]
        with (
            open_shard(embeddings, shard.shard, shard.embeddings) as embedding_file,
            self.folder.stage(self._partial_file(position)) as path,
        ):
            positions = match_embeddings_to_captions(captions, embeddings, shard.shard, caption_file, embedding_file)
            is_indexed = (positions >= 0) & np.append(kept, False)[positions]  # position -1 selects the appended False
            vectors = read_embeddings(embedding_file)[is_indexed]
            name = self._trained_file
            trained = self._fetch(name, local) if self.base else fetch_path(self.folder, name, local / "trained")
            start = sum(each.rows for each in self.shards[:position])
            rows = np.cumsum(kept)[positions[is_indexed]] - 1
            write_partial_index(trained, rows + start, vectors, path)

    def finish(self) -> None:
        """Merges the shards, publishes the index, and removes the files of interrupted builds and older versions.

        Raises:
            DuplicateIdError: two rows have the same image id.
            DatasetError: a file of `base` is damaged, or a concurrent build has removed files of this one.
        """
        if self.is_done():
            self.remove_unused_files()
            return
        previous = self._read_current()
        try:
            description = self._merge()
        except FileNotFoundError as error:
            raise DatasetError(
                f"{self.folder.uri}: {error.filename or error} is missing; a concurrent build may have removed it; "
                "run one build at a time"
            ) from error
        previous_files = set(previous.files if previous else ()) - set(description.files)
        write_description(self.folder, replace(description, previous=tuple(sorted(previous_files))))
        self.remove_unused_files()

    def remove_unused_files(self) -> None:
        """Removes the files of interrupted builds, and of versions before the previous one."""
        current = self._read_current()
        used = {*current.files, *current.previous} if current is not None else set()
        names = [name for name in self.folder.list() if is_index_file(name) and "-" in name]  # without index.json
        names += [f"{subfolder}/{name}" for subfolder in SUBFOLDERS for name in self.folder.list(subfolder)]
        for name in [TEMPORARY_FOLDER, *(name for name in names if name not in used)]:
            self.folder.remove(name)

    def remove_previous_version(self) -> None:
        """Removes the files of the previous version immediately, even if a reader is opening it."""
        current = self._read_current()
        if current is not None and current.previous:
            write_description(self.folder, replace(current, previous=()))
        self.remove_unused_files()

    def _merge(self) -> IndexDescription:
        shards = self._list_indexed_shards()
        text = vectors = trained = ""
        vectors_count = 0
        grouper = FacetGrouper()
        with temporary_folder(self.folder) as local:
            files = [self._fetch(shard.rows_file, local) for shard in shards]
            self._check_unique_ids(files, shards)
            batches = (
                batch
                for file, shard in zip(files, shards, strict=True)
                for batch in grouper.add_group_numbers(shard.dataset, read_rows(file))
            )
            write_text_index(local / "text", self.config.language, number_rows(batches))
            text = publish_path(self.folder, local / "text", "text-")
            if self.layout is not None:
                vectors_count = self._merge_partial_indexes(local)
                vectors = publish_path(self.folder, local / "vectors", "vectors-", ".faiss")
                trained = self._trained_file
                if self.base is None:
                    # Copied, because a second run of this step needs the original.
                    path = shutil.copyfile(fetch_path(self.folder, trained, local / "trained"), local / "copy")
                    trained = publish_path(self.folder, path, "trained-", ".faiss")
        return IndexDescription(
            fingerprint=self.fingerprint,
            created=datetime.now(timezone.utc).isoformat(),
            config=self.config,
            captions=tuple(map(_describe_dataset, self.captions)),
            embeddings=tuple(map(_describe_dataset, self.embeddings)),
            layout=self.layout,
            shards=tuple(shards),
            groups=grouper.groups,
            captions_count=sum(shard.rows for shard in shards),
            vectors_count=vectors_count,
            text=text,
            vectors=vectors,
            trained=trained,
            duplicates=self.duplicates,
        )

    def _list_indexed_shards(self) -> list[IndexedShard]:
        base = {shard.content: shard for shard in self.base.shards} if self.base else {}
        results = {
            position: from_json_with_checksum(self.folder.read(self._result_file(position))) for position in self.added
        }
        return [
            IndexedShard(**asdict(shard), **results[position])
            if position in results
            else replace(base[shard.content], **asdict(shard))
            for position, shard in enumerate(self.shards)
        ]

    def _merge_partial_indexes(self, local: Path) -> int:
        moves = []
        if self.base is not None:
            base = self._fetch(self.base.vectors, local)
            starts = {shard.content: start for shard, start in zip(self.base.shards, self.base.first_rows, strict=True)}
            added = set(self.added)
            new_start = 0
            for position, shard in enumerate(self.shards):
                if position not in added and shard.rows:
                    start = starts[shard.content]
                    moves.append(RowMove(start, start + shard.rows, new_start))
                new_start += shard.rows
        else:
            base = fetch_path(self.folder, self._trained_file, local / "trained")
        parts = (
            fetch_path(self.folder, self._partial_file(position), local / f"{position}.faiss")
            for position in self.added
        )
        return merge_indexes(base, moves, parts, local / "vectors")

    def _fetch(self, name: str, local: Path) -> Path:
        return check_hash(fetch_path(self.folder, name, local / name), name, self.folder.address(name))

    def _check_unique_ids(self, files: Sequence[Path], shards: Sequence[IndexedShard]) -> None:
        repeated = find_repeated_id(files)
        if repeated is None:
            return
        image_id, count = repeated
        datasets = {
            shard.dataset
            for file, shard in zip(files, shards, strict=True)
            if any(pc.any(pc.equal(rows["image_id"], image_id)).as_py() for rows in read_rows(file))
        }
        folders = " and ".join(self.captions[dataset].folder.uri for dataset in sorted(datasets))
        advice = "write this dataset again from images with different ids"
        if len(datasets) > 1:
            advice = "remove the image from all datasets but one"
        raise DuplicateIdError(f"expected one row per image id in {folders}, got {count} with {image_id!r}; {advice}")

    def _read_current(self) -> IndexDescription | None:
        try:
            return read_description(self.folder)
        except DatasetError:
            if self.base is None:  # a damaged index that is being replaced
                return None
            raise

    @property
    def _trained_file(self) -> str:
        return self.base.trained if self.base else f"{self._temporary}/trained.faiss"

    @cached_property
    def _temporary(self) -> str:
        # An interrupted build is resumed only if its partial indexes have the same centroids.
        trained = self.base and self.base.trained
        identity = {"fingerprint": self.fingerprint, "base": trained, "replaced": self.overwritten}
        return f"{TEMPORARY_FOLDER}/{hash_json(identity)[:12]}"

    def _partial_file(self, position: int) -> str:
        return f"{self._temporary}/{part_name(position)}.faiss"

    def _result_file(self, position: int) -> str:
        """The JSON file that lists the published files of a shard. It is written last."""
        return f"{self._temporary}/{part_name(position)}.json"


def plan_build(
    captions: Addresses,
    embeddings: Addresses | None,
    output: str | os.PathLike[str],
    config: IndexConfig,
    *,
    duplicates: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    removed_ids: Collection[str] = (),
) -> IndexBuild:
    """Compares an index with the datasets it is built from and plans what to build.

    The plan covers the shards that are finished in both captions and embeddings. Unchanged shards of an existing index
    are reused. While a shard is not finished, the index keeps its earlier rows, unless they contain an image in
    `removed_ids`. If `overwrite` is True, the index is built from scratch.

    `duplicates` is a dataset of groups of similar images. Only the kept image of each group is indexed. If
    `config.keep_duplicates` is set, the others are indexed too, and marked as its duplicates.

    Raises:
        ConfigError: the numbers of captions and embeddings datasets differ.
        DatasetError: a dataset is missing or has no finished shard, captions and embeddings cover different images, or
            `output` contains other files.
        FingerprintError: the index has different datasets or a different configuration, and `overwrite` is False.
    """
    captions_datasets = tuple(open_dataset(address, "captions") for address in list_addresses(captions))
    embeddings_datasets = tuple(open_dataset(address, "embeddings") for address in list_addresses(embeddings or []))
    if embeddings_datasets and len(embeddings_datasets) != len(captions_datasets):
        raise ConfigError(
            f"expected one embeddings dataset for each of {len(captions_datasets)} captions datasets, in the same "
            f"order, got {len(embeddings_datasets)}"
        )
    manifests = tuple(find_manifest(dataset) if config.references else None for dataset in captions_datasets)
    build = IndexBuild(Folder(output), captions_datasets, embeddings_datasets, config, manifests=manifests)
    if duplicates is not None:
        dataset = open_dataset(duplicates, "duplicates").require_complete()
        indexed_duplicates = IndexedDuplicates(resolve_address(dataset.folder.uri), dataset.compute_content_checksum())
        build = replace(build, duplicates=indexed_duplicates)
    base = _read_base(build, overwrite)
    if overwrite and base is not None:
        build, base = replace(build, overwritten=base.created), None
    shards = _apply_duplicates(build, base, _list_shards(build))
    pending = sum(dataset.shards for dataset in captions_datasets) - len(shards)
    for captions_dataset, embeddings_dataset in zip(captions_datasets, embeddings_datasets, strict=False):
        check_datasets_match(captions_dataset, embeddings_dataset)
    check_same_ranker(embeddings_datasets)
    if embeddings_datasets:
        _check_first_shard(build, shards[0])  # before workers start; `add_shard` checks the others
    if base is not None:
        shards = _keep_unfinished(build, base, shards, removed_ids)
    return _plan_shards(replace(build, pending=pending), base, shards)


def _read_base(build: IndexBuild, overwrite: bool) -> IndexDescription | None:
    """Returns the existing index, or None. Checks that the build may update or replace it."""
    folder = build.folder
    try:
        base = read_description(folder)
    except DatasetError:
        if overwrite:
            return None
        raise
    if base is None and (others := [name for name in folder.list() if not is_index_file(name)]):
        raise DatasetError(
            f"{folder.uri} contains files that are not part of an index ({', '.join(others[:3])}); choose a new folder"
        )
    if base is not None and not overwrite and (changes := _compare_with_base(build, base)):
        raise FingerprintError(
            f"{folder.uri} is an index with different datasets or configuration ({'; '.join(changes)}); "
            "choose a different folder, or pass --overwrite to replace the index"
        )
    return base


def _list_shards(build: IndexBuild) -> list[InputShard]:
    """Lists the shards that are finished in both the captions and the embeddings."""
    shards = []
    for index, captions in enumerate(build.captions):
        embeddings = build.embeddings[index] if build.embeddings else None
        markers = captions.require_markers()  # a marker is a JSON file that records that a shard is complete
        embedding_markers: dict[int, Marker] = embeddings.require_markers() if embeddings else {}
        complete = sorted(markers.keys() & embedding_markers.keys() if embeddings else markers)
        manifest = build.manifests[index]
        for shard in complete:
            marker = markers[shard]
            shards.append(
                InputShard(
                    dataset=index,
                    shard=shard,
                    rows=marker.rows,
                    captions=marker.checksum,
                    embeddings=embedding_markers[shard].checksum if embeddings else "",
                    failures=marker.failures_checksum,
                    manifest=manifest.checksums.get(shard, "") if manifest else "",
                )
            )
        if not complete:
            folders = f"both {captions.folder.uri} and {embeddings.folder.uri}" if embeddings else captions.folder.uri
            raise DatasetError(f"expected shards that are complete in {folders}, got none; finish writing them first")
    return shards


@lru_cache(maxsize=1)
def _read_kept_images(duplicates: IndexedDuplicates | None) -> dict[str, str]:
    """Returns the id of the kept image for each duplicate. Each process reads the dataset once."""
    if duplicates is None:
        return {}
    dataset = open_dataset(duplicates.folder, "duplicates").require_complete()
    if dataset.compute_content_checksum() != duplicates.checksum:
        raise _changed_error(duplicates)
    return read_kept_images(dataset)


def _changed_error(duplicates: IndexedDuplicates | None) -> DatasetError:
    name = "the captions" if duplicates is None else duplicates.folder
    return DatasetError(f"{name} changed while the index was being built; run the command again")


def _apply_duplicates(
    build: IndexBuild, base: IndexDescription | None, shards: Sequence[InputShard]
) -> list[InputShard]:
    """Sets the hash of the duplicates in each shard, and subtracts the left-out images from its number of rows."""
    kept_images = _read_kept_images(build.duplicates)
    if not kept_images:
        return list(shards)
    indexed = {}
    if base is not None and base.duplicates == build.duplicates:
        indexed = {shard.captions: shard for shard in base.shards}
    changed = []
    for shard in shards:
        if shard.captions in indexed:
            known = indexed[shard.captions]
            changed.append(replace(shard, rows=known.rows, duplicates=known.duplicates))
            continue
        ids = build.captions[shard.dataset].read(shard.shard, ["image_id"])["image_id"]
        found = kept_images.keys() & set(ids.to_pylist())
        if not found:
            changed.append(shard)
        elif build.config.keep_duplicates:
            changed.append(replace(shard, duplicates=hash_ids(f"{each} {kept_images[each]}" for each in found)))
        else:
            changed.append(replace(shard, duplicates=hash_ids(found), rows=shard.rows - len(found)))
    return changed


def _keep_unfinished(
    build: IndexBuild, base: IndexDescription, shards: Sequence[InputShard], removed_ids: Collection[str]
) -> list[InputShard]:
    """Adds the shards of `base` that are being written again, except those with images in `removed_ids`."""
    finished = {(shard.dataset, shard.shard) for shard in shards}
    names = [each.name for each in fields(InputShard)]
    positions = {resolve_address(dataset.folder.uri): position for position, dataset in enumerate(build.captions)}
    kept = []
    for shard in base.shards:
        position = positions.get(base.captions[shard.dataset].folder)
        if (
            position is not None
            and (position, shard.shard) not in finished
            and shard.shard < build.captions[position].shards
            and base.captions[shard.dataset].fingerprint == build.captions[position].fingerprint
            and not _contains(build.folder, shard, removed_ids)
        ):
            kept.append(InputShard(**{**{name: getattr(shard, name) for name in names}, "dataset": position}))
    return sorted([*shards, *kept], key=lambda shard: (shard.dataset, shard.shard))


def _contains(folder: Folder, shard: IndexedShard, image_ids: Collection[str]) -> bool:
    """Returns whether any of the images is in a shard of an index, with or without a caption."""
    if not image_ids:
        return False
    wanted = pa.array(list(image_ids), pa.string())
    with temporary_folder(folder) as local:
        for name in filter(None, (shard.rows_file, shard.failures_file)):
            ids = pa.ipc.open_file(pa.memory_map(str(fetch_path(folder, name, local / name)))).read_all()["image_id"]
            if pc.any(pc.is_in(ids, value_set=wanted)).as_py():
                return True
    return False


def _check_first_shard(build: IndexBuild, shard: InputShard) -> None:
    captions, embeddings = build.captions[shard.dataset], build.embeddings[shard.dataset]
    with (
        open_shard(captions, shard.shard, shard.captions) as caption_file,
        open_shard(embeddings, shard.shard, shard.embeddings) as embedding_file,
    ):
        match_embeddings_to_captions(captions, embeddings, shard.shard, caption_file, embedding_file)


def _compare_with_base(build: IndexBuild, base: IndexDescription) -> list[str]:
    """Describes how the configuration and the datasets differ from those of `base`. Additional datasets are allowed."""
    before: dict[str, Any] = to_dict(base.config)
    now: dict[str, Any] = {**to_dict(build.config), "references": base.config.references}  # this setting may change
    for name, indexed, given in (
        ("captions", base.captions, build.captions),
        ("embeddings", base.embeddings, build.embeddings),
    ):
        old, new = ({dataset.fingerprint for dataset in datasets} for datasets in (indexed, given))
        if not old <= new or bool(old) != bool(new):
            before[name], now[name] = (", ".join(sorted(fingerprints)) or None for fingerprints in (old, new))
    return describe_differences(before, now)


def _plan_shards(build: IndexBuild, base: IndexDescription | None, shards: Sequence[InputShard]) -> IndexBuild:
    """Chooses the layout, and finds the shards to add to `base`."""
    rows = sum(shard.rows for shard in shards)
    layout = base.layout if base is not None else None
    replaced_layout = layout if layout is not None and layout.needs_rebuild(build.config, rows) else None
    if replaced_layout is not None:
        base = None
    if base is None and build.embeddings:
        layout = VectorLayout.choose(build.config, rows, build.embeddings[0].schema.field("embedding").type.list_size)
    indexed = {shard.content for shard in base.shards} if base is not None else set[tuple[str, ...]]()
    return replace(
        build,
        shards=tuple(shards),
        base=base,
        added=tuple(position for position, shard in enumerate(shards) if shard.content not in indexed),
        removed=len(indexed - {shard.content for shard in shards}),
        layout=layout,
        replaced_layout=replaced_layout,
    )


def _describe_dataset(dataset: ShardedDataset) -> IndexedDataset:
    return IndexedDataset(resolve_address(dataset.folder.uri), dataset.fingerprint, dataset.shards, dataset.config)
