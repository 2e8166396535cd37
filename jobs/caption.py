"""`captionlib caption`."""

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import click

from captionlib.config import load_config
from captionlib.evaluation.encoder_views import build_encoder_view
from captionlib.evaluation.predictions import Prediction
from captionlib.evaluation.report import write_report
from captionlib.models.checkpoints.checkpoint import load_captioner
from captionlib.models.inference.captioning import GenerationConfig, caption_images
from jobs.options import config_options, device_option

__all__ = ["command"]


@click.command()
@click.argument("images", nargs=-1, required=True)
@click.option("--checkpoint", "-c", required=True, metavar="FOLDER", help="The captioner, as train-captioner wrote it.")
@click.option("--weights", metavar="FILE", help="The encoder's weights, where they are a file of your own.")
@click.option("--n-best", type=click.IntRange(min=1), default=1, show_default=True, help="Captions an image.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line.")
@click.option("--report", metavar="FOLDER", help="Also write a page of the images; it is index.html in this folder.")
@config_options
@device_option
def command(
    images: tuple[str, ...],
    checkpoint: str,
    weights: str | None,
    n_best: int,
    as_json: bool,
    report: str | None,
    config: str | None,
    overrides: tuple[str, ...],
    device: str,
) -> None:
    """Print captions of single IMAGES, paths or addresses, with their probabilities.

    The page that --report writes also shows where a captioner with attention looked for each word.

    \b
    Examples:
      captionlib caption photo.jpg -c captioner
      captionlib caption *.jpg https://example.org/cat.png -c captioner --n-best 3
      captionlib caption photo.jpg -c captioner --report page
    """
    settings = load_config(GenerationConfig, config, [*overrides, f"decoding.n_best={n_best}"])
    if report is not None and load_captioner(checkpoint).model.attention is not None:
        settings = replace(settings, attention_maps=True)
    rows, failures = caption_images(images, checkpoint, settings, weights=weights, device=device)
    for row in rows:
        if as_json:
            click.echo(json.dumps(row, ensure_ascii=False))
            continue
        click.echo(row["uri"])
        for candidate in row["candidates"]:
            click.echo(f"  {math.exp(candidate['log_prob']):8.2g}  {candidate['caption']}")
    for uri, error in failures:
        click.echo(f"{uri}: {error}", err=True)
    if report is not None and rows:
        page = _write_page(report, rows, checkpoint)
        click.echo(f"{page}: {len(rows):,} images", err=as_json)
    sys.exit(1 if failures else 0)


def _write_page(folder: str, rows: Sequence[Mapping[str, Any]], checkpoint: str) -> str:
    predictions = [Prediction.from_row(row) for row in rows]
    sight = build_encoder_view(rows, load_captioner(checkpoint).encoder)
    return write_report(
        folder, "Captions", predictions, note=f"{len(rows):,} images, by {checkpoint}.", encoder_view=sight
    )
