"""Converts a source of images to a manifest: shards of rows in a fixed order, with unique ids."""

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
from captionlib.errors import ConfigError, DatasetError, FetchError
from captionlib.progress import progress_bar
from captionlib.storage.folders import TEMPORARY_FOLDER, Folder

__all__ = ["PrepareConfig", "PrepareSummary", "prepare"]

_IMAGES_TO_CHECK = 20


@configclass
class PrepareConfig:
    """How to convert a source to a manifest.

    Attributes:
        source_format: a key of `SOURCE_FORMATS`; `auto` detects the format.
        options: how to read the source.
        splits: the splits to include; empty includes all.
        limit: include only the first `limit` images.
        shard_size: rows per shard, the unit of work of all later stages.
        check_images: refuse a list of images if none of the first ones exists.
        strict: refuse a source with damaged images or captions instead of skipping them.
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
    """The content of a manifest, and the items of the source that it leaves out.

    Attributes:
        source_format: the format of the source, given or detected.
        images: rows in the manifest.
        shards: shards in the manifest.
        captions: captions of all images.
        splits: images by split.
        skipped: items of the source that are not in the manifest, by reason.
        examples: the place of the first skipped item, by reason; only for damaged images and captions.
        already_prepared: the output held this manifest before; nothing was written.
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
    """Writes the manifest of one or more sources of the same format.

    All rows are first written to a local temporary file and checked, so that an invalid source writes no output. Memory
    does not grow with the number of rows.

    Example:
        >>> summary = captionlib.prepare("scenes/dataset.json", "manifest")
        >>> summary.images, summary.captions
        (26, 130)

    Args:
        sources: paths, URLs or globs.
        output: the folder of the manifest.
        config: how to convert the sources.
        overwrite: replace a manifest of other rows.
        progress: show a progress bar.

    Raises:
        ConfigError: the format of the sources cannot be detected, or an option does not fit it.
        DatasetError: the sources are empty or cannot be read, or the output holds other data.
        DuplicateIdError: two rows have the same id.
        FingerprintError: the output holds a manifest of other rows, and `overwrite` is False.
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
    """Refuses a folder with other data before reading the source, which can take long."""
    folder = Folder(output)
    if folder.exists(DESCRIPTION_FILE):
        if not overwrite:
            open_dataset(output, "manifest")
    elif any(name != TEMPORARY_FOLDER for name in folder.list()):
        raise DatasetError(f"{folder.uri} holds files that captionlib did not write; choose an empty or a new folder")


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
    """Reports a wrong image folder now rather than as a failure of every image later. Refused uris are not opened."""
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
            "folder that image paths start from with --images, or use --no-check-images if only the workers can read "
            "the images"
        )


def _select_splits(rows: Iterator[ManifestRow], splits: Collection[str], skips: SkipCounter) -> Iterator[ManifestRow]:
    for row in rows:
        if not splits or row.split in splits:
            yield row
        else:
            skips.skip("in another split")


def _describe_empty_source(
    addresses: Sequence[str], source_format: str, config: PrepareConfig, skips: SkipCounter
) -> str:
    expected = SOURCE_FORMATS[source_format].row_description
    splits = f" of split {' or '.join(config.splits)}" if config.splits else ""
    return (
        f"{', '.join(addresses[:3])}: no images{splits}; read as {source_format}, which expects {expected}; "
        f"skipped: {skips.describe()}; check the path, or set --format"
    )


def _write_shards(dataset: ShardedDataset, staged: StagedRows, shard_size: int) -> None:
    pending = set(dataset.pending_shards())
    for shard, rows in enumerate(read_shards(staged, shard_size)):
        if shard in pending:
            with write_shard(dataset, shard, rows.num_rows) as writer:
                writer.write(rows)
    dataset.finish()
