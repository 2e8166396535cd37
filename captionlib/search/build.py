"""Builds a search index: plans the build, trains centroids, adds shards in parallel, and publishes the result.

Every step can run on any machine and can safely be repeated.
"""

import os
import time
from dataclasses import dataclass, replace
from pathlib import Path

from captionlib.config import describe_differences, to_dict
from captionlib.data.shards.dataset import ShardedDataset, open_dataset
from captionlib.data.shards.markers import Marker, compute_fingerprint, part_name
from captionlib.errors import DatasetError, FingerprintError
from captionlib.search.config import IndexConfig, VectorLayout
from captionlib.search.index_folder import (
    DESCRIPTION,
    IndexDescription,
    IndexedDataset,
    IndexedShard,
    fetch_path,
    publish_path,
    read_description,
    temporary_folder,
    write_description,
)
from captionlib.search.inputs import (
    check_datasets_match,
    match_embeddings_to_captions,
    read_embeddings,
    sample_embeddings,
)
from captionlib.search.rows import COLUMNS, number_rows, read_rows, write_rows
from captionlib.search.text_index import write_text_index
from captionlib.search.vector_index import add_vectors, merge_vectors, train_vectors
from captionlib.storage.folders import TEMPORARY_FOLDER, Folder, resolve_address

__all__ = ["IndexBuild", "plan_build"]

_BATCH_ROWS = 65_536
_TRAINING_VECTORS_PER_LIST = 50
_MIN_TRAINING_VECTORS = 20_000  # a product quantizer learns 256 codes per byte, regardless of the number of lists

ShardMarkers = dict[int, tuple[Marker, Marker | None]]
"""For each shard, the captions marker and embeddings marker: files that mark the shard as complete."""


