"""Converts sources (input datasets in a supported format) to a manifest: a sharded table with one row per image."""

import itertools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field

from pydantic import PositiveInt

from captionlib.config import configclass
from captionlib.data.images.addresses import image_exists
from captionlib.data.images.fetching import ImageFetcher
from captionlib.data.ingestion.changes import Changes, Comparison, update_manifest
from captionlib.data.ingestion.staging import StagedRows, check_unique_ids, open_database, read_shards, stage_rows
from captionlib.data.shards.compaction import choose_shard_size
from captionlib.data.shards.dataset import ShardedDataset, create_dataset, open_dataset, select_other_files
from captionlib.data.shards.markers import DESCRIPTION_FILE
from captionlib.data.shards.removal import list_removed
from captionlib.data.shards.schemas import MANIFEST_SCHEMA
from captionlib.data.shards.update import drop_uncommitted_updates
from captionlib.data.shards.writer import write_shard
from captionlib.data.sources.formats import SOURCE_FORMATS, detect_common_format, read_source
from captionlib.data.sources.rows import ImageRecord, SkipCounter, SourceOptions
from captionlib.data.splits import add_split_aliases
from captionlib.errors import ConfigError, DatasetError, FetchError, StorageError
from captionlib.progress import progress_bar
from captionlib.storage.folders import Addresses, Folder, list_addresses, scratch_folder
from captionlib.storage.lock import lock_folder
from captionlib.storage.remote_errors import is_temporary_error

__all__ = ["PrepareConfig", "PrepareSummary", "prepare"]

_COMMAND = "captionlib prepare"
_IMAGES_TO_CHECK = 20
_MAX_MISSING_RATIO = 0.1


@configclass
class PrepareConfig:
    """How to convert a source to a manifest.

    Attributes:
        source_format: `folder`, `coco`, `karpathy`, `flickr`, `table`, `webdataset` or `hf-parquet`, or `auto` to
            detect the format.
        options: how to read the source.
        splits: splits to include. If empty, all splits are included.
        limit: maximum number of images, from the start of the source.
        shard_size: rows per shard. After an interruption, later jobs repeat only unfinished shards. If None, an
            existing manifest keeps its shard size, and the size for a new one grows with the number of images.
        check_images: raise an error if the source lists image paths and none of the first 20 images exists.
        strict: raise an error at the first invalid image or caption instead of skipping it.
        append: keep images of an existing manifest that are not in the source. The source may then list only new
            images.
        allow_removal: allow an update that removes more than a tenth of the images of an existing manifest.
        verify_content: path or URL of a features, captions or embeddings dataset made from the manifest. If set, an
            update reads each image whose file seems unchanged, and compares a hash of its content with the
            `content_hash` in that dataset.
    """

    source_format: str = "auto"
    options: SourceOptions = field(default_factory=SourceOptions)
    splits: tuple[str, ...] = ()
    limit: PositiveInt | None = None
    shard_size: PositiveInt | None = None
    check_images: bool = True
    strict: bool = False
    append: bool = False
    allow_removal: bool = False
    verify_content: str | None = None

    def __post_init__(self) -> None:
        if self.source_format != "auto" and self.source_format not in SOURCE_FORMATS:
            raise ConfigError(
                f"source_format: expected auto or one of {', '.join(SOURCE_FORMATS)}, got {self.source_format!r}"
            )


@dataclass(frozen=True)
class PrepareSummary:
    """Counts of the images read from the sources, and of the skipped items.

    Attributes:
        source_format: specified or detected format of the sources.
        images: number of images, without skipped ones.
        shards: number of shards of the manifest.
        captions: number of captions of the images.
        splits: number of images by split.
        skipped: number of skipped items by reason.
        examples: file and line of the first invalid image or caption by reason.
        changes: numbers of new, changed, missing (no longer in the sources) and unchanged images.
        is_update: whether the sources were compared with an existing manifest.
    """

    source_format: str
    images: int
    shards: int
    captions: int
    splits: Mapping[str, int]
    skipped: Mapping[str, int]
    examples: Mapping[str, str]
    changes: Changes
    is_update: bool

    @property
    def already_prepared(self) -> bool:
        """Whether the output already contained these images, so nothing was written."""
        return self.is_update and not self.changes.any


