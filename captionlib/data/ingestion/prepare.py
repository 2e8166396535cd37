"""Turns any source of images into a manifest: shards of rows in a fixed order, with unique ids."""

import itertools
import os
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from captionlib.data.images.addresses import image_exists
from captionlib.data.ingestion.staging import Staged, read_slices, refuse_duplicates, stage_rows
from captionlib.data.shards.dataset import ShardedDataset, create_dataset, open_dataset
from captionlib.data.shards.markers import DESCRIPTION_FILE
from captionlib.data.shards.schemas import MANIFEST_SCHEMA
from captionlib.data.shards.writer import write_shard
from captionlib.data.sources.formats import SOURCE_FORMATS, detect_common_format
from captionlib.data.sources.rows import ManifestRow, ReportSkip, SourceOptions
from captionlib.errors import ConfigError, DatasetError, FetchError
from captionlib.progress import progress_bar
from captionlib.storage.folders import TEMPORARY_FOLDER, Folder

__all__ = ["PrepareConfig", "PrepareSummary", "prepare_manifest"]

_IMAGES_TO_CHECK = 20


@dataclass(frozen=True)
class PrepareConfig:
    """What becomes of a source.

    Attributes:
        source_format: its family, a key of `SOURCE_FORMATS`; auto tells it by name and content.
        options: how it is read.
        splits: the splits to keep; empty keeps all.
        limit: keep the first so many images.
        shard_size: rows a shard, which is the unit of work of all that follows.
        check_images: refuse a list of images of which none of the first is where it says.
    """

    source_format: str = "auto"
    options: SourceOptions = field(default_factory=SourceOptions)
    splits: tuple[str, ...] = ()
    limit: int | None = None
    shard_size: int = 1000
    check_images: bool = True

    def __post_init__(self) -> None:
        if self.source_format != "auto" and self.source_format not in SOURCE_FORMATS:
            raise ConfigError(f"source_format: expected auto, {', '.join(SOURCE_FORMATS)}, got {self.source_format!r}")
        if self.shard_size < 1:
            raise ConfigError(f"shard_size: expected at least 1, got {self.shard_size}")
        if self.limit is not None and self.limit < 1:
            raise ConfigError(f"limit: expected at least 1, got {self.limit}")


@dataclass(frozen=True)
class PrepareSummary:
    """What was prepared.

    Attributes:
        source_format: the family.
        images: rows of the manifest.
        shards: parts of the manifest.
        captions: of all images.
        splits: images by split.
        skipped: what the source holds and the manifest does not, by reason.
        already_prepared: the manifest was there before, whole and the same; nothing was written.
    """

    source_format: str
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
    Datastore does not grow with the number of rows.

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
    family = detect_common_format(addresses) if config.source_format == "auto" else config.source_format
    skipped: Counter[str] = Counter()
    with tempfile.TemporaryDirectory(prefix="captionlib-prepare-") as scratch:
        rows = _select(_read(addresses, family, config, _count_into(skipped)), config, _count_into(skipped))
        with progress_bar("prepare", None, "images", progress) as bar:
            staged = stage_rows(bar.track(rows), Path(scratch) / "rows.parquet")
        if not staged.rows:
            raise DatasetError(_describe_nothing(addresses, family, config, skipped))
        refuse_duplicates(staged)
        dataset = create_dataset(
            output,
            "manifest",
            MANIFEST_SCHEMA,
            config={"rows": staged.rows, "content": f"sha256:{staged.content}", "shard_size": config.shard_size},
            shards=-(-staged.rows // config.shard_size),
            overwrite=overwrite,
        )
        already_prepared = dataset.is_complete()
        if not already_prepared:
            _publish(dataset, staged, config.shard_size)
    return PrepareSummary(
        source_format=family,
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
    if folder.exists(DESCRIPTION_FILE):
        if not overwrite:
            open_dataset(output, "manifest")
    elif any(name != TEMPORARY_FOLDER for name in folder.list()):
        raise DatasetError(f"{folder.uri} holds files that captionlib did not write; give an empty or a new folder")


def _count_into(skipped: Counter[str]) -> ReportSkip:
    def report_skip(reason: str) -> None:
        skipped[reason] += 1

    return report_skip


def _read(
    addresses: Sequence[str], family: str, config: PrepareConfig, report_skip: ReportSkip
) -> Iterator[ManifestRow]:
    rows = SOURCE_FORMATS[family].read(addresses, config.options, report_skip)
    if SOURCE_FORMATS[family].references_images and config.check_images:
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


def _select(rows: Iterator[ManifestRow], config: PrepareConfig, report_skip: ReportSkip) -> Iterator[ManifestRow]:
    kept = 0
    for row in rows:
        if config.splits and row.split not in config.splits:
            report_skip("in another split")
            continue
        yield row
        kept += 1
        if kept == config.limit:
            return


def _describe_nothing(addresses: Sequence[str], family: str, config: PrepareConfig, skipped: Mapping[str, int]) -> str:
    wanted = f", of split {' or '.join(config.splits)}" if config.splits else ""
    reasons = ", ".join(f"{reason} ({count})" for reason, count in skipped.items()) or "nothing"
    return (
        f"{', '.join(addresses[:3])}: no images. Read as {family}, looked for {SOURCE_FORMATS[family].row_description}{wanted}; "
        f"skipped: {reasons}. Check the path, or say what it is by --format"
    )


def _publish(dataset: ShardedDataset, staged: Staged, shard_size: int) -> None:
    pending = set(dataset.pending_shards())
    for shard, rows in enumerate(read_slices(staged, shard_size)):
        if shard in pending:
            with write_shard(dataset, shard, rows.num_rows) as writer:
                writer.write(rows)
    dataset.finish()
