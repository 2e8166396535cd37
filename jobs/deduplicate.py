"""The command `captionlib deduplicate`."""

import click

from jobs.options import progress_option

__all__ = ["command"]


@click.command()
@click.argument("embeddings")
@click.option("--output", "-o", required=True, metavar="FOLDER", help="Folder for the groups of duplicates.")
@click.option(
    "--threshold",
    type=click.FloatRange(0, 1, min_open=True),
    default=0.97,
    show_default=True,
    help="Minimum cosine similarity of near-duplicates. With 1, only exact copies are duplicates.",
)
@click.option("--overwrite", is_flag=True, help="Replace an output that has a different threshold.")
@progress_option
def command(embeddings: str, output: str, threshold: float, overwrite: bool, progress: bool) -> None:
    """Group the duplicates among the images of EMBEDDINGS.

    Exact copies have files with equal bytes. Near-duplicates have embeddings with a cosine similarity of at least the
    threshold: resized, recompressed or slightly cropped copies. The largest image of a group is kept, and all others
    are similar to it. Writes a Parquet dataset of image_id, group (id of the kept image), kept and similarity, with a
    row for each image that has a duplicate. No image is deleted.

    \b
    Examples:
      captionlib deduplicate embeddings -o duplicates
      captionlib query duplicates --sql "FROM duplicates WHERE NOT kept"
    """
    from captionlib.search.duplicates import find_duplicates

    summary = find_duplicates(embeddings, output, threshold, overwrite=overwrite, progress=progress)
    click.echo(
        f"{output}: {summary.duplicates:,} of {summary.images:,} images are duplicates of {summary.groups:,} others"
    )
