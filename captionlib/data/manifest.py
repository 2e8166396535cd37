"""Turns any source of images into a manifest: shards of rows in a fixed order, with unique ids."""

import itertools
import os
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from captionlib.data.datasets import create_dataset, open_dataset
from captionlib.data.image_addresses import image_exists
from captionlib.data.schemas import MANIFEST
from captionlib.data.shard_writer import write_shard
from captionlib.data.shards import DESCRIPTION, ShardedDataset
from captionlib.data.sources.detect import FAMILIES, detect_sources
from captionlib.data.sources.rows import ManifestRow, Skip, SourceOptions
from captionlib.data.staging import Staged, read_slices, refuse_duplicates, stage_rows
from captionlib.errors import ConfigError, DatasetError, FetchError
from captionlib.storage import TEMPORARY, Folder

__all__ = ["PrepareConfig", "PrepareSummary", "prepare_manifest"]

_IMAGES_TO_CHECK = 20


@dataclass(frozen=True)
class PrepareConfig:
    """What becomes of a source.

    Attributes:
        source: its family, a key of `FAMILIES`; auto tells it by name and content.
        options: how it is read.
        splits: the splits to keep; empty keeps all.
        limit: keep the first so many images.
        shard_size: rows a shard, which is the unit of work of all that follows.
        check_images: refuse a list of images of which none of the first is where it says.
    """

    source: str = "auto"
    options: SourceOptions = field(default_factory=SourceOptions)
    splits: tuple[str, ...] = ()
    limit: int | None = None
    shard_size: int = 1000
    check_images: bool = True

    def __post_init__(self) -> None:
        if self.source != "auto" and self.source not in FAMILIES:
            raise ConfigError(f"source: expected auto, {', '.join(FAMILIES)}, got {self.source!r}")
        if self.shard_size < 1:
            raise ConfigError(f"shard_size: expected at least 1, got {self.shard_size}")
        if self.limit is not None and self.limit < 1:
            raise ConfigError(f"limit: expected at least 1, got {self.limit}")


@dataclass(frozen=True)
class PrepareSummary:
    """What was prepared.

    Attributes:
        source: the family.
        images: rows of the manifest.
        shards: parts of the manifest.
        captions: of all images.
        splits: images by split.
        skipped: what the source holds and the manifest does not, by reason.
        already_prepared: the manifest was there before, whole and the same; nothing was written.
    """

    source: str
    images: int
    shards: int
    captions: int
    splits: Mapping[str, int]
    skipped: Mapping[str, int]
    already_prepared: bool


def prepare_manifest(
    sources: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    config: PrepareConfig | None = None,
    *,
    overwrite: bool = False,
    progress: bool = False,
) -> PrepareSummary:
    """Writes the manifest of one or more sources of one family.

    Rows wait in a local temporary file until all of them are known to be good, so that a bad source publishes nothing.
    Memory does not grow with the number of rows.

    Args:
        sources: paths, addresses or globs.
        output: the folder of the manifest.
        config: what becomes of the sources.
        overwrite: replace a manifest of other rows.
        progress: show a progress bar.

    Raises:
        ConfigError: the kind of the source cannot be told, or an option does not fit it.
        DatasetError: the source is empty or cannot be read, or the output holds something else.
        DuplicateIdError: two rows have the same id.
        FingerprintError: the output holds a manifest of other rows, and `overwrite` is off.
    """
    config = config or PrepareConfig()
    several = [sources] if isinstance(sources, str | os.PathLike) else sources
    addresses = [os.fspath(source) for source in several]
    _check_output(output, overwrite)
    family = detect_sources(addresses) if config.source == "auto" else config.source
    skipped: Counter[str] = Counter()
    with tempfile.TemporaryDirectory(prefix="captionlib-prepare-") as scratch:
        rows = _select(_read(addresses, family, config, _count_into(skipped)), config, _count_into(skipped))
        with tqdm(rows, desc="prepare", unit=" images", disable=not progress, mininterval=1) as counted:
            staged = stage_rows(counted, Path(scratch) / "rows.parquet")
        if not staged.rows:
            raise DatasetError(_describe_nothing(addresses, family, config, skipped))
        refuse_duplicates(staged)
        dataset = create_dataset(
            output,
            "manifest",
            MANIFEST,
            config={"rows": staged.rows, "content": f"sha256:{staged.content}", "shard_size": config.shard_size},
            shards=-(-staged.rows // config.shard_size),
            overwrite=overwrite,
        )
        already_prepared = dataset.is_complete()
        if not already_prepared:
            _publish(dataset, staged, config.shard_size)
    return PrepareSummary(
        source=family,
        images=staged.rows,
        shards=dataset.shards,
        captions=staged.captions,
        splits=staged.splits,
        skipped=dict(skipped.most_common()),
        already_prepared=already_prepared,
    )


def _check_output(output: str | os.PathLike[str], overwrite: bool) -> None:
    """Refuses the folder of something else before a long source is read, rather than after."""
    folder = Folder(output)
    if folder.exists(DESCRIPTION):
        if not overwrite:
            open_dataset(output, "manifest")
    elif any(name != TEMPORARY for name in folder.list()):
        raise DatasetError(f"{folder.uri} holds files that captionlib did not write; give an empty or a new folder")


def _count_into(skipped: Counter[str]) -> Skip:
    def skip(reason: str) -> None:
        skipped[reason] += 1

    return skip


def _read(addresses: Sequence[str], family: str, config: PrepareConfig, skip: Skip) -> Iterator[ManifestRow]:
    rows = FAMILIES[family].read(addresses, config.options, skip)
    if FAMILIES[family].lists_images and config.check_images:
        first = list(itertools.islice(rows, _IMAGES_TO_CHECK))
        _refuse_missing_images(first)
        rows = itertools.chain(first, rows)
    return rows


def _refuse_missing_images(rows: Sequence[ManifestRow]) -> None:
    """Finds a wrong folder of images now, not as a failure of every image later. Refused addresses are not opened."""
    refused: FetchError | None = None
    for row in rows:
        try:
            if image_exists(row.uri):
                return
        except FetchError as error:
            refused = refused or error
    if rows:
        reason = "" if refused is None else f"; {refused.reason}: {refused}"
        raise DatasetError(
            f"none of the first {len(rows)} images is there; the first is expected at {rows[0].uri}{reason}; give the "
            "folder that their paths are relative to by --images, or --no-check-images where this machine cannot see "
            "them"
        )


def _select(rows: Iterator[ManifestRow], config: PrepareConfig, skip: Skip) -> Iterator[ManifestRow]:
    kept = 0
    for row in rows:
        if config.splits and row.split not in config.splits:
            skip("in another split")
            continue
        yield row
        kept += 1
        if kept == config.limit:
            return


def _describe_nothing(addresses: Sequence[str], family: str, config: PrepareConfig, skipped: Mapping[str, int]) -> str:
    wanted = f", of split {' or '.join(config.splits)}" if config.splits else ""
    reasons = ", ".join(f"{reason} ({count})" for reason, count in skipped.items()) or "nothing"
    return (
        f"{', '.join(addresses[:3])}: no images. Read as {family}, looked for {FAMILIES[family].looks_for}{wanted}; "
        f"skipped: {reasons}. Check the path, or say what it is by --source"
    )


def _publish(dataset: ShardedDataset, staged: Staged, shard_size: int) -> None:
    pending = set(dataset.pending())
    for shard, rows in enumerate(read_slices(staged, shard_size)):
        if shard in pending:
            with write_shard(dataset, shard, rows.num_rows) as writer:
                writer.write(rows)
    dataset.finish()
