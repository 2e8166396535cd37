"""`captionlib report`."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import click

from captionlib.data.sources.locations import locate, resolve_uri
from captionlib.evaluation.encoder_views import read_encoder_view
from captionlib.evaluation.evaluate import Evaluation, evaluate_predictions
from captionlib.evaluation.predictions import load_predictions
from captionlib.evaluation.report import write_report

__all__ = ["command"]


@click.command()
@click.argument("captions")
@click.option("--output", "-o", required=True, metavar="FOLDER", help="The page is index.html in this folder.")
@click.option("--manifest", "-m", metavar="FOLDER", help="Where the sentences of people are.")
@click.option("--split", "splits", multiple=True, metavar="NAME", help="Show this split alone. Repeatable.")
@click.option("--checkpoint", "-c", metavar="FOLDER", help="The captioner: shows how its training went.")
@click.option("--images", metavar="FOLDER", help="What relative paths of images are relative to.")
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Show the first N images.")
@click.option("--title", help="Of the page; tells where the captions are, unless given.")
@click.option("--progress/--no-progress", default=True, help="Show a progress bar.")
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
    """Write a page of CAPTIONS to look through: pictures, captions, probabilities, what people say, and scores.

    CAPTIONS is a captions dataset, COCO's results JSON, or NeuralTalk's result_struct.json. The page needs no server
    and nothing from elsewhere: open it from disk, or put the folder on any web server. It sorts and filters by itself.
    Where the captions were made with attention_maps, each word shows where the captioner looked.

    \b
    Examples:
      captionlib report captions -o report
      captionlib report captions -o report --manifest manifest --split val --checkpoint captioner
      captionlib report result_struct.json -o report --images photos
    """
    predictions = load_predictions(captions, manifest, splits)
    with_references = [one for one in predictions if one.references]
    scored = evaluate_predictions(with_references) if with_references else None
    if images is not None:
        root = locate(images).address
        predictions = [replace(one, uri=resolve_uri(one.uri, root)) for one in predictions]
    predictions = predictions[:limit]
    page = write_report(
        output,
        title or f"Captions of {captions}",
        predictions,
        note=_describe(len(predictions), splits, scored),
        scores=[] if scored is None else _figures(scored),
        cider=None if scored is None else scored.scores.per_image["CIDEr"],
        history=[] if checkpoint is None else _read_history(checkpoint),
        encoder_view=read_encoder_view(captions, [one.image_id for one in predictions]),
        progress=progress,
    )
    for note in [] if scored is None else scored.notes:
        click.echo(f"Note: {note}", err=True)
    click.echo(f"{page}: {len(predictions):,} images")


def _describe(images: int, splits: Sequence[str], scored: Evaluation | None) -> str:
    of_split = f" of split {' and '.join(splits)}" if splits else ""
    scores = ""
    if scored is not None:
        scores = f" Scores are of {scored.scores.images:,}, each above its 95% interval by resampling the images."
    return f"{images:,} images{of_split}.{scores}"


def _figures(scored: Evaluation) -> list[tuple[str, str, str]]:
    """Scores with their intervals, then counts."""
    figures = []
    for name, score in scored.scores.scores.items():
        low, high = scored.scores.intervals[name]
        figures.append((name.replace("_", " "), f"{score:.3f}", f"{low:.3f} to {high:.3f}"))
    return figures + [(name.replace("_", " "), f"{count:,}", "") for name, count in scored.counts.items()]


def _read_history(checkpoint: str) -> Sequence[Mapping[str, Any]]:
    from captionlib.models.checkpoints.checkpoint import load_captioner  # loads torch, which takes seconds

    history: Sequence[Mapping[str, Any]] = load_captioner(checkpoint).training.get("history", [])
    return history
