"""`captionlib build-datastore`."""

import click

from captionlib.config import load_config
from captionlib.models.inference.datastore import DatastoreConfig, build_datastore
from jobs.options import config_options, device_option

__all__ = ["command"]


@click.command()
@click.argument("source")
@click.option("--checkpoint", "-c", required=True, metavar="FOLDER", help="The captioner, as train-captioner wrote it.")
@click.option("--weights", metavar="FILE", help="The encoder's weights, where they are a file of your own.")
@click.option("--progress/--no-progress", default=True, help="Show a progress bar.")
@config_options
@device_option
def command(
    source: str,
    checkpoint: str,
    weights: str | None,
    progress: bool,
    config: str | None,
    overrides: tuple[str, ...],
    device: str,
) -> None:
    """Have a captioner remember the images of SOURCE that it learned from, and what people said of them.

    SOURCE is a features dataset or a manifest. A vector and the sentences of each image of the splits train and restval
    are kept beside the checkpoint, in datastore.parquet. Where decoding.rerank.neighbors is set, generate-captions and caption
    choose among the sentences that the captioner finds likely by what was said of the images most alike.

    \b
    Examples:
      captionlib build-datastore features -c captioner
      captionlib generate-captions features -c captioner -o captions --set decoding.beam_width=60 \\
        --set decoding.rerank.method=mbr --set decoding.rerank.temperature=6 --set decoding.rerank.neighbors=60
      captionlib build-datastore features -c captioner --set splits=[train]
    """
    settings = load_config(DatastoreConfig, config, overrides)
    images, failed = build_datastore(source, checkpoint, settings, weights=weights, device=device, progress=progress)
    left_out = f"; {failed:,} could not be read" if failed else ""
    click.echo(f"{checkpoint}: remembers {images:,} images{left_out}")
