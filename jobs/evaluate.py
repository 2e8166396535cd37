"""`captionlib evaluate`."""

import dataclasses
from typing import Any

import click

from captionlib.data.datasets import open_dataset
from captionlib.data.shards import to_json
from captionlib.errors import ConfigError
from captionlib.evaluation.captions import read_captions_and_references, score_captions
from captionlib.evaluation.ranking import PROTOCOLS, RankingScores
from captionlib.storage import Folder
from jobs.options import device_option

__all__ = ["command"]


@click.command()
@click.argument("dataset")
@click.option("--manifest", "-m", metavar="FOLDER", help="Of captions: where the sentences of people are.")
@click.option("--ranker", "-r", metavar="FOLDER", help="Of features: the ranker, as train-ranker wrote it.")
@click.option("--split", "splits", multiple=True, metavar="NAME", help="Score this split alone. Repeatable.")
@click.option(
    "--protocol",
    type=click.Choice(list(PROTOCOLS)),
    default="all",
    show_default=True,
    help="Of a ranker: what is ranked among what; coco-1k is the mean of five folds of 1,000 images.",
)
@device_option
@click.option("--output", "-o", metavar="FOLDER", help="Also write scores.json into this folder.")
def command(
    dataset: str,
    manifest: str | None,
    ranker: str | None,
    splits: tuple[str, ...],
    protocol: str,
    device: str,
    output: str | None,
) -> None:
    """Score captions against the sentences of people, or a ranker on features.

    Of captions: BLEU-1 to BLEU-4 and CIDEr, pycocoevalcap's own; its tokenizer needs Java. Of a ranker: Recall@1, 5 and
    10, the median and the mean rank, for images that look for their sentences and sentences that look for their image.

    \b
    Examples:
      captionlib evaluate captions --manifest manifest --split val
      captionlib evaluate captions --manifest manifest --split test --output scores
      captionlib evaluate features --ranker ranker --split test
      captionlib evaluate features --ranker ranker --split test --protocol coco-1k
    """
    if (manifest is None) == (ranker is None):
        raise ConfigError("evaluate: expected --manifest to score captions, or --ranker to score a ranker on features")
    if ranker is not None:
        content = _score_ranker(dataset, ranker, splits, protocol, device)
    else:
        content = _score_captions(dataset, str(manifest), splits)
    if output is not None:
        Folder(output).write("scores.json", to_json({"splits": list(splits), **content}))


def _score_captions(captions: str, manifest: str, splits: tuple[str, ...]) -> dict[str, Any]:
    said, references = read_captions_and_references(
        open_dataset(captions, "captions").require_complete(),
        open_dataset(manifest, "manifest").require_complete(),
        splits,
    )
    result = score_captions(said, references)
    click.echo(f"{captions}: {result.images:,} images")
    for name, score in result.scores.items():
        click.echo(f"  {name:<8} {score:.4f}")
    return {"images": result.images, "scores": dict(result.scores)}


def _score_ranker(features: str, ranker: str, splits: tuple[str, ...], protocol: str, device: str) -> dict[str, Any]:
    from captionlib.evaluation.ranker_scores import score_ranker  # loads torch, which takes seconds
    from captionlib.models.ranker_checkpoints import load_ranker

    dataset = open_dataset(features, "features").require_complete()
    scores = score_ranker(load_ranker(ranker, device), dataset, splits, PROTOCOLS[protocol])
    click.echo("\n".join([f"{ranker}: {_describe_size(scores)}", *_describe_ranks(scores)]))
    return {"protocol": protocol, **dataclasses.asdict(scores)}


def _describe_size(scores: RankingScores) -> str:
    folds = f", the mean of {scores.folds} folds" if scores.folds > 1 else ""
    return f"{scores.images:,} images, {scores.sentences:,} sentences{folds}"


def _describe_ranks(scores: RankingScores) -> list[str]:
    lines = [f"  {'':<17} {'R@1':>6} {'R@5':>6} {'R@10':>6} {'median':>7} {'mean':>7}"]
    for name, one in (("image to sentence", scores.image_to_sentence), ("sentence to image", scores.sentence_to_image)):
        recalls = f"{one.recall_at_1:>6.1%} {one.recall_at_5:>6.1%} {one.recall_at_10:>6.1%}"
        lines.append(f"  {name:<17} {recalls} {one.median_rank:>7.1f} {one.mean_rank:>7.1f}")
    return lines
