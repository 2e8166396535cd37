"""The command `captionlib report`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import click

from jobs.options import progress_option

if TYPE_CHECKING:
    from captionlib.evaluation.evaluate import Evaluation

__all__ = ["command"]


@click.command()
@click.argument("captions")
@click.option("--output", "-o", required=True, metavar="FOLDER", help="The folder to write. Its page is index.html.")
@click.option("--manifest", "-m", metavar="FOLDER", help="Manifest or features dataset with the references.")
@click.option("--split", "splits", multiple=True, metavar="NAME", help="Show this split only. Repeatable.")
@click.option("--checkpoint", "-c", metavar="FOLDER", help="Folder of the captioner, to show its training curves.")
@click.option("--images", metavar="FOLDER", help="The folder that image paths are relative to.")
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Show the first N images only.")
@click.option("--title", help="The title of the page. [default: the name of CAPTIONS]")
@progress_option
def command(
    captions: str,
    output: str,
    manifest: str | None,
    splits: tuple[str, ...],
    checkpoint: str | None,
    images: str | None,
    limit: int | None,
    title: str | None,
    progress: bool,
) -> None:
    """Write a web page of CAPTIONS with images, probabilities, references and scores.

    CAPTIONS is a captions dataset, COCO's results JSON, or NeuralTalk's result_struct.json. You can sort and filter
    the images. The page opens from disk or from any web server and loads nothing from other sites. If the
    captions were generated with attention_maps, the page also shows the attention map of each word.

    \b
    Examples:
      captionlib report captions -o report
      captionlib report captions -o report --manifest manifest --split val --checkpoint captioner
      captionlib report result_struct.json -o report --images images/
    """
    from captionlib.data.sources.locations import locate, resolve_uri
    from captionlib.evaluation.crop_and_attention import read_crop_and_attention
    from captionlib.evaluation.evaluate import evaluate_predictions
    from captionlib.evaluation.predictions import load_predictions
    from captionlib.evaluation.report import write_report
    from captionlib.models.families.captioner import open_captioner

    predictions = load_predictions(captions, manifest, splits)
    with_references = [prediction for prediction in predictions if prediction.references]
    evaluation = evaluate_predictions(with_references) if with_references else None
    if images is not None:
        root = locate(images).address
        predictions = [replace(prediction, uri=resolve_uri(prediction.uri, root)) for prediction in predictions]
    predictions = predictions[:limit]
    history = [] if checkpoint is None else open_captioner(checkpoint).history
    page = write_report(
        output,
        title or f"Captions from {captions}",
        predictions,
        note=_describe(len(predictions), splits, evaluation),
        scores=[] if evaluation is None else _format_scores(evaluation),
        cider=None if evaluation is None else evaluation.scores.per_image["CIDEr"],
        history=history,
        crop_and_attention=read_crop_and_attention(captions, [prediction.image_id for prediction in predictions]),
        progress=progress,
    )
    if checkpoint is not None and not history:
        click.echo(f"Note: {checkpoint} has no training history, so the page shows no curves", err=True)
    for note in [] if evaluation is None else evaluation.notes:
        click.echo(f"Note: {note}", err=True)
    click.echo(f"{page}: {len(predictions):,} images")


def _describe(images: int, splits: Sequence[str], evaluation: Evaluation | None) -> str:
    description = f"{images:,} images{' of split ' if splits else ''}{' and '.join(splits)}."
    if evaluation is None:
        return description
    return f"{description} Scores of {len(evaluation.predictions):,} images, with 95% bootstrap confidence intervals."


def _format_scores(evaluation: Evaluation) -> list[tuple[str, str, str]]:
    """Returns names, values and confidence intervals of the scores, followed by the counts."""
    scores = []
    for name, score in evaluation.scores.overall.items():
        low, high = evaluation.scores.intervals[name]
        scores.append((name.replace("_", " "), f"{score:.3f}", f"{low:.3f} to {high:.3f}"))
    return scores + [(name.replace("_", " "), f"{count:,}", "") for name, count in evaluation.counts.items()]
