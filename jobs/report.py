"""The command `captionlib report`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import click

from jobs.options import progress_option

if TYPE_CHECKING:
    from captionlib.evaluation.comparison import Comparison
    from captionlib.evaluation.evaluate import Evaluation
    from captionlib.evaluation.predictions import Prediction

__all__ = ["command"]


@click.command()
@click.argument("captions")
@click.option("--output", "-o", required=True, metavar="FOLDER", help="The folder to write. Its page is index.html.")
@click.option(
    "--manifest", "-m", metavar="FOLDER", help="Manifest (list of images) or features dataset with the references."
)
@click.option("--split", "splits", multiple=True, metavar="NAME", help="Show this split only. Repeatable.")
@click.option("--checkpoint", "-c", metavar="FOLDER", help="Folder of the captioner, to show its training curves.")
@click.option("--images", metavar="FOLDER", help="The folder that image paths are relative to.")
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Show the first N images only.")
@click.option("--compare", metavar="OTHER", help="Other captions of the same images, to show beside CAPTIONS.")
@click.option("--title", help="The title of the page.  [default: the name of CAPTIONS and the split]")
@progress_option
def command(
    captions: str,
    output: str,
    manifest: str | None,
    splits: tuple[str, ...],
    checkpoint: str | None,
    images: str | None,
    limit: int | None,
    compare: str | None,
    title: str | None,
    progress: bool,
) -> None:
    """Write a web page of CAPTIONS with images, probabilities, references and scores.

    CAPTIONS is a captions dataset, COCO's results JSON, or NeuralTalk's result_struct.json. You can sort and filter
    the images. The page opens from disk or from any web server and loads nothing from other sites. If the
    captions were generated with attention_maps, the page also shows the attention map of each word.

    With --compare, the page shows CAPTIONS (A) and OTHER (B) side by side: the number of images for
    which each has the better caption by CIDEr, the difference of each score with a paired bootstrap
    confidence interval, and the images with the largest differences in both directions.

    \b
    Examples:
      captionlib report captions -o report
      captionlib report captions -o report --manifest manifest --split val --checkpoint captioner
      captionlib report captions -o report --manifest manifest --compare captions-greedy
      captionlib report result_struct.json -o report --images images/
    """
    from captionlib.data.shards.dataset import open_dataset
    from captionlib.data.shards.inspection import collect_failures
    from captionlib.evaluation.comparison import compare_predictions
    from captionlib.evaluation.evaluate import evaluate_predictions
    from captionlib.evaluation.image_display import ImageDisplay, read_image_display
    from captionlib.evaluation.predictions import is_dataset, load_predictions
    from captionlib.evaluation.report import write_report
    from captionlib.models.families.captioner import open_captioner

    predictions = load_predictions(captions, manifest, splits)
    evaluation = comparison = None
    if compare is not None:
        others = load_predictions(compare, manifest, splits)
        comparison = compare_predictions(predictions, others, _shorten_both(captions, compare))
        predictions = list(comparison.predictions)
    elif with_references := [prediction for prediction in predictions if prediction.references]:
        evaluation = evaluate_predictions(with_references)
    predictions = _resolve_images(predictions, images)[:limit]
    cider = comparison.cider if comparison else evaluation.scores.per_image["CIDEr"] if evaluation else None
    history = [] if checkpoint is None else open_captioner(checkpoint).history
    display = read_image_display(captions, [prediction.image_id for prediction in predictions])
    if comparison is not None:  # no attention maps, because each image has two captions
        display = ImageDisplay(display.preprocessing)
    page = write_report(
        output,
        title or _make_title(captions, compare, splits),
        predictions,
        note=_describe(captions, len(predictions), splits, evaluation, comparison),
        scores=[] if evaluation is None else _format_scores(evaluation),
        cider=cider,
        history=history,
        display=display,
        failures=collect_failures(open_dataset(captions)) if is_dataset(captions) else {},
        comparison=comparison,
        progress=progress,
    )
    notes = [*(evaluation.notes if evaluation else []), *(comparison.notes if comparison else [])]
    if checkpoint is not None and not history:
        notes.insert(0, f"{checkpoint} has no training history, so the page shows no curves")
    for note in notes:
        click.echo(f"Note: {note}", err=True)
    click.echo(f"{page}: {len(predictions):,} images{_summarize(comparison)}")


def _resolve_images(predictions: list[Prediction], images: str | None) -> list[Prediction]:
    from captionlib.data.sources.locations import locate, resolve_uri

    if images is None:
        return predictions
    root = locate(images).address
    return [replace(prediction, uri=resolve_uri(prediction.uri, root)) for prediction in predictions]


def _make_title(captions: str, compare: str | None, splits: Sequence[str]) -> str:
    split = f", {' and '.join(splits)} split" if splits else ""
    if compare is not None:
        return f"{' compared with '.join(_shorten_both(captions, compare))}{split}"
    return f"{'/'.join(_split_address(captions)[-2:])}{split}"  # the last two parts, such as `holidays/captions`


def _shorten_both(address: str, other: str) -> tuple[str, str]:
    """Shortens two addresses to the fewest last parts that distinguish them. Equal addresses keep all parts."""
    parts, others = _split_address(address), _split_address(other)
    length = 1
    while parts[-length:] == others[-length:] and length < max(len(parts), len(others)):
        length += 1
    return "/".join(parts[-length:]), "/".join(others[-length:])


def _split_address(address: str) -> list[str]:
    from captionlib.storage.folders import resolve_address

    return [part for part in resolve_address(address).split("/") if part]


def _describe(
    captions: str,
    image_count: int,
    splits: Sequence[str],
    evaluation: Evaluation | None,
    comparison: Comparison | None,
) -> str:
    from captionlib.data.shards.dataset import open_dataset
    from captionlib.data.shards.lineage import describe_config
    from captionlib.evaluation.predictions import is_dataset

    sentences = [f"{image_count:,} images{' of split ' if splits else ''}{' and '.join(splits)}."]
    if comparison is not None:
        names = comparison.names
        sentences += [
            f"{count:,} images of {name} have no caption in {other} and are left out."
            for count, name, other in zip(comparison.not_compared, names, reversed(names), strict=True)
            if count
        ]
    elif is_dataset(captions):
        dataset = open_dataset(captions)
        sentences.append(f"{describe_config(dataset.kind, dataset.config)}.")
    if evaluation is not None:
        scored = len(evaluation.predictions)
        sentences.append(f"Scores of {scored:,} images, with 95% bootstrap confidence intervals.")
    return " ".join(sentences)


def _summarize(comparison: Comparison | None) -> str:
    if comparison is None or not comparison.scores:
        return ""
    better, ties, worse = comparison.wins_ties_losses
    first, second = comparison.names
    return f"; better caption by CIDEr: {first} {better:,}, {second} {worse:,}, equal {ties:,}"


def _format_scores(evaluation: Evaluation) -> list[tuple[str, str, str]]:
    scores = []
    for name, score in evaluation.scores.overall.items():
        low, high = evaluation.scores.intervals[name]
        scores.append((name.replace("_", " "), f"{score:.3f}", f"{low:.3f} to {high:.3f}"))
    return scores + [(name.replace("_", " "), f"{count:,}", "") for name, count in evaluation.counts.items()]
