"""The command `captionlib generate-captions`."""

from typing import Any

import click

from jobs.options import captioner_option, config_options, device_option, limit_option, pipeline_options, weights_option
from jobs.summaries import print_remaining_cost, print_totals

__all__ = ["command"]


@click.command()
@click.argument("source")
@click.option("--output", "-o", required=True, metavar="FOLDER", help="The captions dataset to write.")
@captioner_option(
    "--checkpoint",
    example_arguments="generate-captions {source} -o {output}",
    help_text="Folder that train-captioner wrote, or hf:MODEL, a captioner from Hugging Face (name or folder).",
)
@click.option(
    "--ranker",
    metavar="FOLDER",
    help="Ranker that scores how well each caption fits its image: a folder that train-ranker wrote, or hf:MODEL.",
)
@click.option("--embeddings", metavar="FOLDER", help="The embeddings dataset to write; requires --ranker.")
@weights_option
@limit_option
@config_options
@device_option
@pipeline_options
def command(
    source: str,
    checkpoint: str,
    output: str,
    embeddings: str | None,
    limit: int | None,
    config: str | None,
    overrides: tuple[str, ...],
    **options: Any,
) -> None:
    """Caption every image of SOURCE, a features dataset or a manifest (list of images).

    If SOURCE is a manifest, the images are encoded and captioned in one pass. The output is a captions dataset: the
    best caption of each image, its log-probability, and the n best candidates (decoding.n_best). With --set
    attention_maps=true, the dataset also contains the attention weights of each token.

    --ranker specifies a dual encoder of images and text. It adds the column image_text_score, which measures how well
    each caption fits its image. --embeddings also writes the output of `captionlib embed`, without encoding the images
    again.

    With --limit, the output contains only a sample. To caption all images later, choose a different folder.

    \b
    Examples:
      captionlib generate-captions manifest -c hf:Salesforce/blip-image-captioning-large@main -o captions
      captionlib generate-captions features -c captioner -o captions
      captionlib generate-captions features -c captioner -o sample --limit 500
      captionlib generate-captions features -c captioner -o captions --set decoding.beam_width=7 --set decoding.n_best=3
      captionlib generate-captions manifest -c captioner -o captions --ranker ranker --embeddings embeddings --workers 2
    """
    from captionlib.config import load_config
    from captionlib.models.inference.captioning import GenerationConfig
    from pipelines.generate_captions import generate_captions

    settings = load_config(GenerationConfig, config, overrides)
    totals = generate_captions(source, checkpoint, output, settings, embeddings=embeddings, limit=limit, **options)
    print_totals(output, totals)
    if embeddings is not None:
        click.echo(f"{embeddings}: embeddings of the same images")
    if limit is not None:
        outputs = [output] if embeddings is None else [output, embeddings]
        print_remaining_cost(source, outputs, options["run"].workers)
