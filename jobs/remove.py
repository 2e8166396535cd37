"""The command `captionlib remove`."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from captionlib.errors import CaptionlibError, ConfigError, DatasetError
from jobs.datasets import open_datasets

if TYPE_CHECKING:
    from captionlib.data.shards.removal import Removal
    from captionlib.search.index_folder import IndexDescription

__all__ = ["command"]

_ORDER = ("manifest", "features", "captions", "embeddings", "duplicates")  # inputs before outputs


@click.command()
@click.argument("folders", nargs=-1, required=True, metavar="FOLDER...")
@click.option("--id", "ids", multiple=True, metavar="ID", help="Id of an image to remove. Repeatable.")
@click.option("--ids", "files", multiple=True, metavar="FILE", help="File with one id per line. Repeatable.")
@click.option(
    "--reason", default="", metavar="TEXT", help="Why the images are removed. The manifest records the reason."
)
@click.option("--dry-run", is_flag=True, help="Only show how many images would be removed.")
@click.option(
    "--thumbnails", metavar="FOLDER", help="The folder where `serve` stores thumbnails.  [default: the user's cache]"
)
def command(
    folders: tuple[str, ...],
    ids: tuple[str, ...],
    files: tuple[str, ...],
    reason: str,
    dry_run: bool,
    thumbnails: str | None,
) -> None:
    """Remove images from each FOLDER: a collection, a manifest (list of images), another dataset, or an index.

    A collection is a folder that `captionlib init` created. After the removal, no FOLDER contains the images. Later
    updates of the manifest skip them, because its file `_removed.json` lists hashes of their ids. The image files
    themselves are not deleted. Models that were trained on the images do not change. To remove the images from a model,
    train it again. If it has a datastore, run `build-datastore` again, because a datastore contains captions of
    training images.

    \b
    Examples:
      captionlib remove holidays --id 2024/beach.jpg --reason "requested by the person shown"
      captionlib remove holidays --ids ids.txt --dry-run
      captionlib remove manifest features captions embeddings index --ids ids.txt
    """
    from captionlib.collection import Collection
    from captionlib.data.shards.removal import plan_removal
    from captionlib.data.sources.values import is_unicode

    requested_ids = {*filter(None, ids), *(image_id for file in files for image_id in _read_ids(file))}
    if not requested_ids:
        raise click.UsageError("expected ids of images to remove (--id or --ids), got none.")
    if invalid := [image_id for image_id in requested_ids if not is_unicode(image_id)]:
        raise ConfigError(f"--id: expected text in UTF-8, got {invalid[0]!a}")
    with open_datasets(folders, "remove", Collection.find_datasets, lock=not dry_run) as (datasets, indexes):
        plans = [plan_removal(dataset, requested_ids, reason) for dataset in datasets]
        plans.sort(key=lambda plan: _ORDER.index(plan.dataset.kind))
        for plan in plans:
            click.echo(f"{plan.dataset.folder.uri}: {len(plan.found):,} of {len(requested_ids):,} images")
        if missing := sorted(requested_ids.difference(*(plan.found for plan in plans))):
            click.echo(f"Not found: {len(missing):,} ids, for example {missing[0][:200]!r}", err=True)
        if dry_run:
            return
        _require_references(indexes)
        for plan in plans:
            plan.run()
        for address in indexes:
            try:
                _rebuild_index(address, requested_ids)
            except CaptionlibError as error:
                raise DatasetError(
                    f"{address} still contains the images, because it cannot be updated: {error}. Correct this, then "
                    "run the same command again"
                ) from error
    _remove_thumbnails(plans, thumbnails)
    if not any(plan.dataset.kind == "manifest" for plan in plans):
        click.echo("No manifest was specified, so the next update of the manifest adds the images again.", err=True)


def _read_ids(file: str) -> list[str]:
    try:
        return [line for line in Path(file).read_text(encoding="utf-8-sig").split("\n") if line]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"--ids: {file} cannot be read ({error}); expected a text file with one id per line"
        ) from error


def _require_references(indexes: Sequence[str]) -> None:
    """Raises DatasetError if the references cannot be read when the indexes are built again."""
    from captionlib.data.shards.dataset import open_dataset
    from captionlib.search.index_folder import read_description
    from captionlib.search.inputs import find_manifest
    from captionlib.storage.folders import Folder

    for address in indexes:
        description = read_description(Folder(address))
        if description is not None and description.config.references:
            for captions in description.captions:
                find_manifest(open_dataset(captions.folder))


def _rebuild_index(address: str, removed_ids: Collection[str]) -> None:
    """Removes images from an index after they were removed from its datasets."""
    from captionlib.search.index_folder import read_description
    from captionlib.storage.folders import Folder
    from pipelines.build_index import build_index
    from pipelines.run import RunConfig

    description = read_description(Folder(address))
    if description is None:  # the first build was interrupted
        for name in Folder(address).list():
            Folder(address).remove(name)
        return
    captions, embeddings = (
        [dataset.folder for dataset in datasets] for datasets in (description.captions, description.embeddings)
    )
    build, index = build_index(
        captions,
        address,
        description.config,
        embeddings=embeddings or None,
        duplicates=_rebuild_duplicates(description),
        removed_ids=removed_ids,
        run=RunConfig(progress=False),
    )
    build.remove_previous_version()
    click.echo(f"{address}: {index.captions_count:,} captions")


def _rebuild_duplicates(description: IndexDescription) -> str | None:
    """Computes the duplicates again if the removal has made them incomplete. Returns their folder, if there is one."""
    if description.duplicates is None:
        return None
    from captionlib.data.shards.dataset import open_dataset
    from captionlib.search.duplicates import find_duplicates

    folder = description.duplicates.folder
    duplicates = open_dataset(folder, "duplicates")
    embeddings = [dataset.folder for dataset in description.embeddings]
    if duplicates.is_complete():
        return folder
    if not embeddings:
        click.echo(
            f"{folder} is incomplete now, so the index includes duplicates; run deduplicate and build-index", err=True
        )
        return None
    find_duplicates(embeddings, folder, duplicates.config["threshold"])
    return folder


def _remove_thumbnails(plans: Sequence[Removal], folder: str | None) -> None:
    from captionlib.search.index_folder import user_cache_folder

    path = Path(folder) if folder else user_cache_folder() / "thumbnails"
    if path.is_dir():
        from captionlib.serving.thumbnails import remove_thumbnails

        remove_thumbnails(path, {uri for plan in plans for uri in plan.uris})