@dataclass(frozen=True)
class IndexBuild:
    """A planned build. It can be pickled, so that workers can run its steps. A step that is already done does nothing.

    Attributes:
        folder: the folder of the index.
        captions: a captions dataset, with one row per captioned image.
        embeddings: the embeddings of the same images. If None, the index is text-only.
        base: the version of the index to extend. If None, the index is built from scratch.
        unchanged: shards of `base` that are still valid.
        removed: shards of `base` that are no longer valid.
        added: shards to index.
        layout: the Faiss index type of the embeddings; None for a text-only index.
    """

    folder: Folder
    captions: ShardedDataset
    embeddings: ShardedDataset | None
    config: IndexConfig
    base: IndexDescription | None = None
    unchanged: tuple[IndexedShard, ...] = ()
    removed: tuple[IndexedShard, ...] = ()
    added: tuple[IndexedShard, ...] = ()
    layout: VectorLayout | None = None

    @property
    def fingerprint(self) -> str:
        """Hash of everything that determines the search results."""
        identity = {
            "captions": self.captions.fingerprint,
            "embeddings": self.embeddings.fingerprint if self.embeddings else None,
            "config": to_dict(self.config),
            "layout": to_dict(self.layout) if self.layout else None,
            "shards": [[shard.shard, shard.offset, shard.captions, shard.embeddings] for shard in self._shards],
        }
        return compute_fingerprint("index", identity)

    def is_done(self) -> bool:
        """Returns whether the folder already contains the result of this build."""
        current = read_description(self.folder)
        return current is not None and current.fingerprint == self.fingerprint

    def train(self) -> None:
        """Trains the centroids of the inverted lists, unless `base` already has them."""
        if self.layout is None or self.base is not None or self.folder.exists(self._trained):
            return
        assert self.embeddings is not None, "an index has a layout only if it has embeddings"
        count = max(self.layout.nlist * _TRAINING_VECTORS_PER_LIST, _MIN_TRAINING_VECTORS)
        sample = sample_embeddings(self.embeddings, [shard.shard for shard in self.added], count)
        with self.folder.stage(self._trained) as path:
            train_vectors(self.layout, sample, path)

    def add_shard(self, number: int) -> None:
        """Writes the rows and the partial vector index of the shard `added[number]`.

        Raises:
            DatasetError: the captions and embeddings of the shard cover different images.
        """
        shard = self.added[number]
        if not self.folder.exists(shard.file):
            batches = self.captions.read_batches(shard.shard, COLUMNS, _BATCH_ROWS)
            with self.folder.stage(shard.file) as path:
                write_rows(path, number_rows(batches, shard.offset))
        if self.embeddings is None or self.folder.exists(self._partial(shard)):
            return
        positions = match_embeddings_to_captions(self.captions, self.embeddings, shard.shard)
        has_caption = positions >= 0
        vectors = read_embeddings(self.embeddings, shard.shard)[has_caption]
        with temporary_folder(self.folder) as local, self.folder.stage(self._partial(shard)) as path:
            trained = fetch_path(self.folder, self._trained, local / "trained")
            add_vectors(trained, positions[has_caption] + shard.offset, vectors, path)

    def finish(self) -> None:
        """Merges the shards, publishes the index, and removes files that neither it nor the previous version uses."""
        if self.is_done():
            return
        previous = read_description(self.folder)
        removed = [(shard.offset, shard.end) for shard in self.removed]
        with temporary_folder(self.folder) as local:
            vectors_count = self._merge_vectors(local, removed)
            captions_count = self._write_text_index(local, removed)
        description = self._describe(captions_count, vectors_count)
        previous_files = set(previous.files if previous else ()) - set(description.files)
        write_description(self.folder, replace(description, previous=tuple(sorted(previous_files))))
        self._clean({*description.files, *previous_files})

    def _merge_vectors(self, local: Path, removed: list[tuple[int, int]]) -> int:
        if self.layout is None:
            return 0
        base = self.base.vectors if self.base else self._trained
        parts = (fetch_path(self.folder, self._partial(shard), local / self._partial(shard)) for shard in self.added)
        count = merge_vectors(fetch_path(self.folder, base, local / "base"), parts, removed, local / "vectors")
        publish_path(self.folder, local / "vectors", self._name("vectors", ".faiss"))
        return count

    def _write_text_index(self, local: Path, removed: list[tuple[int, int]]) -> int:
        base = fetch_path(self.folder, self.base.text, local / "text-base") if self.base else None
        files = (fetch_path(self.folder, shard.file, local / shard.file) for shard in self.added)
        rows = (batch for file in files for batch in read_rows(file))
        count = write_text_index(local / "text", self.config.language, rows, base, removed)
        publish_path(self.folder, local / "text", self._name("text"))
        return count

    def _describe(self, captions_count: int, vectors_count: int) -> IndexDescription:
        return IndexDescription(
            fingerprint=self.fingerprint,
            created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            config=self.config,
            captions=_describe_dataset(self.captions),
            embeddings=_describe_dataset(self.embeddings) if self.embeddings else None,
            layout=self.layout,
            shards=self._shards,
            end_row=max([self.base.end_row if self.base else 0, *(shard.end for shard in self._shards)]),
            captions_count=captions_count,
            vectors_count=vectors_count,
            text=self._name("text"),
            vectors=self._name("vectors", ".faiss") if self.layout else "",
            trained=self._trained if self.layout else "",
        )

    @property
    def _shards(self) -> tuple[IndexedShard, ...]:
        return tuple(sorted((*self.unchanged, *self.added), key=lambda shard: shard.offset))

    @property
    def _trained(self) -> str:
        return self.base.trained if self.base else self._name("trained", ".faiss")

    def _name(self, kind: str, extension: str = "") -> str:
        return f"{kind}-{self.fingerprint[:12]}{extension}"

    def _partial(self, shard: IndexedShard) -> str:
        return f"{TEMPORARY_FOLDER}/{self.fingerprint[:12]}/{part_name(shard.shard)}.faiss"

    def _clean(self, used: set[str]) -> None:
        self.folder.remove(TEMPORARY_FOLDER)
        for name in [*self.folder.list(), *(f"rows/{name}" for name in self.folder.list("rows"))]:
            if name.startswith(("text-", "vectors-", "trained-", "rows/")) and name not in used:
                self.folder.remove(name)


def plan_build(
    captions: str | os.PathLike[str],
    embeddings: str | os.PathLike[str] | None,
    output: str | os.PathLike[str],
    config: IndexConfig,
    *,
    overwrite: bool = False,
) -> IndexBuild:
    """Compares an index with the datasets it is built from and plans what to build.

    The plan covers the shards that are complete in both datasets. It extends an existing index with new and changed
    shards, or builds the index from scratch if the number of rows requires a different vector layout. If `overwrite`
    is True, an index built from different datasets or with a different configuration is replaced.

    Raises:
        DatasetError: a dataset is missing or has no complete shard, the two do not match, or `output` has other files.
        FingerprintError: the index has different datasets or a different configuration, and `overwrite` is False.
    """
    captions_dataset = open_dataset(captions, "captions")
    embeddings_dataset = None if embeddings is None else open_dataset(embeddings, "embeddings")
    build = IndexBuild(Folder(output), captions_dataset, embeddings_dataset, config)
    base = _read_base(build.folder)
    done = _read_markers(captions_dataset, embeddings_dataset)
    if base is not None and (changes := _compare_with_base(build, base)):
        if not overwrite:
            raise FingerprintError(
                f"{build.folder.uri} is an index with different datasets or configuration ({'; '.join(changes)}); "
                "choose a different folder, or pass --overwrite to replace the index"
            )
        base = None
    if embeddings_dataset is not None:
        check_datasets_match(captions_dataset, embeddings_dataset)
        # Checks one shard before workers start; `add_shard` checks the others.
        match_embeddings_to_captions(captions_dataset, embeddings_dataset, min(done))
    return _plan_shards(build, base, done)


