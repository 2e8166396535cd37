"""`captionlib generate-captions`."""

import click

from captionlib.config import load_config
from captionlib.models.inference.captioning import GenerationConfig
from jobs.options import config_options, device_option, pipeline_options
from jobs.summaries import echo_totals
from pipelines.generate_captions import generate_captions
from pipelines.run import RunConfig

__all__ = ["command"]


@click.command()
@click.argument("source")
@click.option("--checkpoint", "-c", required=True, metavar="FOLDER", help="The captioner, as train-captioner wrote it.")
@click.option("--output", "-o", required=True, metavar="FOLDER", help="The captions dataset to write.")
@click.option("--ranker", metavar="FOLDER", help="Also embed the images, with a ranker as train-ranker wrote it.")
@click.option("--embeddings", metavar="FOLDER", help="The embeddings dataset to write with --ranker.")
@click.option("--weights", metavar="FILE", help="The encoder's weights, where they are a file of your own.")
@config_options
@device_option
@pipeline_options
def command(
    source: str,
    checkpoint: str,
    output: str,
    ranker: str | None,
    embeddings: str | None,
    weights: str | None,
    config: str | None,
    overrides: tuple[str, ...],
    device: str,
    workers: int,
    overwrite: bool,
    retry_failures: bool,
    max_failure_ratio: float,
    progress: bool,
    accelerator: str | None,
    beam_options: tuple[str, ...],
) -> None:
    """Caption every image of SOURCE: a features dataset, or a manifest.

    From a manifest the images are encoded and captioned in one pass, with the encoder that the captioner was trained
    on. Each row has the best caption with its log-probability, and the n best; on request, also where a captioner with
    attention looked for each of its words. With a ranker of the same encoder the pass also writes embeddings, by which
    sentences find images; of captions made before, `captionlib embed` does.

    \b
    Examples:
      captionlib generate-captions features -c captioner -o captions
      captionlib generate-captions manifest -c captioner -o captions --workers 2
      captionlib generate-captions manifest -c captioner -o captions --ranker ranker --embeddings embeddings
      captionlib generate-captions features -c captioner -o captions --set decoding.beam_width=7 --set decoding.n_best=3
      captionlib generate-captions maps -c captioner -o captions --set attention_maps=true
    """
    totals = generate_captions(
        source,
        checkpoint,
        output,
        load_config(GenerationConfig, config, overrides),
        ranker=ranker,
        embeddings=embeddings,
        weights=weights,
        device=device,
        run=RunConfig(workers, beam_options, max_failure_ratio, retry_failures, overwrite, progress, accelerator),
    )
    echo_totals(output, totals)
    if embeddings is not None:
        click.echo(f"{embeddings}: the embeddings of the same images")
