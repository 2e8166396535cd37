"""The command `captionlib status`."""

from datetime import timedelta

import click

from captionlib.errors import DatasetError

__all__ = ["command"]


@click.command()
@click.argument("collection")
def command(collection: str) -> None:
    """Show what is finished and what failed in COLLECTION, and what an update still has to do.

    The command does not read the sources. `captionlib update COLLECTION --dry-run` shows what has changed in them.

    \b
    Examples:
      captionlib status holidays
      captionlib update holidays --dry-run
    """
    from captionlib.collection import open_collection
    from captionlib.data.shards.inspection import inspect_dataset
    from captionlib.search.index_folder import read_description
    from captionlib.storage.folders import Folder

    opened = open_collection(collection)
    pending = False
    for address in opened.list_datasets():
        try:
            report = inspect_dataset(address)
        except DatasetError:
            if Folder(address).list():
                raise
            click.echo(f"{address}: not started")
            pending = True
            continue
        progress = "complete" if report.complete else f"{report.shards_done:,} of {report.shards:,} shards finished"
        cost = f", {timedelta(seconds=round(report.seconds))} of computing time" if report.kind != "manifest" else ""
        click.echo(f"{address}: {report.rows:,} images, {progress}{cost}")
        if report.stale:
            click.echo(f"  {report.stale:,} shards of its input have changed since it was written")
        for reason, failure in report.failures.items():
            example = f", for example {failure.examples[0].uri}" if failure.examples else ""
            click.echo(f"  failed: {reason} {failure.count:,}{example}")
        pending = pending or not report.complete or bool(report.stale)
    index = read_description(Folder(opened.index))
    click.echo(f"{opened.index}: " + ("not started" if index is None else f"{index.captions_count:,} captions"))
    if pending or index is None:
        click.echo(f"To finish: captionlib update {collection}")
