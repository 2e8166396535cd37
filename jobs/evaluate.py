"""`captionlib evaluate`."""

import dataclasses

import click

from captionlib.data.datasets import open_dataset
from captionlib.data.shards import to_json
from captionlib.errors import ConfigError
from captionlib.evaluation.captions import read_captions_and_references, score_captions
from captionlib.evaluation.ranking import PROTOCOLS
from captionlib.storage import Folder
from jobs.options import device_option
from jobs.summaries import echo_ranking

__all__ = ["command"]


@click.command()
@click.argument("captions", metavar="CAPTIONS|FEATURES")
@click.option("--manifest", "-m", metavar="FOLDER", help="Where the sentences of people are.")
@click.option("--ranker", "-r", metavar="FOLDER", help="Score this ranker on features, as train-ranker wrote it.")
@click.option(
    "--protocol",
    type=click.Choice(list(PROTOCOLS)),
    default="all",
    show_default=True,
    help="Of a ranker: what is ranked among what; coco-1k is the mean of five folds of 1,000 images.",
)
@click.option("--split", "splits", multiple=True, metavar="NAME", help="Score this split alone. Repeatable.")
@click.option("--output", "-o", metavar="FOLDER", help="Also write scores.json into this folder.")
@device_option
def command(
    captions: str,
    manifest: str | None,
    ranker: str | None,
    protocol: str,
    splits: tuple[str, ...],
    output: str | None,
    device: str,
) -> None:
    """Score CAPTIONS against the sentences of people: BLEU-1 to BLEU-4 and CIDEr; or a ranker on FEATURES.

    The scores of captions are pycocoevalcap's own; its tokenizer needs Java. A ranker's are Recall@1, 5 and 10 and the
    median and mean rank, for images that look for their sentences and for sentences that look for their image.

    \b
    Examples:
      captionlib evaluate captions --manifest manifest --split val
      captionlib evaluate captions --manifest manifest --split test --output scores
      captionlib evaluate features --ranker ranker --split test
      captionlib evaluate features --ranker ranker --split test --protocol coco-1k
    """
    if ranker is not None:
        from captionlib.evaluation.ranker_scores import score_ranker_folder  # loads torch, which takes seconds

        ranking = score_ranker_folder(ranker, captions, splits, PROTOCOLS[protocol], device)
        echo_ranking(ranker, ranking)
        if output is not None:
            content = {"splits": list(splits), "protocol": protocol, **dataclasses.asdict(ranking)}
            Folder(output).write("scores.json", to_json(content))
        return
    if manifest is None:
        raise ConfigError("evaluate: expected --manifest to score captions, or --ranker to score a ranker on features")
    said, references = read_captions_and_references(
        open_dataset(captions, "captions").require_complete(),
        open_dataset(manifest, "manifest").require_complete(),
        splits,
    )
    result = score_captions(said, references)
    click.echo(f"{captions}: {result.images:,} images")
    for name, score in result.scores.items():
        click.echo(f"  {name:<8} {score:.4f}")
    if output is not None:
        content = {"images": result.images, "splits": list(splits), "scores": dict(result.scores)}
        Folder(output).write("scores.json", to_json(content))
