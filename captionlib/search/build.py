"""Builds an index in steps that can run anywhere and again at any time: train once, add shards in parallel, finish."""

import time
from dataclasses import dataclass
from pathlib import Path

from captionlib.config import to_dict
from captionlib.data.shards.dataset import ShardedDataset
from captionlib.data.shards.markers import compute_fingerprint, part_name
from captionlib.search.belonging import check_shard, read_vectors, sample_vectors
from captionlib.search.index_config import IndexConfig, VectorLayout
from captionlib.search.index_files import (
    IndexDescription,
    IndexedShard,
    Source,
    fetch_tree,
    publish_tree,
    read_description,
    scratch,
    write_description,
)
from captionlib.search.index_rows import COLUMNS, number_rows, read_rows, write_rows
from captionlib.search.text_index import write_text
from captionlib.search.vector_index import add_vectors, merge_vectors, train_vectors
from captionlib.storage.folders import TEMPORARY_FOLDER, Folder, resolve_address

__all__ = ["IndexBuild", "describe_source"]

_BATCH_ROWS = 65_536
_LEAST_SAMPLE = 20_000  # a product quantizer learns 256 codes for each byte, however few the lists


@dataclass(frozen=True)
class IndexBuild:
    """What is to be built. Pickles, so it travels to workers; each step is done once, however often it is called.

    Attributes:
        folder: of the index.
        captions: what is indexed.
        embeddings: the vectors of the same images; None for text alone.
        config: how.
        base: the index that is added to; None builds from nothing.
        kept: shards of the base that are still what they were.
        removed: shards of the base that are not.
        added: shards to index.
        layout: of the vectors; None without.
    """

    folder: Folder
    captions: ShardedDataset
    embeddings: ShardedDataset | None
    config: IndexConfig
    base: IndexDescription | None = None
    kept: tuple[IndexedShard, ...] = ()
    removed: tuple[IndexedShard, ...] = ()
    added: tuple[IndexedShard, ...] = ()
    layout: VectorLayout | None = None

    @property
    def fingerprint(self) -> str:
        """Of all that the answers depend on."""
        identity = {
            "captions": self.captions.fingerprint,
            "embeddings": self.embeddings.fingerprint if self.embeddings else None,
            "config": to_dict(self.config),
            "layout": to_dict(self.layout) if self.layout else None,
            "shards": [[one.shard, one.offset, one.captions, one.embeddings] for one in self._shards],
        }
        return compute_fingerprint("index", identity)

    def is_done(self) -> bool:
        """Whether the index is there already."""
        there = read_description(self.folder)
        return there is not None and there.fingerprint == self.fingerprint

    def train(self) -> None:
        """Learns the centroids, unless the base has them."""
        if self.layout is None or self.base is not None or self.folder.exists(self._trained):
            return
        assert self.embeddings is not None, "only embeddings have a layout"
        wanted = max(self.layout.lists * self.config.sample, _LEAST_SAMPLE)
        shards = [one.shard for one in self.added]
        sample = sample_vectors(self.embeddings, shards, wanted, self.config.seed)
        with self.folder.stage(self._trained) as path:
            train_vectors(self.layout, sample, self.config.seed, path)

    def add_shard(self, number: int) -> None:
        """Writes the rows and the partial index of the `number`-th added shard.

        Raises:
            DatasetError: its captions and embeddings do not belong together.
        """
        shard = self.added[number]
        if not self.folder.exists(shard.file):
            batches = self.captions.read_batches(shard.shard, COLUMNS, _BATCH_ROWS)
            with self.folder.stage(shard.file) as path:
                write_rows(path, number_rows(batches, shard.offset))
        if self.embeddings is None or self.folder.exists(self._partial(shard)):
            return
        places = check_shard(self.captions, self.embeddings, shard.shard)
        captioned = places >= 0
        vectors = read_vectors(self.embeddings, shard.shard)[captioned]
        with scratch(self.folder) as local, self.folder.stage(self._partial(shard)) as path:
            trained = fetch_tree(self.folder, self._trained, local / "trained")
            add_vectors(trained, places[captioned] + shard.offset, vectors, path)

    def finish(self) -> None:
        """Puts the parts together, makes them the index, and removes what nobody reads any more."""
        before = read_description(self.folder)
        if before is not None and before.fingerprint == self.fingerprint:
            return
        removed = [(one.offset, one.end) for one in self.removed]
        with scratch(self.folder) as local:
            vectors_count = self._merge_vectors(local, removed)
            captions_count = self._write_text(local, removed)
        description = self._describe(captions_count, vectors_count)
        old = set(before.files if before else ()) - set(description.files)
        write_description(self.folder, IndexDescription(**{**vars(description), "previous": tuple(sorted(old))}))
        self._clean({*description.files, *old})

    def _merge_vectors(self, local: Path, removed: list[tuple[int, int]]) -> int:
        if self.layout is None:
            return 0
        base = self.base.vectors if self.base else self._trained
        parts = (fetch_tree(self.folder, self._partial(one), local / self._partial(one)) for one in self.added)
        count = merge_vectors(fetch_tree(self.folder, base, local / "base"), parts, removed, local / "vectors")
        publish_tree(self.folder, local / "vectors", self._named("vectors", ".faiss"))
        return count

    def _write_text(self, local: Path, removed: list[tuple[int, int]]) -> int:
        base = fetch_tree(self.folder, self.base.text, local / "text-base") if self.base else None
        files = (fetch_tree(self.folder, one.file, local / one.file) for one in self.added)
        rows = (batch for file in files for batch in read_rows(file))
        count = write_text(local / "text", self.config.language, rows, base, removed)
        publish_tree(self.folder, local / "text", self._named("text"))
        return count

    def _describe(self, captions_count: int, vectors_count: int) -> IndexDescription:
        return IndexDescription(
            fingerprint=self.fingerprint,
            created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            config=self.config,
            captions=describe_source(self.captions),
            embeddings=describe_source(self.embeddings) if self.embeddings else None,
            layout=self.layout,
            shards=self._shards,
            capacity=max([self.base.capacity if self.base else 0, *(one.end for one in self._shards)]),
            captions_count=captions_count,
            vectors_count=vectors_count,
            text=self._named("text"),
            vectors=self._named("vectors", ".faiss") if self.layout else "",
            trained=self._trained if self.layout else "",
        )

    @property
    def _shards(self) -> tuple[IndexedShard, ...]:
        return tuple(sorted((*self.kept, *self.added), key=lambda one: one.offset))

    @property
    def _trained(self) -> str:
        return self.base.trained if self.base else self._named("trained", ".faiss")

    def _named(self, kind: str, extension: str = "") -> str:
        return f"{kind}-{self.fingerprint[:12]}{extension}"

    def _partial(self, shard: IndexedShard) -> str:
        return f"{TEMPORARY_FOLDER}/{self.fingerprint[:12]}/{part_name(shard.shard)}.faiss"

    def _clean(self, used: set[str]) -> None:
        self.folder.remove(TEMPORARY_FOLDER)
        for name in [*self.folder.list(), *(f"rows/{name}" for name in self.folder.list("rows"))]:
            if name.startswith(("text-", "vectors-", "trained-", "rows/")) and name not in used:
                self.folder.remove(name)


def describe_source(dataset: ShardedDataset) -> Source:
    """A dataset as an index remembers it."""
    ranker = str(dataset.config.get("ranker", "")) if dataset.kind == "embeddings" else ""
    return Source(resolve_address(dataset.folder.uri), dataset.fingerprint, dataset.shards, ranker)
