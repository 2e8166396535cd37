"""What is to be done to an index: everything, or only what was added to its datasets since it was built."""

import os
from dataclasses import replace

from captionlib.config import describe_differences, to_dict
from captionlib.data.shards.dataset import ShardedDataset, open_dataset
from captionlib.data.shards.markers import Marker, compute_fingerprint, part_name
from captionlib.errors import DatasetError, FingerprintError
from captionlib.search.belonging import check_datasets, check_shard
from captionlib.search.build import IndexBuild, describe_source
from captionlib.search.index_config import IndexConfig, VectorLayout
from captionlib.search.index_files import DESCRIPTION, IndexDescription, IndexedShard, read_description
from captionlib.storage.folders import TEMPORARY_FOLDER, Folder

__all__ = ["plan_build"]

Checksums = dict[int, tuple[Marker, Marker | None]]


def plan_build(
    captions: str | os.PathLike[str],
    embeddings: str | os.PathLike[str] | None,
    output: str | os.PathLike[str],
    config: IndexConfig,
    *,
    overwrite: bool = False,
) -> IndexBuild:
    """Compares an index with its datasets.

    Shards that are done in both datasets are indexed: of an index that is there already, only those that it does not
    hold, or holds in another state. Where it has grown out of its vector layout, all of them.

    Args:
        captions: a captions dataset; shards that are still being written are left for the next time.
        embeddings: of the same images; None indexes text alone.
        output: the index.
        config: how it is built.
        overwrite: replace an index of other datasets, or of another configuration.

    Raises:
        DatasetError: a dataset is not there, is something else, or has nothing that is done; they do not belong
            together; the output holds something else.
        FingerprintError: the index is of other datasets, or of another configuration, and `overwrite` is off.
    """
    texts = open_dataset(captions, "captions")
    vectors = None if embeddings is None else open_dataset(embeddings, "embeddings")
    folder = Folder(output)
    base = _existing(folder)
    done = _done(texts, vectors)
    if base is not None:
        lines = _differences(base, texts, vectors, config)
        if lines and not overwrite:
            raise FingerprintError(
                f"{folder.uri} is the index of something else ({'; '.join(lines)}); "
                "give another folder, or --overwrite to replace it"
            )
        base = None if lines else base
    if vectors is not None:
        check_datasets(texts, vectors)
        check_shard(texts, vectors, min(done))  # the others are checked as they are read
    return _compare(IndexBuild(folder, texts, vectors, config), base, done)


def _existing(folder: Folder) -> IndexDescription | None:
    base = read_description(folder)
    if base is None and (strangers := [name for name in folder.list() if not _is_own(name)]):
        raise DatasetError(
            f"{folder.uri} holds files that are no index ({', '.join(strangers[:3])}); give an empty or a new folder"
        )
    return base


def _is_own(name: str) -> bool:
    """Whether it may be left of a build that died."""
    return name in (TEMPORARY_FOLDER, DESCRIPTION, "rows") or name.startswith(("text-", "vectors-", "trained-"))


def _done(texts: ShardedDataset, vectors: ShardedDataset | None) -> Checksums:
    markers = texts.read_markers()
    others = vectors.read_markers() if vectors is not None else {}
    done: Checksums = {
        shard: (markers[shard], others.get(shard)) for shard in markers if vectors is None or shard in others
    }
    if not done:
        both = f"both {texts.folder.uri} and {vectors.folder.uri}" if vectors is not None else texts.folder.uri
        raise DatasetError(f"expected shards that are done in {both}, got none; run what writes them first")
    return done


def _differences(
    base: IndexDescription, texts: ShardedDataset, vectors: ShardedDataset | None, config: IndexConfig
) -> list[str]:
    """What differs, but for where the datasets lie and how many shards they have."""
    sources = (base.captions, base.embeddings), (describe_source(texts), vectors and describe_source(vectors))
    there, here = (
        {"captions": texts_source.fingerprint, "embeddings": vectors_source.fingerprint if vectors_source else None}
        for texts_source, vectors_source in sources
    )
    return describe_differences({**there, **to_dict(base.config)}, {**here, **to_dict(config)})


def _compare(build: IndexBuild, base: IndexDescription | None, done: Checksums) -> IndexBuild:
    rows = sum(marker.rows for marker, _ in done.values())
    if base is not None and base.layout is not None and base.layout.outgrown(build.config, rows):
        base = None
    known = {shard.shard: shard for shard in base.shards} if base is not None else {}
    kept = {shard: there for shard, there in known.items() if shard in done and _is_same(there, *done[shard])}
    offset = base.capacity if base is not None else 0
    added = []
    for shard in sorted(done.keys() - kept.keys()):
        added.append(_indexed(shard, offset, *done[shard]))
        offset = added[-1].end
    return replace(
        build,
        base=base,
        kept=tuple(kept.values()),
        removed=tuple(there for shard, there in known.items() if shard not in kept),
        added=tuple(added),
        layout=_layout(build, base, rows),
    )


def _layout(build: IndexBuild, base: IndexDescription | None, rows: int) -> VectorLayout | None:
    if build.embeddings is None:
        return None
    if base is not None:
        return base.layout
    return VectorLayout.choose(build.config, rows, build.embeddings.schema.field("embedding").type.list_size)


def _is_same(there: IndexedShard, captions: Marker, embeddings: Marker | None) -> bool:
    return (there.captions, there.embeddings) == (captions.checksum, embeddings.checksum if embeddings else "")


def _indexed(shard: int, offset: int, captions: Marker, embeddings: Marker | None) -> IndexedShard:
    name = compute_fingerprint("rows", {"captions": captions.checksum, "offset": offset})[:12]
    return IndexedShard(
        shard=shard,
        offset=offset,
        rows=captions.rows,
        captions=captions.checksum,
        embeddings=embeddings.checksum if embeddings else "",
        file=f"rows/{part_name(shard)}-{name}.arrow",
    )
