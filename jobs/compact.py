"""The command `captionlib compact`."""

from contextlib import ExitStack

import click

from jobs.options import progress_option

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
    from captionlib.collection import is_collection, open_collection
    from captionlib.data.shards.compaction import plan_compaction
    from captionlib.data.shards.dataset import open_dataset
    from captionlib.data.shards.markers import DESCRIPTION_FILE
    from captionlib.errors import DatasetError
    from captionlib.progress import progress_bar
    from captionlib.search.index_folder import INDEX_FILE
    from captionlib.storage.folders import Folder
    from captionlib.storage.lock import lock_folder

    with ExitStack() as stack:
        addresses: list[str] = []
        for folder in folders:
            if is_collection(folder):
                collection = open_collection(folder)
                stack.enter_context(lock_folder(collection.folder, "captionlib compact"))
                addresses += [
                    address for address in collection.list_datasets() if Folder(address).exists(DESCRIPTION_FILE)
                ]
            elif not Folder(folder).exists(INDEX_FILE):  # an index has no shards to compact
                addresses.append(folder)
        if not addresses:
            raise DatasetError(f"{folders[0]}: expected datasets to compact, got none; run `captionlib update` first")
        for address in addresses:
            stack.enter_context(lock_folder(open_dataset(address).folder, "captionlib compact"))
        plans = plan_compaction([open_dataset(address) for address in addresses], shard_size)
        with progress_bar("compact", sum(plan.images for plan in plans), "images", progress) as bar:
            for plan in plans:
                before = plan.dataset
                after = plan.run(bar.update)
                if after == before:
                    bar.skip(plan.images)
                    click.echo(f"{before.folder.uri}: nothing to do")
                else:
                    click.echo(f"{before.folder.uri}: {before.shards:,} shards became {after.shards:,}")