def prepare(
    sources: Addresses,
    output: str | os.PathLike[str],
    config: PrepareConfig | None = None,
    *,
    overwrite: bool = False,
    dry_run: bool = False,
    report_changes: Callable[[Changes], None] = lambda changes: None,
    progress: bool = False,
) -> PrepareSummary:
    """Writes the manifest of one or more sources in the same format, or updates an existing manifest.

    All rows are first written to a local temporary file and checked, so an invalid source changes nothing. An update is
    atomic and writes only the shards with new, changed or missing images. Memory does not grow with the number of rows.

    Example:
        >>> summary = captionlib.prepare("scenes/dataset.json", "manifest")
        >>> summary.images, summary.captions
        (26, 130)

    Args:
        sources: paths, URLs or globs.
        output: folder to write the manifest to.
        config: conversion options.
        overwrite: replace an existing manifest with a new one instead of updating it.
        dry_run: compare the sources with the manifest without writing anything.
        report_changes: called with the numbers of changes before an existing manifest is updated.
        progress: show a progress bar.

    Raises:
        ConfigError: the format of the sources cannot be detected, or an option does not apply to it.
        DatasetError: the sources are empty or cannot be read, the output folder contains other data, or the update
            would remove too many images.
        DuplicateIdError: two rows have the same id.
        LockError: another process is writing the manifest.
    """
    config = config or PrepareConfig()
    addresses = [os.fspath(source) for source in list_addresses(sources)]
    with ExitStack() as lock:
        if Folder(output).exists(DESCRIPTION_FILE) and not dry_run:
            lock.enter_context(lock_folder(Folder(output), _COMMAND))
        return _prepare(addresses, output, config, overwrite, dry_run, report_changes, progress)


