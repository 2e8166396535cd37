"""The command `captionlib export-captions`."""

from typing import Literal

import click

__all__ = ["command"]


@click.command()
@click.argument("captions")
@click.option("--output", "-o", required=True, metavar="FILE.json", help="The file to write.")
@click.option(
    "--format",
    "output_format",
    type=click.Choice(["auto", "coco", "neuraltalk"]),
    default="auto",
    show_default=True,
    help="coco is for COCO's evaluation server. auto selects neuraltalk for result_struct.json, otherwise coco.",
)
@click.option(
    "--manifest", "-m", metavar="FOLDER", help="The manifest, or features, with the references, for neuraltalk."
)
@click.option("--split", "splits", multiple=True, metavar="NAME", help="Export this split only. Repeatable.")
def command(
    captions: str,
    output: str,
    output_format: Literal["auto", "coco", "neuraltalk"],
    manifest: str | None,
    splits: tuple[str, ...],
) -> None:
    """Write CAPTIONS as JSON for other programs, in COCO's results format, or as NeuralTalk's result_struct.json.

    COCO's format needs no references, so you can submit captions of its test split, whose references are secret.

    \b
    Examples:
      captionlib export-captions captions -o captions_test2014_results.json --split test
      captionlib export-captions captions -o result_struct.json --manifest manifest
    """
    from captionlib.data.shards.markers import to_json
    from captionlib.evaluation.predictions import load_predictions, to_coco_results, to_result_struct
    from captionlib.storage.folders import write_file

    predictions = load_predictions(captions, manifest, splits)
    neuraltalk = output_format == "neuraltalk" or (output_format == "auto" and output.endswith("result_struct.json"))
    content = to_result_struct(predictions, {"captions": captions}) if neuraltalk else to_coco_results(predictions)
    write_file(output, to_json(content))
    click.echo(f"{output}: {len(predictions):,} captions in {'NeuralTalk' if neuraltalk else 'COCO'}'s format")
