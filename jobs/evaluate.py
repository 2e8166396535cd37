"""The command `captionlib evaluate`."""

from __future__ import annotations

import dataclasses
import io
from typing import TYPE_CHECKING

import click

from jobs.options import device_option

if TYPE_CHECKING:
    from captionlib.evaluation.evaluate import Evaluation
    from captionlib.evaluation.retrieval import RetrievalScores

__all__ = ["command"]


@click.command()
@click.argument("source", metavar="CAPTIONS|FEATURES")
@click.option(
    "--manifest", "-m", metavar="FOLDER", help="Manifest (list of images) or features dataset with the references."
)
@click.option("--split", "splits", multiple=True, metavar="NAME", help="Evaluate this split only. Repeatable.")
@click.option("--output", "-o", metavar="FOLDER", help="Also write scores.json into this folder.")
@click.option("--per-image", metavar="FILE.parquet", help="Also write the scores of each image.")
@click.option("--results", metavar="FILE.json", help="Also write the captions as COCO's results JSON.")
@click.option("--ranker", "-r", metavar="FOLDER", help="Evaluate this ranker on FEATURES.")
@click.option(
    "--protocol",
    type=click.Choice(["all", "flickr8k-1k", "coco-1k", "coco-5k"]),
    default="all",
    show_default=True,
    help="With --ranker: the images and references to use. coco-1k averages five folds of 1,000 images.",
)
@click.option(
    "--checkpoint", "-c", metavar="FOLDER", help="Compute the perplexity of the references with this captioner."
)
@click.option(
    "--features",
    "-f",
    metavar="FOLDER",
    help="Features dataset to compute the perplexity from.  [default: encode the images of the manifest]",
)
@click.option(
    "--train-split",
    "train_splits",
    multiple=True,
    default=("train", "restval"),
    show_default=True,
    metavar="NAME",
    help="Split of the training captions. Captions that are not among them count as novel. Repeatable.",
)
@click.option(
    "--bootstrap-samples",
    type=click.IntRange(min=0),
    default=1000,
    show_default=True,
    help="Number of resamples for the confidence intervals. If 0, no intervals are computed.",
)
@click.option("--require-all", is_flag=True, help="Stop if an image with references has no caption.")
@device_option
def command(
    source: str,
    manifest: str | None,
    splits: tuple[str, ...],
    output: str | None,
    per_image: str | None,
    results: str | None,
    ranker: str | None,
    protocol: str,
    checkpoint: str | None,
    features: str | None,
    train_splits: tuple[str, ...],
    bootstrap_samples: int,
    require_all: bool,
    device: str,
) -> None:
    """Score CAPTIONS against references (BLEU, METEOR, ROUGE-L, CIDEr), or a ranker on FEATURES (Recall@k, ranks).

    CAPTIONS is a captions dataset, COCO's results JSON, or NeuralTalk's result_struct.json, which contains references
    and needs no manifest. The scores equal those of pycocoevalcap, and have 95% confidence intervals from a
    bootstrap over images. METEOR and the standard tokenizer need Java. A ranker (dual encoder for image-text
    retrieval) is scored on a features dataset in both directions, from image to text and from text to image. Its scores
    are Recall@1, 5 and 10, and the median and mean rank.

    \b
    Examples:
      captionlib evaluate captions --manifest manifest --split val
      captionlib evaluate captions --manifest manifest --split test --output scores --per-image scores.parquet
      captionlib evaluate captions --manifest manifest --checkpoint captioner --features features
      captionlib evaluate captions --manifest manifest --checkpoint hf:blip
      captionlib evaluate captions_val2014_results.json --manifest manifest
      captionlib evaluate result_struct.json
      captionlib evaluate features --ranker ranker --split test --protocol coco-1k
    """
    import pyarrow.parquet as pq

    from captionlib.data.shards.markers import to_json
    from captionlib.evaluation.bootstrap import BootstrapConfig
    from captionlib.evaluation.caption_scores import build_scores_table
    from captionlib.evaluation.evaluate import evaluate_captions
    from captionlib.evaluation.predictions import to_coco_results
    from captionlib.storage.folders import Folder, write_file

    if ranker is not None:
        _evaluate_ranker(ranker, source, splits, protocol, output, device)
        return
    evaluation = evaluate_captions(
        source,
        manifest,
        splits=splits,
        train_splits=train_splits,
        checkpoint=checkpoint,
        features=features,
        bootstrap=BootstrapConfig(samples=bootstrap_samples),
        require_all=require_all,
        device=device,
    )
    _print_scores(source, evaluation)
    if output is not None:
        Folder(output).write("scores.json", to_json({"splits": list(splits), **evaluation.to_dict()}))
    if per_image is not None:
        buffer = io.BytesIO()
        pq.write_table(build_scores_table(evaluation.scores, evaluation.captions), buffer, compression="zstd")
        write_file(per_image, buffer.getvalue())
    if results is not None:
        write_file(results, to_json(to_coco_results(evaluation.predictions)))


def _evaluate_ranker(
    ranker: str, features: str, splits: tuple[str, ...], protocol: str, output: str | None, device: str
) -> None:
    from captionlib.data.shards.dataset import open_dataset
    from captionlib.data.shards.markers import to_json
    from captionlib.evaluation.retrieval import PROTOCOLS, score_ranker
    from captionlib.models.checkpoints.checkpoint import load_ranker
    from captionlib.storage.folders import Folder

    dataset = open_dataset(features, "features").require_complete()
    scores = score_ranker(load_ranker(ranker, device), dataset, splits, PROTOCOLS[protocol])
    _print_retrieval_scores(ranker, scores)
    if output is not None:
        content = {"splits": list(splits), "protocol": protocol, **dataclasses.asdict(scores)}
        Folder(output).write("scores.json", to_json(content))


def _print_scores(source: str, evaluation: Evaluation) -> None:
    click.echo(f"{source}: {len(evaluation.predictions):,} images")
    for name, score in evaluation.scores.overall.items():
        bounds = evaluation.scores.intervals.get(name)
        interval = f"   {bounds[0]:.4f} to {bounds[1]:.4f}" if bounds else ""
        click.echo(f"  {name:<18} {score:8.4f}{interval}")
    for name, count in evaluation.counts.items():
        click.echo(f"  {name:<18} {count:8,}")
    for note in evaluation.notes:
        click.echo(f"Note: {note}", err=True)


def _print_retrieval_scores(ranker: str, scores: RetrievalScores) -> None:
    folds = f", the mean of {scores.folds} folds" if scores.folds > 1 else ""
    click.echo(f"{ranker}: {scores.images:,} images, {scores.references:,} references{folds}")
    click.echo(f"  {'':<13} {'R@1':>6} {'R@5':>6} {'R@10':>6} {'median':>7} {'mean':>7}")
    for name, direction in (("image to text", scores.image_to_text), ("text to image", scores.text_to_image)):
        recalls = f"{direction.recall_at_1:>6.1%} {direction.recall_at_5:>6.1%} {direction.recall_at_10:>6.1%}"
        click.echo(f"  {name} {recalls} {direction.median_rank:>7.1f} {direction.mean_rank:>7.1f}")
