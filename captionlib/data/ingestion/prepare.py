"""Converts sources (input datasets in a supported format) to a manifest: a sharded table with one row per image."""

import itertools
import os
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import PositiveInt

from captionlib.config import configclass
from captionlib.data.images.addresses import image_exists
from captionlib.data.ingestion.staging import StagedRows, check_unique_ids, read_shards, stage_rows
from captionlib.data.shards.dataset import ShardedDataset, create_dataset, open_dataset
from captionlib.data.shards.markers import DESCRIPTION_FILE
from captionlib.data.shards.schemas import MANIFEST_SCHEMA
from captionlib.data.shards.writer import write_shard
from captionlib.data.sources.formats import SOURCE_FORMATS, detect_common_format, read_source
from captionlib.data.sources.rows import ManifestRow, SkipCounter, SourceOptions
from captionlib.data.splits import expand_splits
from captionlib.errors import ConfigError, DatasetError, FetchError
from captionlib.progress import progress_bar
from captionlib.storage.folders import TEMPORARY_FOLDER, Folder

__all__ = ["PrepareConfig", "PrepareSummary", "prepare"]

_IMAGES_TO_CHECK = 20


@configclass
class PrepareConfig:
    """How to convert a source to a manifest.

    Attributes:
        source_format: key of `SOURCE_FORMATS`, or `auto` to detect the format.
        options: options for reading the source.
        splits: splits to include. If empty, all splits are included.
        limit: maximum number of images, from the start of the source.
        shard_size: rows per shard. Later jobs process and resume by shard.
        check_images: raise an error if the source lists image paths and none of the first 20 images exists.
        strict: raise an error at the first invalid image or caption instead of skipping it.
    """

    source_format: str = "auto"
    options: SourceOptions = field(default_factory=SourceOptions)
    splits: tuple[str, ...] = ()
    limit: PositiveInt | None = None
    shard_size: PositiveInt = 1000
    check_images: bool = True
    strict: bool = False

    def __post_init__(self) -> None:
        if self.source_format != "auto" and self.source_format not in SOURCE_FORMATS:
            raise ConfigError(
                f"source_format: expected auto or one of {', '.join(SOURCE_FORMATS)}, got {self.source_format!r}"
            )


@dataclass(frozen=True)
class PrepareSummary:
    """Counts of the images in a manifest and of the skipped items of its sources.

    Attributes:
        source_format: specified or detected format of the sources.
        images: number of images.
        shards: number of shards.
        captions: number of captions.
        splits: number of images by split.
        skipped: number of skipped items by reason.
        examples: file and line of the first skipped item by reason, for invalid images and captions only.
        already_prepared: whether the output already contained this manifest, so that nothing was written.
    """

    source_format: str
    images: int
    shards: int
    captions: int
    splits: Mapping[str, int]
    skipped: Mapping[str, int]
    examples: Mapping[str, str]
    already_prepared: bool


