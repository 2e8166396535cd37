"""The command `captionlib embed`."""

from typing import Any

import click

from jobs.options import config_options, device_option, pipeline_options, weights_option
from jobs.summaries import print_totals

__all__ = ["command"]


@click.command()
@click.argument("source")
@click.option(
    "--ranker",
    "-r",
    required=True,
    metavar="FOLDER",
    help="Folder that train-ranker wrote, or hf:MODEL for a dual encoder from Hugging Face, such as CLIP. MODEL is its "
    "name or folder.",
)
@click.option("--output", "-o", required=True, metavar="FOLDER", help="The embeddings dataset to write.")
@weights_option
@config_options
@device_option
@pipeline_options
def command(
    source: str, ranker: str, output: str, config: str | None, overrides: tuple[str, ...], **options: Any
) -> None:
    """Embed every image of SOURCE: a dataset of image features, or a manifest (list of images).

    The ranker is a dual encoder: it maps images and sentences to unit vectors in the same space. The output is an
    embeddings dataset, which contains the vector of each image. If SOURCE is a manifest, the image features are
    computed in the same pass.

    To also caption the images, run `captionlib generate-captions` with --ranker and --embeddings instead. It writes
    captions and embeddings in one pass.

    \b
    Examples:
      captionlib embed manifest -r hf:google/siglip-base-patch16-224@main -o embeddings
      captionlib embed features -r ranker -o embeddings
      captionlib embed manifest -r ranker -o embeddings --workers 2
      captionlib embed s3://b/features -r s3://b/ranker -o s3://b/embeddings -- --runner=FlinkRunner
    """
    from captionlib.config import load_config
    from captionlib.models.inference.embedding import EmbeddingConfig
    from pipelines.embed_images import embed_images

    settings = load_config(EmbeddingConfig, config, overrides)
    print_totals(output, embed_images(source, ranker, output, settings, **options))
