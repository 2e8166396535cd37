"""The command `captionlib compact`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from captionlib.errors import DatasetError
from jobs.datasets import open_datasets
from jobs.options import progress_option

if TYPE_CHECKING:
    from captionlib.collection import Collection

__all__ = ["command"]


@click.command()
@click.argument("folders", nargs=-1, required=True, metavar="FOLDER...")
@click.option(
    "--shard-size",
    type=click.IntRange(min=1),
    metavar="N",
    help="Images per shard.  [default: depends on the number of images, as in `captionlib prepare`]",
)
@progress_option
def command(folders: tuple[str, ...], shard_size: int | None, progress: bool) -> None:
    """Merge small shards (files of a dataset) and split large ones, without recomputing anything.

    Pass a collection (a folder that `captionlib init` created), or a manifest (list of images) followed by all datasets
    that were made from it. Datasets that you leave out keep their old shards, and later commands reject them. Each
    dataset is rewritten and then replaced in one step, so it temporarily takes twice the space. If the command is
    interrupted, run it again. Until the command has finished, run no other command except `serve` on the datasets. An
    index stays valid; the next `build-index` or `update` switches it to the new shards.

    \b
    Examples:
      captionlib compact holidays
      captionlib compact manifest features captions embeddings --shard-size 5000
    """
    from captionlib.data.shards.compaction import plan_compaction
    from captionlib.progress import progress_bar

    with open_datasets(folders, "compact", _find_datasets) as (datasets, indexes):
        if not datasets:
            raise DatasetError(f"{indexes[0]}: expected datasets to compact, got an index")
        plans = plan_compaction(datasets, shard_size)
        with progress_bar("compact", sum(plan.images for plan in plans), "images", progress) as bar:
            for plan in plans:
                before = plan.dataset
                after = plan.run(bar.update)
                if after == before:
                    bar.skip(plan.images)
                    click.echo(f"{before.folder.uri}: nothing to do")
                else:
                    click.echo(f"{before.folder.uri}: {before.shards:,} shards became {after.shards:,}")


def _find_datasets(collection: Collection) -> list[str]:
    """Returns the datasets of the current sources. Those of removed sources may be incomplete."""
    existing = collection.find_datasets()
    return [address for address in collection.list_datasets() if address in existing]