def prepare(
    sources: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    config: PrepareConfig | None = None,
    *,
    overwrite: bool = False,
    progress: bool = False,
) -> PrepareSummary:
    """Writes the manifest of one or more sources in the same format.

    All rows are first written to a local temporary file and checked, so that nothing is output for an invalid source.
    Memory does not grow with the number of rows.

    Example:
        >>> summary = captionlib.prepare("scenes/dataset.json", "manifest")
        >>> summary.images, summary.captions
        (26, 130)

    Args:
        sources: paths, URLs or globs.
        output: folder to write the manifest to.
        config: conversion options.
        overwrite: replace a manifest that has different rows.
        progress: show a progress bar.

    Raises:
        ConfigError: the format of the sources cannot be detected, or an option does not apply to it.
        DatasetError: the sources are empty or cannot be read, or the output folder contains other data.
        DuplicateIdError: two rows have the same id.
        FingerprintError: the output folder contains a manifest with different rows, and `overwrite` is False.
    """
    config = config or PrepareConfig()
    addresses = [os.fspath(source) for source in ([sources] if isinstance(sources, str | os.PathLike) else sources)]
    _check_output(output, overwrite)
    source_format = _select_format(addresses, config)
    skips = SkipCounter(config.strict)
    with tempfile.TemporaryDirectory(prefix="captionlib-prepare-") as scratch:
        rows = _select_splits(_read(addresses, source_format, config, skips), config.splits, skips)
        with progress_bar("prepare", None, "images", progress) as bar:
            staged = stage_rows(bar.track(itertools.islice(rows, config.limit)), Path(scratch) / "rows.parquet")
        if not staged.rows:
            raise DatasetError(_describe_empty_source(addresses, source_format, config, skips))
        check_unique_ids(staged)
        dataset = create_dataset(
            output,
            "manifest",
            MANIFEST_SCHEMA,
            config={"rows": staged.rows, "content": f"sha256:{staged.digest}", "shard_size": config.shard_size},
            shards=-(-staged.rows // config.shard_size),
            overwrite=overwrite,
        )
        already_prepared = dataset.is_complete()
        if not already_prepared:
            _write_shards(dataset, staged, config.shard_size)
    return PrepareSummary(
        source_format=source_format,
        images=staged.rows,
        shards=dataset.shards,
        captions=staged.captions,
        splits=staged.splits,
        skipped=dict(skips.counts.most_common()),
        examples=skips.examples,
        already_prepared=already_prepared,
    )


def _select_format(addresses: Sequence[str], config: PrepareConfig) -> str:
    if config.source_format == "auto":
        return "hf-parquet" if config.options.image_column is not None else detect_common_format(addresses)
    return config.source_format


def _check_output(output: str | os.PathLike[str], overwrite: bool) -> None:
    """Raises an error if the folder contains other data. Called first, because reading the sources can take long."""
    folder = Folder(output)
    if folder.exists(DESCRIPTION_FILE):
        if not overwrite:
            open_dataset(output, "manifest")
    elif any(name != TEMPORARY_FOLDER for name in folder.list()):
        raise DatasetError(f"{folder.uri} contains files that captionlib did not write; choose an empty or new folder")


def _read(
    addresses: Sequence[str], source_format: str, config: PrepareConfig, skips: SkipCounter
) -> Iterator[ManifestRow]:
    rows = read_source(source_format, addresses, config.options, skips)
    if SOURCE_FORMATS[source_format].references_images and config.check_images:
        first = list(itertools.islice(rows, _IMAGES_TO_CHECK))
        _check_images_exist(first)
        rows = itertools.chain(first, rows)
    return rows


def _check_images_exist(rows: Sequence[ManifestRow]) -> None:
    """Raises an error if no image exists: the image folder must be wrong, and every image would fail later."""
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
            f"none of the first {len(rows)} images exists; the first is expected at {rows[0].uri}{reason}; set the "
            "folder that image paths are relative to with --images, or use --no-check-images if only the workers of "
            "later jobs can read the images"
        )


def _select_splits(rows: Iterator[ManifestRow], splits: Collection[str], skips: SkipCounter) -> Iterator[ManifestRow]:
    selected = expand_splits(splits)
    for row in rows:
        if not splits or row.split in selected:
            yield row
        else:
            skips.skip("in a different split")


def _describe_empty_source(
    addresses: Sequence[str], source_format: str, config: PrepareConfig, skips: SkipCounter
) -> str:
    expected = SOURCE_FORMATS[source_format].row_description
    splits = f" of split {' or '.join(config.splits)}" if config.splits else ""
    return (
        f"{', '.join(addresses[:3])}: no images{splits}; format {source_format} expects {expected}; "
        f"skipped: {skips.describe()}; check the path, or set --format"
    )


def _write_shards(dataset: ShardedDataset, staged: StagedRows, shard_size: int) -> None:
    pending = set(dataset.pending_shards())
    for shard, rows in enumerate(read_shards(staged, shard_size)):
        if shard in pending:
            with write_shard(dataset, shard, rows.num_rows) as writer:
                writer.write(rows)
    dataset.finish()