def _prepare(
    addresses: list[str],
    output: str | os.PathLike[str],
    config: PrepareConfig,
    overwrite: bool,
    dry_run: bool,
    report_changes: Callable[[Changes], None],
    progress: bool,
) -> PrepareSummary:
    """Writes or updates a manifest.

    Locking creates the folder, so a new folder is locked only after the sources have been checked.
    """
    is_new = not Folder(output).exists(DESCRIPTION_FILE)
    existing = _open_output(output, config, overwrite)
    to_update = existing if existing is not None and existing.is_complete() else None
    source_format = _select_format(addresses, config)
    skips = SkipCounter(config.strict)
    with scratch_folder() as scratch:
        rows = _read(addresses, source_format, config, skips)
        if config.splits:
            splits = add_split_aliases(config.splits)  # val and dev are the same split
            rows = _select(rows, lambda row: row.split in splits, "in a different split", skips)
        if (removed := list_removed(Folder(output))).reasons:
            rows = _select(rows, lambda row: row.image_id not in removed, "removed with captionlib remove", skips)
        with progress_bar("prepare", None, "images", progress) as bar:
            rows = rows if config.limit is None else itertools.islice(rows, config.limit)
            to_compare = None if config.verify_content is not None else to_update
            staged = stage_rows(rows, scratch / "rows.parquet", to_compare, bar.update)
        is_update = to_update is not None
        if not staged.rows and not staged.unchanged and not (is_update and config.allow_removal):
            raise DatasetError(_describe_empty_source(addresses, source_format, config, skips, is_update))
        if to_update is not None:
            changes, shards = _update(to_update, staged, config, dry_run, report_changes)
        else:
            changes = Changes(staged.rows, 0, 0, 0)
            shard_size = config.shard_size or choose_shard_size(staged.rows)
            check_unique_ids(staged)
            shards = -(-staged.rows // shard_size)
            if not dry_run:
                with lock_folder(Folder(output), _COMMAND) if is_new else nullcontext():
                    _create(output, staged, shard_size, shards, existing, is_new)
    return PrepareSummary(
        source_format=source_format,
        images=staged.rows,
        shards=shards,
        captions=staged.captions,
        splits=staged.splits,
        skipped=dict(skips.counts.most_common()),
        examples=skips.examples,
        changes=changes,
        is_update=is_update,
    )


def _open_output(output: str | os.PathLike[str], config: PrepareConfig, overwrite: bool) -> ShardedDataset | None:
    """Returns the manifest in the output folder, or None if there is none or it is to be overwritten."""
    folder = Folder(output)
    if folder.exists(DESCRIPTION_FILE):
        if overwrite:
            return None
        dataset = open_dataset(output, "manifest")
        size = dataset.config["shard_size"]
        if config.shard_size not in (None, size):
            raise ConfigError(
                f"{folder.uri}: expected the shard size of this manifest, {size}, got {config.shard_size}; omit "
                "--shard-size, or change it with `captionlib compact`"
            )
        return dataset
    if select_other_files(folder.list()):
        raise DatasetError(f"{folder.uri} contains files that captionlib did not write; choose an empty or new folder")
    return None


def _open_hashed_dataset(address: str) -> ShardedDataset:
    dataset = open_dataset(address)
    if "content_hash" not in dataset.schema.names:
        raise ConfigError(
            f"{dataset.folder.uri}: expected a dataset with the column content_hash, got {dataset.kind}; use the "
            "output of extract-features, generate-captions or embed"
        )
    return dataset


def _create(
    output: str | os.PathLike[str],
    staged: StagedRows,
    shard_size: int,
    shards: int,
    existing: ShardedDataset | None,
    is_new: bool,
) -> None:
    """Writes a new manifest. `existing` is the incomplete manifest that an interrupted run left, if any."""
    if is_new and Folder(output).exists(DESCRIPTION_FILE):
        raise DatasetError(
            f"{Folder(output).uri}: another command wrote a manifest at the same time; run this command again to "
            "update it"
        )
    dataset = create_dataset(
        output,
        "manifest",
        MANIFEST_SCHEMA,
        config={"shard_size": shard_size},
        shards=shards,
        manifest_id=staged.digest if existing is None else existing.manifest_id,
        overwrite=True,
    )
    for shard, rows in enumerate(read_shards(staged, shard_size)):
        with write_shard(dataset, shard, rows.num_rows) as writer:
            writer.write(rows)
    dataset.finish()


def _update(
    dataset: ShardedDataset,
    staged: StagedRows,
    config: PrepareConfig,
    dry_run: bool,
    report_changes: Callable[[Changes], None],
) -> tuple[Changes, int]:
    """Updates a manifest. Returns the changes, and the new number of shards."""
    if staged.unchanged:
        changes = Changes(0, 0, 0, staged.rows)
        report_changes(changes)
        if not dry_run:
            drop_uncommitted_updates(dataset.folder)
        return changes, dataset.shards
    check_unique_ids(staged)
    with open_database(staged.path.parent) as database:
        comparison = Comparison(database, staged, dataset, append=config.append)
        if config.verify_content is not None:
            with ImageFetcher() as fetcher:
                comparison.verify_content(_open_hashed_dataset(config.verify_content), fetcher)
        changes = comparison.count()
        report_changes(changes)
        existing = changes.changed + changes.missing + changes.unchanged
        if changes.missing > _MAX_MISSING_RATIO * existing and not (config.allow_removal or dry_run):
            raise DatasetError(
                f"{dataset.folder.uri}: {changes.missing} of {existing} images are not in the source; expected at most "
                "a tenth; check that the path is correct and the disk is mounted, or use --append if the source "
                "contains only new images, or --allow-removal to remove the missing ones"
            )
        if not dry_run and changes.any:
            return changes, update_manifest(dataset, comparison, dataset.config["shard_size"])
    if not dry_run:
        drop_uncommitted_updates(dataset.folder)
    return changes, dataset.shards


def _select_format(addresses: Sequence[str], config: PrepareConfig) -> str:
    if config.source_format == "auto":
        return "hf-parquet" if config.options.image_column is not None else detect_common_format(addresses)
    return config.source_format


def _read(
    addresses: Sequence[str], source_format: str, config: PrepareConfig, skips: SkipCounter
) -> Iterator[ImageRecord]:
    rows = read_source(source_format, addresses, config.options, skips)
    if SOURCE_FORMATS[source_format].stores_image_paths and config.check_images:
        first = list(itertools.islice(rows, _IMAGES_TO_CHECK))
        _check_images_exist(first)
        rows = itertools.chain(first, rows)
    return rows


def _check_images_exist(rows: Sequence[ImageRecord]) -> None:
    """Raises DatasetError if none of the images exists. The image folder is then probably wrong."""
    errors = []
    for row in rows:
        try:
            if image_exists(row.uri):
                return
        except FetchError as error:
            errors.append(f"{error.reason}: {error}")
        except StorageError as error:
            if error.__cause__ is None or is_temporary_error(error.__cause__):  # after retries for two minutes
                raise
            errors.append(str(error))
    if rows:
        reason = f"; {errors[0]}" if errors else ""
        raise DatasetError(
            f"none of the first {len(rows)} images exists; the first is expected at {rows[0].uri}{reason}; use "
            "--images to set the folder that image paths are relative to, or --no-check-images if only the workers of "
            "later jobs can read the images"
        )


def _select(
    rows: Iterator[ImageRecord], condition: Callable[[ImageRecord], bool], skip_reason: str, skips: SkipCounter
) -> Iterator[ImageRecord]:
    for row in rows:
        if condition(row):
            yield row
        else:
            skips.count_ignored(skip_reason)


def _describe_empty_source(
    addresses: Sequence[str], source_format: str, config: PrepareConfig, skips: SkipCounter, is_update: bool
) -> str:
    expected = SOURCE_FORMATS[source_format].row_description
    splits = f" of split {' or '.join(config.splits)}" if config.splits else ""
    remedy = "check the path, or set --format" + (", or use --allow-removal to remove all images" if is_update else "")
    return (
        f"{', '.join(addresses[:3])}: no images{splits}; format {source_format} expects {expected}; "
        f"skipped: {skips.describe()}; {remedy}"
    )
