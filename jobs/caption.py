"""`captionlib caption`."""

import json
import math
import sys

import click

from captionlib.config import load_config
from captionlib.models.generation import GenerationConfig, caption_images
from jobs.options import config_options, device_option

__all__ = ["command"]


@click.command()
@click.argument("images", nargs=-1, required=True)
@click.option("--checkpoint", "-c", required=True, metavar="FOLDER", help="The captioner, as train-captioner wrote it.")
@click.option("--weights", metavar="FILE", help="The encoder's weights, where they are a file of your own.")
@click.option("--n-best", type=click.IntRange(min=1), default=1, show_default=True, help="Captions an image.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line.")
@config_options
@device_option
def command(
    images: tuple[str, ...],
    checkpoint: str,
    weights: str | None,
    n_best: int,
    as_json: bool,
    config: str | None,
    overrides: tuple[str, ...],
    device: str,
) -> None:
    """Print captions of single IMAGES, paths or addresses, with their probabilities.

    \b
    Examples:
      captionlib caption photo.jpg -c captioner
      captionlib caption *.jpg https://example.org/cat.png -c captioner --n-best 3
    """
    settings = load_config(GenerationConfig, config, [*overrides, f"decoding.n_best={n_best}"])
    rows, failures = caption_images(images, checkpoint, settings, weights=weights, device=device)
    for row in rows:
        if as_json:
            click.echo(json.dumps(row, ensure_ascii=False))
            continue
        click.echo(row["uri"])
        for candidate in row["candidates"]:
            click.echo(f"  {math.exp(candidate['log_prob']):7.2%}  {candidate['caption']}")
    for uri, error in failures:
        click.echo(f"{uri}: {error}", err=True)
    sys.exit(1 if failures else 0)
