"""The command `captionlib export`."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import click

from jobs.options import progress_option

if TYPE_CHECKING:
    from captionlib.data.exports import ExportFormat
    from captionlib.data.selection import ImageSelection
    from captionlib.evaluation.json_exports import JsonFormat

__all__ = ["command"]

_FORMATS = {
    "webdataset": "tars of images with .txt and .json",
    "metadata": "folders of images with metadata.jsonl, for Hugging Face's datasets",
    "txt": "folders of images with a .txt beside each image",
    "coco": "a JSON file in COCO's format",
    "neuraltalk": "NeuralTalk's result_struct.json",
}
_JSON = ("coco", "neuraltalk")


@click.command()
@click.argument("captions", nargs=-1, required=True, metavar="CAPTIONS|COLLECTION...")
@click.option(
    "--to",
    type=click.Choice(list(_FORMATS)),
    required=True,
    help="; ".join(f"{name}: {description}" for name, description in _FORMATS.items()) + ".",
)
@click.option("--output", "-o", required=True, metavar="FOLDER|FILE", help="The folder or JSON file to write.")
@click.option("--split", "splits", multiple=True, metavar="NAME", help="Export this split only. Repeatable.")
@click.option("--where", metavar="CONDITION", help='SQL condition on the rows, such as "log_prob > -10".')
@click.option("--duplicates", metavar="FOLDER", help="Output of `captionlib deduplicate`, to leave out duplicates.")
@click.option(
    "--manifest",
    "-m",
    metavar="FOLDER",
    help="Manifest (list of images) or features dataset with the references; for coco and neuraltalk.",
)
@progress_option
def command(
    captions: tuple[str, ...],
    to: str,
    output: str,
    splits: tuple[str, ...],
    where: str | None,
    duplicates: str | None,
    manifest: str | None,
    progress: bool,
) -> None:
    """Export CAPTIONS for other programs, with or without the images.

    CAPTIONS are captions datasets. They can also be manifests (lists of images) or features datasets, whose references
    are exported. COLLECTION is a folder that `captionlib init` created; all its captions are exported.

    webdataset, metadata and txt copy the images unchanged. Images that cannot be read are left out and counted. To
    resume an interrupted export, or to bring it up to date after CAPTIONS has changed, run the same command again.

    coco and neuraltalk write one JSON file without images, and also accept JSON files in these formats as CAPTIONS.
    COCO's results file contains no references, so it can also be written for COCO's test split, whose references are
    secret. NeuralTalk's file also contains references, which are read from --manifest.

    \b
    Examples:
      captionlib export captions --to webdataset -o tars
      captionlib export captions --to metadata -o imagefolder --split train --duplicates duplicates
      captionlib export captions --to txt -o images --where "log_prob > -10 AND tokens < 20"
      captionlib export holidays --to txt -o images --duplicates holidays/duplicates
      captionlib export captions --to coco -o captions_test2014_results.json --split test
      captionlib export manifest --to coco -o captions_val2014.json --split val
      captionlib export captions --to neuraltalk -o result_struct.json --manifest manifest
    """
    if to not in _JSON and manifest is not None:
        raise click.UsageError(f"--manifest is for --to {' and '.join(_JSON)}, got --to {to}; leave it out.")
    from captionlib.collection import expand_collections

    captions = tuple(expand_collections(captions))
    selection = _select(captions, splits, where, duplicates)
    if to in _JSON:
        from captionlib.evaluation.json_exports import export_json

        count = export_json(captions, output, cast("JsonFormat", to), selection=selection, manifest=manifest)
        click.echo(f"{output}: {count:,} images in {'NeuralTalk' if to == 'neuraltalk' else 'COCO'}'s format")
        return
    from captionlib.data.exports import export_images

    summary = export_images(captions, output, cast("ExportFormat", to), selection=selection, progress=progress)
    click.echo(f"{output}: {summary.images:,} images")
    if summary.failures:
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in summary.failures.items())
        click.echo(f"{sum(summary.failures.values()):,} images were not exported ({reasons})", err=True)


def _select(
    captions: tuple[str, ...], splits: tuple[str, ...], where: str | None, duplicates: str | None
) -> ImageSelection:
    from captionlib.data.selection import select_images

    included = None
    if where is not None:
        from captionlib.search.sql.session import open_sql

        with open_sql(captions) as session:
            included = session.find_matching(where)
    return select_images(splits, duplicates, included)
