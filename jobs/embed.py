"""The command `captionlib embed`."""

from typing import Any

import click

from jobs.options import config_options, device_option, pipeline_options, weights_option
from jobs.summaries import echo_totals

__all__ = ["command"]


@click.command()
@click.argument("source")
@click.option(
    "--ranker",
    "-r",
    required=True,
    metavar="FOLDER",
    help="Ranker that train-ranker wrote, or a model such as hf:FOLDER.",
)
@click.option("--output", "-o", required=True, metavar="FOLDER", help="The embeddings dataset to write.")
@weights_option
@config_options
@device_option
@pipeline_options
def command(
    source: str, ranker: str, output: str, config: str | None, overrides: tuple[str, ...], **options: Any
) -> None:
    """Embed every image of SOURCE, a features dataset or a manifest (list of images).

    If SOURCE is a manifest, its images are encoded and embedded in one pass. Writes an embeddings dataset of unit
    vectors in the joint space of the ranker, a dual encoder for image-text retrieval. `captionlib generate-captions`
    with --ranker and --embeddings writes the same dataset and captions in one pass, which encodes the images only once.

    \b
    Examples:
      captionlib embed features -r ranker -o embeddings
      captionlib embed manifest -r ranker -o embeddings --workers 2
      captionlib embed s3://b/features -r s3://b/ranker -o s3://b/embeddings -- --runner=FlinkRunner
    """
    from captionlib.config import load_config
    from captionlib.models.inference.embedding import EmbeddingConfig
    from pipelines.embed_images import embed_images

    settings = load_config(EmbeddingConfig, config, overrides)
    echo_totals(output, embed_images(source, ranker, output, settings, **options))
