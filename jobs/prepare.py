"""`captionlib prepare`."""

import click

from captionlib.data.ingestion.prepare import PrepareConfig, PrepareSummary, prepare_manifest
from captionlib.data.sources.formats import SOURCE_FORMATS
from captionlib.data.sources.rows import SourceOptions

__all__ = ["command"]


@click.command()
@click.argument("sources", nargs=-1, required=True, metavar="SOURCE...")
@click.option("--output", "-o", required=True, metavar="FOLDER", help="The manifest to write.")
@click.option(
    "--format",
    "source_format",
    type=click.Choice(["auto", *SOURCE_FORMATS]),
    default="auto",
    show_default=True,
    help="What SOURCE is; auto tells it by its name and content.",
)
@click.option("--images", metavar="FOLDER", help="What image paths in SOURCE are relative to. [default: its folder]")
@click.option("--default-split", default="", metavar="NAME", help="The split of images whose source names none.")
@click.option(
    "--split-file",
    "split_files",
    multiple=True,
    metavar="SPLIT=FILE",
    help="Flickr: the names of a split's images. Repeatable. [default: the official files beside the captions]",
)
@click.option("--id-column", metavar="NAME", help="Tables: the image id. [default: image_id, id ..., else the uri]")
@click.option(
    "--uri-column", metavar="NAME", help="Tables: where the image is. [default: uri, url, path, file_name ...]"
)
@click.option(
    "--caption-column",
    "caption_columns",
    multiple=True,
    metavar="NAME",
    help="Tables: a caption or a list of them. Repeatable. [default: captions, caption, text ...]",
)
@click.option("--split-column", metavar="NAME", help="Tables: the split. [default: split]")
@click.option("--split", "splits", multiple=True, metavar="NAME", help="Keep this split alone. Repeatable.")
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Keep the first N images.")
@click.option("--shard-size", type=click.IntRange(min=1), default=1000, show_default=True, help="Images a shard.")
@click.option(
    "--check-images/--no-check-images",
    default=True,
    help="Stop if none of the first images that a file lists can be found. [default: check]",
)
@click.option("--overwrite", is_flag=True, help="Replace a manifest of other images.")
@click.option("--progress/--no-progress", default=True, help="Show a progress bar.")
def command(
    sources: tuple[str, ...],
    output: str,
    source_format: str,
    images: str | None,
    default_split: str,
    split_files: tuple[str, ...],
    id_column: str | None,
    uri_column: str | None,
    caption_columns: tuple[str, ...],
    split_column: str | None,
    splits: tuple[str, ...],
    limit: int | None,
    shard_size: int,
    check_images: bool,
    overwrite: bool,
    progress: bool,
) -> None:
    """Turn any SOURCE of images, with captions or without, into a manifest: a row an image.

    A row is image id, uri, split and captions. Ids are unique: a duplicate is an error that names both rows. The same
    source gives the same manifest, and a second run finds it there. Paths may be addresses such as s3://bucket/photos.

    \b
    A folder or a glob of images; the id is the path below it:
      captionlib prepare photos/ -o manifest
      captionlib prepare 'photos/**/*.jpg' -o manifest --default-split test
    \b
    COCO's captions; train2014/ and val2014/ are found in --images:
      captionlib prepare captions_train2014.json captions_val2014.json --images coco/ -o manifest
    \b
    Karpathy's splits (train, restval, val, test):
      captionlib prepare dataset.json --images coco/ -o manifest
    \b
    Flickr8k and Flickr30k; the official split files beside it are used:
      captionlib prepare Flickr8k.token.txt --images Flicker8k_Dataset/ -o manifest
      captionlib prepare results.token --split-file train=train.txt --split-file val=val.txt -o manifest
    \b
    Tables: CSV, TSV, JSON Lines and Parquet, also compressed, a row an image or a row a caption:
      captionlib prepare pairs.csv --uri-column url --caption-column alt -o manifest
      captionlib prepare 's3://bucket/table/*.parquet' -o manifest
    \b
    WebDataset tars, and Parquet with the images in the rows (the Hugging Face layout); nothing is unpacked:
      captionlib prepare 'shards/{00000..00099}.tar' -o manifest
      captionlib prepare 'data/train-*.parquet' --split train -o manifest
    """
    options = SourceOptions(
        images, default_split, _parse_split_files(split_files), id_column, uri_column, caption_columns, split_column
    )
    config = PrepareConfig(source_format, options, splits, limit, shard_size, check_images)
    echo_summary(output, prepare_manifest(sources, output, config, overwrite=overwrite, progress=progress))


def _parse_split_files(pairs: tuple[str, ...]) -> dict[str, str]:
    files = {}
    for pair in pairs:
        split, equals, file = pair.partition("=")
        if not (split and equals and file):
            raise click.BadParameter(
                f"expected SPLIT=FILE, such as train=train.txt, got {pair!r}", param_hint="--split-file"
            )
        files[split] = file
    return files


def echo_summary(output: str, summary: PrepareSummary) -> None:
    """Prints what a manifest holds, and what of its source it does not."""
    if summary.already_prepared:
        click.echo(f"{output}: already prepared, nothing to do")
    else:
        click.echo(f"{output}: prepared from {summary.source_format}")
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
