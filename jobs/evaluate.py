"""`captionlib evaluate`."""

import click

from captionlib.data.datasets import open_dataset
from captionlib.data.shards import to_json
from captionlib.evaluation.captions import read_captions_and_references, score_captions
from captionlib.storage import Folder

__all__ = ["command"]


@click.command()
@click.argument("captions")
@click.option("--manifest", "-m", required=True, metavar="FOLDER", help="Where the sentences of people are.")
@click.option("--split", "splits", multiple=True, metavar="NAME", help="Score this split alone. Repeatable.")
@click.option("--output", "-o", metavar="FOLDER", help="Also write scores.json into this folder.")
def command(captions: str, manifest: str, splits: tuple[str, ...], output: str | None) -> None:
    """Score CAPTIONS against the sentences of people: BLEU-1 to BLEU-4 and CIDEr.

    The scores are pycocoevalcap's own; its tokenizer needs Java.

    \b
    Examples:
      captionlib evaluate captions --manifest manifest --split val
      captionlib evaluate captions --manifest manifest --split test --output scores
    """
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
