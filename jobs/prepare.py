"""The command `captionlib prepare`."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import click

from jobs.options import progress_option

if TYPE_CHECKING:
    from captionlib.data.ingestion.changes import Changes
    from captionlib.data.ingestion.prepare import PrepareSummary

__all__ = ["command"]


def _parse_split_files(_context: click.Context, _option: click.Parameter, pairs: tuple[str, ...]) -> dict[str, str]:
    files = {}
    for pair in pairs:
        split, equals, file = pair.partition("=")
        if not (split and equals and file):
            raise click.BadParameter(f"expected SPLIT=FILE, such as train=train.txt, got {pair!r}")
        files[split] = file
    return files


def _parse_columns(_context: click.Context, _option: click.Parameter, names: str | None) -> tuple[str, ...]:
    return tuple(name.strip() for name in names.split(",")) if names else ()


@click.command()
@click.argument("sources", nargs=-1, required=True, metavar="SOURCE...")
@click.option("--output", "-o", required=True, metavar="FOLDER", help="Folder for the manifest.")
@click.option(
    "--format",
    "source_format",
    type=click.Choice(["auto", "folder", "coco", "karpathy", "flickr", "table", "webdataset", "hf-parquet"]),
    default="auto",
    show_default=True,
    help="Format of SOURCE. With auto, it is detected from file names and contents.",
)
@click.option(
    "--images",
    "image_root",
    metavar="FOLDER",
    help="Folder that image paths are relative to.  [default: the folder of SOURCE]",
)
@click.option("--default-split", default="", metavar="NAME", help="Split of the images that have no split in SOURCE.")
@click.option(
    "--split-file",
    "split_files",
    multiple=True,
    metavar="SPLIT=FILE",
    callback=_parse_split_files,
    help="Flickr: file with the image names of a split. Repeatable.  [default: official files in the folder of SOURCE]",
)
@click.option(
    "--id-column", metavar="NAME", help="Tables: column of the image id.  [default: image_id, id, ..., or the uri]"
)
@click.option(
    "--uri-column", metavar="NAME", help="Tables: column of the image path or URL.  [default: uri, url, path, ...]"
)
@click.option(
    "--image-column",
    metavar="NAME",
    help="Parquet: column of encoded images.  [default: image, jpg, png, ..., or any struct<bytes, path>]",
)
@click.option(
    "--caption-column",
    "caption_columns",
    multiple=True,
    metavar="NAME",
    help="Tables: column of a caption or a list of captions. Repeatable.  [default: captions, caption, text, ...]",
)
@click.option(
    "--caption-language",
    metavar="KEY",
    help="Tables: key of the captions in maps such as {en: ..., de: ...}.  [default: all captions of a Parquet map]",
)
@click.option("--captions/--no-captions", default=True, show_default=True, help="Include the captions of SOURCE.")
@click.option("--split-column", metavar="NAME", help="Tables: column of the split.  [default: split, subset]")
@click.option(
    "--columns",
    metavar="NAME,...",
    callback=_parse_columns,
    help="CSV and TSV without a header: all column names, such as image,caption.",
)
@click.option("--tsv-quotes", is_flag=True, help="TSV: cells may be quoted, as in CSV.  [default: quotes are literal]")
@click.option("--split", "splits", multiple=True, metavar="NAME", help="Include only this split. Repeatable.")
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Include only the first N images.")
@click.option(
    "--version-column",
    metavar="NAME",
    help="Tables: column whose value changes when the image changes.  [default: size and modification time of a local "
    "file, or the uri]",
)
@click.option(
    "--shard-size",
    type=click.IntRange(min=1),
    metavar="N",
    help="Images per shard of a new manifest.  [default: 1000; more for over 100,000 images]",
)
@click.option(
    "--check-images/--no-check-images",
    default=True,
    show_default=True,
    help="Stop if SOURCE lists image paths and none of the first 20 images exists.",
)
@click.option("--strict", is_flag=True, help="Stop at invalid images or captions instead of skipping them.")
@click.option("--append", is_flag=True, help="SOURCE lists only new images; keep all others.")
@click.option("--allow-removal", is_flag=True, help="Allow an update to remove more than a tenth of the images.")
@click.option(
    "--verify-content",
    metavar="FOLDER",
    help="Features or captions dataset of these images. Images that seem unchanged are read, and their hashes are "
    "compared with the content_hash column of this dataset.",
)
@click.option("--dry-run", is_flag=True, help="Show how many images are new, changed and missing, and write nothing.")
@click.option("--overwrite", is_flag=True, help="Replace the manifest with a new one instead of updating it.")
@progress_option
def command(
    sources: tuple[str, ...], output: str, dry_run: bool, overwrite: bool, progress: bool, **options: Any
) -> None:
    """Convert images, with or without reference captions, to a manifest.

    A manifest is a Parquet dataset with one row per image: image_id, uri, version, split and captions. Images are not
    copied. If the manifest exists, it is updated: new images are added, changed images are replaced, and images that
    are no longer in the sources are removed. Later stages then process only new and changed images. Image ids must be
    unique. Invalid rows and captions are skipped and counted by reason.

    SOURCE is a path, a URL such as s3://bucket/images, or a glob, in one of these formats:

    \b
    folder: image files. The id is the path relative to the folder.
      captionlib prepare images/ -o manifest
      captionlib prepare 'images/**/*.jpg' -o manifest --default-split test
    \b
    coco: COCO caption files. Images are found in train2014/ and val2014/ of the image folder.
      captionlib prepare captions_train2014.json captions_val2014.json --images coco/ -o manifest
    \b
    karpathy: Karpathy's dataset.json with the splits train, restval, val and test.
      captionlib prepare dataset.json --images coco/ -o manifest
    \b
    flickr: lines of NAME.jpg#K, a tab and a caption. Official split files in the same folder are used.
      captionlib prepare Flickr8k.token.txt --images Flicker8k_Dataset/ -o manifest
      captionlib prepare results.token --split-file train=train.txt --split-file val=val.txt -o manifest
    \b
    table: CSV, TSV, JSON (lines or a list; also .gz) or Parquet with one row per image or per caption. If the caption
    is the last column of a CSV or text file, it may contain unquoted commas.
      captionlib prepare pairs.csv --uri-column url --caption-column alt -o manifest
      captionlib prepare captions.txt --columns image,caption --images Images/ -o manifest
      captionlib prepare 's3://bucket/table/*.parquet' -o manifest
    \b
    webdataset: uncompressed tars of 000.jpg, 000.txt (or .caption), 000.json, 001.jpg, ...
      captionlib prepare 'shards/{00000..00099}.tar' -o manifest
    \b
    hf-parquet: Parquet with embedded images, in a column of bytes or of struct<bytes, path>, as on Hugging Face.
      captionlib prepare 'data/train-*.parquet' --default-split train -o manifest
    """
    from captionlib.data.ingestion.prepare import PrepareConfig, prepare
    from captionlib.data.sources.rows import SourceOptions

    # Options have the names of the fields that they set.
    source_options = {field.name: options.pop(field.name) for field in dataclasses.fields(SourceOptions)}
    config = PrepareConfig(options=SourceOptions(**source_options), **options)
    summary = prepare(
        sources, output, config, overwrite=overwrite, dry_run=dry_run, report_changes=_echo_changes, progress=progress
    )
    _echo_summary(output, summary, dry_run)


def _echo_changes(changes: Changes) -> None:
    click.echo(
        f"{changes.new:,} new, {changes.changed:,} changed, {changes.missing:,} missing, "
        f"{changes.unchanged:,} unchanged images"
    )


def _echo_summary(output: str, summary: PrepareSummary, dry_run: bool) -> None:
    if dry_run:
        click.echo(f"{output}: {'update' if summary.is_update else 'new manifest'}, not written (dry run)")
    elif summary.already_prepared:
        click.echo(f"{output}: already prepared, nothing to do")
    else:
        click.echo(f"{output}: {'updated' if summary.is_update else 'prepared'} from format {summary.source_format}")
    rows = [
        ("images", summary.images),
        ("captions", summary.captions),
        ("shards", summary.shards),
        *((f"split {split or '(none)'}", count) for split, count in sorted(summary.splits.items())),
        *((f"skipped: {reason}", count) for reason, count in summary.skipped.items()),
    ]
    width = max(len(name) for name, _ in rows)
    for name, count in rows:
        click.echo(f"  {name:<{width}}  {count:>11,}")
    for reason, example in summary.examples.items():
        click.echo(f"Skipped: {reason}, for example {example}", err=True)
