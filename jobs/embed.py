"""`captionlib embed`."""

from typing import Any

import click

from captionlib.config import load_config
from captionlib.models.inference.embedding import EmbeddingConfig
from jobs.options import config_options, device_option, pipeline_options, weights_option
from jobs.summaries import echo_totals
from pipelines.embed_images import embed_images

__all__ = ["command"]


@click.command()
@click.argument("source")
@click.option("--ranker", "-r", required=True, metavar="FOLDER", help="The ranker that train-ranker wrote.")
@click.option("--output", "-o", required=True, metavar="FOLDER", help="The embeddings dataset to write.")
@weights_option
@config_options
@device_option
@pipeline_options
def command(
    source: str, ranker: str, output: str, config: str | None, overrides: tuple[str, ...], **options: Any
) -> None:
    """Embed every image of SOURCE: a features dataset, or a manifest.

    Reads feature vectors, or encodes the images of a manifest with the ranker's encoder in the same pass. Writes an
    embeddings dataset: unit vectors in the joint space of images and sentences. `captionlib generate-captions --ranker`
    writes the same dataset and encodes the images only once for captions and embeddings.

    \b
    Examples:
      captionlib embed features -r ranker -o embeddings
      captionlib embed manifest -r ranker -o embeddings --workers 2
      captionlib embed s3://b/features -r s3://b/ranker -o s3://b/embeddings -- --runner=FlinkRunner
    """
    settings = load_config(EmbeddingConfig, config, overrides)
    echo_totals(output, embed_images(source, ranker, output, settings, **options))
