"""The command `captionlib status`."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING

import click

from captionlib.errors import DatasetError, FingerprintError

if TYPE_CHECKING:
    from captionlib.collection import Collection

__all__ = ["command"]


@click.command()
@click.argument("collection")
def command(collection: str) -> None:
    """Show what is finished and what failed in COLLECTION, and what an update still has to do.

    COLLECTION is a folder that `captionlib init` created. The command does not look for new or changed images;
    `captionlib update COLLECTION --dry-run` does.

    \b
    Examples:
      captionlib status holidays
      captionlib update holidays --dry-run
    """
    from captionlib.collection import open_collection

    opened = open_collection(collection)
    states = {address: _show_dataset(address) for address in opened.list_datasets()}
    finished = all(states.values())
    if opened.config.duplicate_threshold is not None:
        has_embeddings = all(states[address] for address in opened.list_embeddings())
        finished = _show_duplicates(opened, opened.config.duplicate_threshold, has_embeddings) and finished
    if not _show_index(opened, finished):
        click.echo(f"To finish: captionlib update {collection}")
    for address in opened.find_datasets():
        if address not in (*opened.list_datasets(), opened.duplicates):
            click.echo(f"{address}: no longer part of the collection; delete the folder to free its space")


def _show_dataset(address: str) -> bool:
    """Shows the state of a dataset, and returns whether it is finished."""
    from captionlib.data.shards.inspection import inspect_dataset
    from captionlib.data.shards.markers import DESCRIPTION_FILE
    from captionlib.storage.folders import Folder

    if not Folder(address).exists(DESCRIPTION_FILE):
        click.echo(f"{address}: not started")
        return False
    report = inspect_dataset(address)
    # The marker of a shard, the file that records that it is finished, may have been lost.
    complete = report.complete and report.shards_done == report.shards
    progress = "complete" if complete else f"{report.shards_done:,} of {report.shards:,} shards finished"
    computing_time = timedelta(seconds=round(report.total_seconds))
    cost = f", {computing_time} of computing time in all updates" if report.kind != "manifest" else ""
    click.echo(f"{address}: {report.rows:,} images, {progress}{cost}")
    if report.stale:
        click.echo(f"  {report.stale:,} shards of its input have changed since it was written")
    for reason, failure in report.failures.items():
        example = f", for example {failure.examples[0].uri}" if failure.examples else ""
        click.echo(f"  failed: {reason} {failure.count:,}{example}")
    return complete and not report.stale


def _show_duplicates(collection: Collection, threshold: float, has_embeddings: bool) -> bool:
    """Shows the number of duplicates, and returns whether they are up to date."""
    from captionlib.search.duplicates import read_duplicate_summary

    summary = None
    if has_embeddings:
        summary = read_duplicate_summary(collection.list_embeddings(), collection.duplicates, threshold)
    if summary is None:
        click.echo(f"{collection.duplicates}: not started, or the images or the threshold have changed")
        return False
    click.echo(
        f"{collection.duplicates}: {summary.groups:,} groups, {summary.duplicates:,} of {summary.images:,} images are "
        "left out of the index"
    )
    return True


def _show_index(collection: Collection, has_finished_inputs: bool) -> bool:
    """Shows the state of the index, and returns whether it is up to date."""
    from captionlib.search.index_folder import read_description
    from captionlib.storage.folders import Folder

    description = read_description(Folder(collection.index))
    if description is None:
        click.echo(f"{collection.index}: not started")
        return False
    click.echo(f"{collection.index}: {description.captions_count:,} captions")
    if not has_finished_inputs:
        return False
    if not _is_current(collection):
        click.echo("  its datasets or settings have changed since it was built")
        return False
    return True


def _is_current(collection: Collection) -> bool:
    """Returns whether the index contains all rows of its datasets. The datasets must be finished."""
    from captionlib.search.build import plan_build  # imports Faiss, which is slow

    config = collection.config
    duplicates = None if config.duplicate_threshold is None else collection.duplicates
    captions, embeddings = collection.list_captions(), collection.list_embeddings() or None
    try:
        return plan_build(captions, embeddings, collection.index, config.index, duplicates=duplicates).is_done()
    except FingerprintError:  # collection.yaml now names other models
        return False
    except DatasetError as error:
        click.echo(f"  {error}", err=True)
        return False
