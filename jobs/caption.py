"""The command `captionlib caption`."""

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click

from jobs.options import captioner_option, config_options, device_option, weights_option

if TYPE_CHECKING:
    from captionlib.models.families.captioner import CaptionModel

__all__ = ["command"]


@click.command()
@click.argument("images", nargs=-1, required=True)
@captioner_option(
    "--checkpoint",
    example_arguments="caption {images}",
    help_text="Folder that train-captioner wrote, or hf:MODEL, a captioner from Hugging Face (name or folder).",
)
@weights_option
@click.option(
    "--n-best", type=click.IntRange(min=1), help="Captions per image.  [default: 1, or decoding.n_best of --config]"
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object per line.")
@click.option("--report", metavar="FOLDER", help="Also write an HTML report, FOLDER/index.html.")
@config_options
@device_option
def command(
    images: tuple[str, ...],
    checkpoint: str,
    weights: str | None,
    n_best: int | None,
    as_json: bool,
    report: str | None,
    config: str | None,
    overrides: tuple[str, ...],
    device: str,
) -> None:
    """Print captions of IMAGES, with the probability of each caption. IMAGES are paths, URLs, folders or globs.

    With --report, the command also writes an HTML page of images and captions. The page shows the attention map of each
    word if the captioner (a trained captioning model) has attention.

    \b
    Examples:
      captionlib caption image.jpg -c hf:Salesforce/blip-image-captioning-large@main
      captionlib caption image.jpg -c captioner
      captionlib caption *.jpg https://example.org/cat.png -c captioner --n-best 3
      captionlib caption images/ -c captioner --report page
    """
    from captionlib.models.checkpoints.encoder_file import require_checkpoint_files

    require_checkpoint_files(checkpoint, weights)
    from captionlib.config import load_config
    from captionlib.data.sources.folder import find_images
    from captionlib.models.families.captioner import open_captioner
    from captionlib.models.inference.captioning import GenerationConfig, caption_images

    n_best_override = [] if n_best is None else [f"decoding.n_best={n_best}"]
    settings = load_config(GenerationConfig, config, [*overrides, *n_best_override], defaults=["decoding.n_best=1"])
    uris = [uri for image in images for uri in find_images(image)]
    captioner = open_captioner(checkpoint, device)
    if report is not None and captioner.attention_positions is not None:
        settings = replace(settings, attention_maps=True)
    rows, failures = caption_images(uris, checkpoint, settings, weights=weights, device=device, captioner=captioner)
    for row in rows:
        click.echo(json.dumps(row, ensure_ascii=False) if as_json else _format_row(row))
    for uri, error in failures:
        click.echo(f"{uri}: {error}", err=True)
    if report is not None and rows:
        page = _write_report(report, rows, checkpoint, captioner)
        click.echo(f"{page}: {len(rows):,} images", err=as_json)  # with --json, standard output contains only JSON
    sys.exit(1 if failures else 0)


def _write_report(folder: str, rows: Sequence[Mapping[str, Any]], checkpoint: str, captioner: "CaptionModel") -> str:
    """Writes the HTML report and returns the path of its page."""
    from captionlib.evaluation.image_display import build_image_display
    from captionlib.evaluation.predictions import Prediction
    from captionlib.evaluation.report import write_report

    return write_report(
        folder,
        "Captions",
        [Prediction.from_row(row) for row in rows],
        note=f"{len(rows):,} images, captioned by {checkpoint}.",
        display=build_image_display(rows, captioner.encoder),
    )


def _format_row(row: Mapping[str, Any]) -> str:
    candidates = (
        f"  {math.exp(candidate['log_prob']):8.2g}  {candidate['caption']}" for candidate in row["candidates"]
    )
    return "\n".join([row["uri"], *candidates])
