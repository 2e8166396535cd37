"""The command `captionlib export-checkpoint`."""

import click

from jobs.options import weights_option

__all__ = ["command"]


@click.command()
@click.argument("checkpoint")
@click.option("--output", "-o", required=True, metavar="FOLDER", help="The new folder to write.")
@click.option("--license", "license_name", default="unknown", metavar="NAME", help="License, such as cc-by-4.0.")
@click.option("--data", default="", metavar="TEXT", help="Description of the training data.")
@click.option(
    "--scores",
    multiple=True,
    metavar="FILE.json",
    help="A scores.json from `captionlib evaluate`, to include in the model card. Repeatable.",
)
@weights_option
@click.option(
    "--without-encoder", is_flag=True, help="Leave out the encoder's weights; the model card names their file and hash."
)
@click.option(
    "--with-datastore", is_flag=True, help="Include the datastore: features and captions of the training images."
)
def command(
    checkpoint: str,
    output: str,
    license_name: str,
    data: str,
    scores: tuple[str, ...],
    weights: str | None,
    without_encoder: bool,
    with_datastore: bool,
) -> None:
    """Copy CHECKPOINT (a captioner, ranker or language model) to a folder that others can load on any machine.

    The folder contains no paths of this machine. If the encoder was loaded from a weights file, its tensors are
    included. Torchvision's weights are not: they are downloaded by name when the folder is loaded. README.md is a model
    card with data, training settings, scores, limits and license. Edit it before you publish the folder.

    \b
    Examples:
      captionlib export-checkpoint captioner -o shared --license cc-by-4.0
      captionlib export-checkpoint captioner -o shared --data "Flickr8k, split train" --scores scores/scores.json
      captionlib caption image.jpg -c shared
    """
    from captionlib.models.checkpoints.encoder_file import require_checkpoint_files

    if not without_encoder:
        require_checkpoint_files(checkpoint, weights)
    from captionlib.data.sources.locations import load_json, locate
    from captionlib.errors import ConfigError
    from captionlib.models.checkpoints.export import export_checkpoint
    from captionlib.models.checkpoints.model_card import CardNotes

    evaluations = [load_json(locate(file)) for file in scores]
    for file, evaluation in zip(scores, evaluations, strict=True):
        if not isinstance(evaluation, dict) or not {"scores", "image_to_text"} & evaluation.keys():
            raise ConfigError(f"--scores {file}: expected a scores.json from `captionlib evaluate --output`")
    names = export_checkpoint(
        checkpoint,
        output,
        weights=weights,
        with_encoder=not without_encoder,
        with_datastore=with_datastore,
        notes=CardNotes(license_name, data, evaluations),
    )
    click.echo(f"{output}: {', '.join(names)}")
