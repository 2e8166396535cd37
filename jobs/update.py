"""The command `captionlib update`."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click

from captionlib.errors import CaptionlibError, DatasetError, DuplicateIdError, FailureRatioError, FingerprintError
from jobs.options import device_option, pipeline_options
from jobs.summaries import print_totals

if TYPE_CHECKING:
    from collections.abc import Container, Mapping

    from captionlib.collection import Collection, SourceConfig
    from captionlib.models.inference.captioning import GenerationConfig
    from pipelines.run import RunConfig

__all__ = ["command"]

_INDEX = "index"  # key of the index among the errors by source; no source can have this name


@click.command()
@click.argument("collection")
@click.option("--dry-run", is_flag=True, help="Only show how many images are new, changed and missing in the sources.")
@click.option("--allow-removal", is_flag=True, help="Continue if more than a tenth of a source's images are missing.")
@device_option
@pipeline_options
def command(collection: str, dry_run: bool, allow_removal: bool, device: str, run: RunConfig) -> None:
    """Caption and index the new and changed images of COLLECTION.

    COLLECTION is a folder that `captionlib init` created, with sources such as folders or tables of images. Images that
    are no longer in the sources are removed. Unchanged images are not processed again. If a source cannot be read, its
    images are kept, the other sources are updated, and the command ends with an error. To resume an interrupted update,
    run the same command again. `captionlib serve` shows the result without a restart.

    \b
    Examples:
      captionlib update holidays
      captionlib update holidays --dry-run
      captionlib update s3://bucket/archive -- --runner=FlinkRunner --flink_master=localhost:8081 --parallelism=2
    """
    from captionlib.collection import open_collection
    from captionlib.data.shards.removal import copy_removed_ids_to_new_manifests
    from captionlib.storage.folders import Folder
    from captionlib.storage.lock import lock_folder

    opened = open_collection(collection)
    if dry_run:
        _raise_failed(_prepare_sources(opened, allow_removal, run.progress, dry_run=True))
        return
    generation = _check_models(opened)
    with lock_folder(opened.folder, "captionlib update"):
        copy_removed_ids_to_new_manifests([Folder(address) for address in opened.find_manifests()])
        failed = _prepare_sources(opened, allow_removal, run.progress)
        try:
            _check_ids_differ(opened)
        except DuplicateIdError as error:
            _raise_failed({**failed, _INDEX: error})
        failed |= _caption_sources(opened, failed, generation, device, run)
        if len(failed) < len(opened.config.sources):
            failed |= _index(opened, failed, run)
    _raise_failed(failed)
    click.echo(f"Next: captionlib serve {collection}")


def _raise_failed(failed: Mapping[str, Exception]) -> None:
    """Raises DatasetError if a source or the index was not updated."""
    if failed:
        names = {name: "the index" if name == _INDEX else f"source {name}" for name in failed}
        raise DatasetError("; ".join(f"{names[name]} was not updated: {error}" for name, error in failed.items()))


def _prepare_sources(
    collection: Collection, allow_removal: bool, progress: bool, dry_run: bool = False
) -> dict[str, Exception]:
    """Updates the manifests. Returns the errors of the sources that cannot be read, whose manifests do not change."""
    failed: dict[str, Exception] = {}
    for source in collection.config.sources:
        try:
            _prepare(collection, source, allow_removal, progress, dry_run)
        except (CaptionlibError, OSError) as error:
            failed[source.name] = error
    return failed


def _check_ids_differ(collection: Collection) -> None:
    """Raises DuplicateIdError if an image id occurs in several sources. Called before any image is captioned."""
    from captionlib.data.ingestion.staging import check_ids_differ
    from captionlib.data.shards.dataset import open_dataset
    from captionlib.data.shards.markers import SUCCESS_FILE
    from captionlib.storage.folders import Folder

    addresses = {source.name: collection.manifest(source) for source in collection.config.sources}
    complete = {name: address for name, address in addresses.items() if Folder(address).exists(SUCCESS_FILE)}
    if len(complete) > 1:
        check_ids_differ({name: open_dataset(address) for name, address in complete.items()})


def _caption_sources(
    collection: Collection, failed: Container[str], generation: GenerationConfig, device: str, run: RunConfig
) -> dict[str, Exception]:
    """Captions the images of the sources that are not in `failed`. Returns the errors of the sources that fail.

    A source fails if too many of its images cannot be read. A source in `failed` is skipped: its images
    probably cannot be read, and would be recorded as failures.
    """
    errors: dict[str, Exception] = {}
    for source in collection.config.sources:
        if source.name not in failed:
            try:
                _caption(collection, source, generation, device, run)
            except FailureRatioError as error:
                errors[source.name] = error
    return errors


def _check_models(collection: Collection) -> GenerationConfig:
    """Loads the models, and returns the settings for generating captions."""
    from captionlib.collection import COLLECTION_FILE
    from captionlib.config import build_config
    from captionlib.models.checkpoints.encoder_file import require_checkpoint_files

    config = collection.config
    for address in filter(None, (config.captioner, config.ranker)):
        require_checkpoint_files(address, config.weights)
    from captionlib.models.inference.captioning import SHARED_CAPTIONERS, GenerationConfig
    from captionlib.models.inference.embedding import SHARED_RANKERS

    # The models stay in memory for the pipeline.
    SHARED_CAPTIONERS.load_with_version(config.captioner)
    if config.ranker is not None:
        SHARED_RANKERS.load_with_version(config.ranker)
    return build_config(GenerationConfig, config.generation, collection.folder.address(COLLECTION_FILE))


def _prepare(
    collection: Collection, source: SourceConfig, allow_removal: bool, progress: bool, dry_run: bool = False
) -> None:
    """Updates the manifest (table of images) of a source."""
    from captionlib.data.ingestion.prepare import prepare

    manifest = collection.manifest(source)
    summary = prepare(
        source.addresses,
        manifest,
        replace(source.prepare, allow_removal=allow_removal or source.prepare.allow_removal),
        dry_run=dry_run,
        progress=progress,
    )
    changes = summary.changes
    click.echo(
        f"{manifest}: {changes.new:,} new, {changes.changed:,} changed, {changes.missing:,} missing, "
        f"{changes.unchanged:,} unchanged"
    )
    for reason, count in summary.skipped.items():
        example = f", for example {summary.examples[reason]}" if reason in summary.examples else ""
        click.echo(f"Skipped: {count:,} {reason}{example}", err=True)


def _caption(
    collection: Collection, source: SourceConfig, generation: GenerationConfig, device: str, run: RunConfig
) -> None:
    """Writes the captions and embeddings of a source, in one pass if the captioner and the ranker share the encoder."""
    from captionlib.models.inference.captioning import SHARED_CAPTIONERS
    from captionlib.models.inference.embedding import SHARED_RANKERS, EmbeddingConfig
    from pipelines.embed_images import embed_images
    from pipelines.generate_captions import generate_captions

    config = collection.config
    manifest, captions, embeddings = (
        get_address(source) for get_address in (collection.manifest, collection.captions, collection.embeddings)
    )
    same_encoder = config.ranker is not None and (
        SHARED_RANKERS.load_with_version(config.ranker)[0].encoder
        == SHARED_CAPTIONERS.load_with_version(config.captioner)[0].encoder
    )
    embedding_options: dict[str, Any] = {"ranker": config.ranker, "embeddings": embeddings} if same_encoder else {}
    totals = generate_captions(
        manifest,
        config.captioner,
        captions,
        generation,
        **embedding_options,
        weights=config.weights,
        device=device,
        run=run,
    )
    print_totals(captions, totals)
    if config.ranker is not None and not same_encoder:
        settings = EmbeddingConfig(generation.loading, generation.encoder_batch_size)
        totals = embed_images(manifest, config.ranker, embeddings, settings, device=device, run=run)
        print_totals(embeddings, totals)


def _index(collection: Collection, failed: Container[str], run: RunConfig) -> dict[str, Exception]:
    """Indexes the sources that have captions. A source in `failed` keeps the captions of an earlier update.

    Returns the error if the index cannot be updated because of the sources in `failed`.
    """
    from pipelines.build_index import build_index

    config = collection.config
    existing = collection.find_datasets()
    needed = [collection.captions, *([collection.embeddings] if config.ranker else [])]
    sources = tuple(
        source
        for source in config.sources
        if source.name not in failed or all(get_address(source) in existing for get_address in needed)
    )
    collection = replace(collection, config=replace(config, sources=sources))
    try:
        _, index = build_index(
            collection.list_captions(),
            collection.index,
            config.index,
            embeddings=collection.list_embeddings() or None,
            duplicates=_deduplicate(collection, run.progress),
            run=run,
        )
    except DatasetError as error:
        if not failed:
            raise
        return {_INDEX: error}
    click.echo(f"{collection.index}: {index.captions_count:,} captions")
    return {}


def _deduplicate(collection: Collection, progress: bool) -> str | None:
    """Groups the duplicates among all images, if the collection has a threshold. Returns the address of the dataset."""
    from captionlib.search.duplicates import find_duplicates

    threshold = collection.config.duplicate_threshold
    if threshold is None:
        return None
    embeddings = collection.list_embeddings()
    try:
        summary = find_duplicates(embeddings, collection.duplicates, threshold, progress=progress)
    except FingerprintError:  # the threshold or the list of sources has changed
        summary = find_duplicates(embeddings, collection.duplicates, threshold, overwrite=True, progress=progress)
    click.echo(f"{collection.duplicates}: {summary.duplicates:,} duplicates in {summary.groups:,} groups")
    return collection.duplicates
