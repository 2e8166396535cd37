"""The command `captionlib export`."""

from typing import Literal

import click

from jobs.options import progress_option

__all__ = ["command"]


@click.command()
@click.argument("datasets", nargs=-1, required=True, metavar="DATASET...")
@click.option(
    "--to",
    type=click.Choice(["webdataset", "huggingface"]),
    required=True,
    help="webdataset: tars of images with .txt and .json. huggingface: folders of images with metadata.jsonl.",
)
@click.option("--output", "-o", required=True, metavar="FOLDER", help="The folder to write.")
@click.option("--split", "splits", multiple=True, metavar="NAME", help="Export this split only. Repeatable.")
@click.option("--duplicates", metavar="FOLDER", help="Leave out duplicates, as listed by `captionlib deduplicate`.")
@progress_option
def command(
    datasets: tuple[str, ...],
    to: Literal["webdataset", "huggingface"],
    output: str,
    splits: tuple[str, ...],
    duplicates: str | None,
    progress: bool,
) -> None:
    """Export the images of DATASET with their captions, for other programs.

    DATASET is a captions dataset, or a manifest or features with references. Images are copied unchanged. Images that
    cannot be read are left out and counted. To resume an interrupted export, run the same command again.

    \b
    Examples:
      captionlib export captions --to webdataset -o tars
      captionlib export captions --to huggingface -o imagefolder --split train --duplicates duplicates
    """
    from captionlib.data.exports import export_images

    summary = export_images(datasets, output, to, splits=splits, duplicates=duplicates, progress=progress)
    click.echo(f"{output}: {summary.images:,} images")
    if summary.failures:
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in summary.failures.items())
        click.echo(f"{sum(summary.failures.values()):,} images were not exported ({reasons})", err=True)
