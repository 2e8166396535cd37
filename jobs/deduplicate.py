"""The command `captionlib deduplicate`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from captionlib.errors import ConfigError
from jobs.options import progress_option

if TYPE_CHECKING:
    from captionlib.collection import Collection

__all__ = ["command"]


@click.command()
@click.argument("embeddings", nargs=-1, required=True, metavar="EMBEDDINGS|COLLECTION...")
@click.option("--output", "-o", required=True, metavar="FOLDER", help="Folder for the groups of duplicates.")
@click.option(
    "--threshold",
    type=click.FloatRange(0, 1, min_open=True),
    default=0.94,
    show_default=True,
    help="Minimum cosine similarity of near-duplicates. With 1, only exact copies are duplicates.",
)
@click.option("--overwrite", is_flag=True, help="Replace an output that has a different threshold.")
@progress_option
def command(embeddings: tuple[str, ...], output: str, threshold: float, overwrite: bool, progress: bool) -> None:
    """Group the duplicates among the images of EMBEDDINGS.

    EMBEDDINGS is a dataset that `captionlib embed` wrote. COLLECTION is a folder that `captionlib init` created; the
    embeddings of all its images are used.

    Exact copies have files with equal bytes. Near-duplicates are resized, recompressed or slightly cropped copies: the
    cosine similarity of their embeddings is at least the threshold. The output is a Parquet dataset with the columns
    image_id, group, kept and similarity, and a row for each image of a group. The largest image of a group is kept. The
    column group has the id of the kept image, and similarity has the cosine similarity to the kept image. No image is
    deleted.

    \b
    Examples:
      captionlib deduplicate embeddings -o duplicates
      captionlib deduplicate embeddings-2025 embeddings-2026 -o duplicates --threshold 0.95
      captionlib query duplicates --sql "FROM duplicates WHERE NOT kept"
    """
    from captionlib.collection import expand_collections
    from captionlib.search.duplicates import find_duplicates

    addresses = expand_collections(embeddings, _require_embeddings)
    summary = find_duplicates(addresses, output, threshold, overwrite=overwrite, progress=progress)
    click.echo(
        f"{output}: {summary.duplicates:,} of {summary.images:,} images are duplicates, in {summary.groups:,} groups"
    )


def _require_embeddings(collection: Collection) -> list[str]:
    if collection.config.ranker is None:
        raise ConfigError(
            f"{collection.folder.uri} has no embeddings; set ranker in its collection.yaml, and run captionlib update"
        )
    return collection.list_embeddings()
