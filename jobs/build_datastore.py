"""The command `captionlib build-datastore`."""

from typing import Any

import click

from jobs.options import config_options, device_option, progress_option, weights_option

__all__ = ["command"]


@click.command()
@click.argument("source")
@click.option(
    "--checkpoint", "-c", required=True, metavar="FOLDER", help="Checkpoint of the captioner, from train-captioner."
)
@weights_option
@progress_option
@config_options
@device_option
def command(source: str, checkpoint: str, config: str | None, overrides: tuple[str, ...], **options: Any) -> None:
    """Build a captioner's datastore: the features and reference captions of its training images.

    SOURCE is a features dataset (from extract-features) or a manifest (list of images, from prepare). By default, the
    images of the splits train and restval are stored. The datastore is the file datastore.parquet in the checkpoint.

    If decoding.rerank.neighbors is set, `captionlib generate-captions` and `captionlib caption` use the datastore: they
    prefer captions that agree with the reference captions of similar training images.

    Do not include images that you want to caption: their own references would leak into their captions. Training the
    captioner again deletes the datastore.

    \b
    Examples:
      captionlib build-datastore features -c captioner
      captionlib build-datastore features -c captioner --set splits=[train]
      captionlib generate-captions features -c captioner -o captions --set decoding.beam_width=60 \\
        --set decoding.rerank.method=mbr --set decoding.rerank.temperature=6 --set decoding.rerank.neighbors=60
    """
    from captionlib.config import load_config
    from captionlib.models.inference.datastore import DatastoreConfig, build_datastore

    settings = load_config(DatastoreConfig, config, overrides)
    images, failed = build_datastore(source, checkpoint, settings, **options)
    unreadable = f"; {failed:,} could not be read" if failed else ""
    click.echo(f"{checkpoint}: {images:,} images in the datastore{unreadable}")