def _read_base(folder: Folder) -> IndexDescription | None:
    base = read_description(folder)
    if base is None and (others := [name for name in folder.list() if not _is_index_file(name)]):
        raise DatasetError(
            f"{folder.uri} contains files that are not part of an index ({', '.join(others[:3])}); choose a new folder"
        )
    return base


def _is_index_file(name: str) -> bool:
    """Returns whether an interrupted build may have left a file of this name."""
    return name in (TEMPORARY_FOLDER, DESCRIPTION, "rows") or name.startswith(("text-", "vectors-", "trained-"))


def _read_markers(captions: ShardedDataset, embeddings: ShardedDataset | None) -> ShardMarkers:
    """Reads the markers of the shards that are complete in both datasets."""
    markers = captions.read_markers()
    if embeddings is None:
        done: ShardMarkers = {shard: (marker, None) for shard, marker in markers.items()}
    else:
        embedding_markers = embeddings.read_markers()
        done = {shard: (markers[shard], embedding_markers[shard]) for shard in markers if shard in embedding_markers}
    if not done:
        folders = f"both {captions.folder.uri} and {embeddings.folder.uri}" if embeddings else captions.folder.uri
        raise DatasetError(f"expected shards that are complete in {folders}, got none; finish writing them first")
    return done


def _compare_with_base(build: IndexBuild, base: IndexDescription) -> list[str]:
    """Describes how the datasets and configuration differ, ignoring the datasets' locations and shard counts."""
    before, now = (
        {
            "captions": index.captions.fingerprint,
            "embeddings": index.embeddings.fingerprint if index.embeddings else None,
            **to_dict(index.config),
        }
        for index in (base, build)
    )
    return describe_differences(before, now)


def _plan_shards(build: IndexBuild, base: IndexDescription | None, done: ShardMarkers) -> IndexBuild:
    rows = sum(marker.rows for marker, _ in done.values())
    if base is not None and base.layout is not None and base.layout.is_outgrown(build.config, rows):
        base = None
    layout = base.layout if base is not None else None
    if base is None and build.embeddings is not None:
        layout = VectorLayout.choose(build.config, rows, build.embeddings.schema.field("embedding").type.list_size)
    indexed = {shard.shard: shard for shard in base.shards} if base is not None else {}
    unchanged = {
        number: shard for number, shard in indexed.items() if number in done and _is_current(shard, *done[number])
    }
    offset = base.end_row if base is not None else 0
    added = []
    for number in sorted(done.keys() - unchanged.keys()):
        added.append(_plan_shard(number, offset, *done[number]))
        offset = added[-1].end
    return replace(
        build,
        base=base,
        unchanged=tuple(unchanged.values()),
        removed=tuple(shard for number, shard in indexed.items() if number not in unchanged),
        added=tuple(added),
        layout=layout,
    )


def _is_current(shard: IndexedShard, captions: Marker, embeddings: Marker | None) -> bool:
    return (shard.captions, shard.embeddings) == (captions.checksum, embeddings.checksum if embeddings else "")


def _plan_shard(number: int, offset: int, captions: Marker, embeddings: Marker | None) -> IndexedShard:
    name = compute_fingerprint("rows", {"captions": captions.checksum, "offset": offset})[:12]
    return IndexedShard(
        shard=number,
        offset=offset,
        rows=captions.rows,
        captions=captions.checksum,
        embeddings=embeddings.checksum if embeddings else "",
        file=f"rows/{part_name(number)}-{name}.arrow",
    )


def _describe_dataset(dataset: ShardedDataset) -> IndexedDataset:
    ranker = str(dataset.config.get("ranker", "")) if dataset.kind == "embeddings" else ""
    return IndexedDataset(resolve_address(dataset.folder.uri), dataset.fingerprint, dataset.shards, ranker)
