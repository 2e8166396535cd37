"""`captionlib train-ranker`."""

import click

from captionlib.config import load_config
from captionlib.errors import TrainingInterrupted
from captionlib.training.distributed import is_first_process
from captionlib.training.ranking import RankerTrainingConfig, train_ranker
from jobs.options import training_options

__all__ = ["command"]


@click.command()
@click.argument("features")
@training_options
def command(
    features: str,
    output: str,
    config: str | None,
    overrides: tuple[str, ...],
    device: str,
    overwrite: bool,
    progress: bool,
) -> None:
    """Fit a ranker on FEATURES: images and sentences as vectors of one space, so that each finds the other.

    Learns from the rows of the splits train and restval, and keeps the checkpoint of the epoch with the highest recall
    on val or dev. Ctrl-C stops it after saving; the same command goes on where it stopped. `torchrun` starts it on
    several GPUs or machines: one run, with batches as many times as large.

    \b
    Examples:
      captionlib train-ranker features -o ranker
      captionlib train-ranker features -o ranker --config flickr8k
      captionlib train-ranker features -o ranker --set ranker.sentence_encoder=mean --set batch_images=500
      captionlib train-ranker features -o ranker --set loss=hard_negative --set warmup_epochs=10 --set margin=0.2
      torchrun --nproc-per-node 4 --no-python captionlib train-ranker features -o ranker
    """
    settings = load_config(RankerTrainingConfig, config, overrides)
    try:
        history = train_ranker(features, output, settings, device=device, overwrite=overwrite, progress=progress)
    except TrainingInterrupted as interrupted:
        raise click.Abort from interrupted
    best = min(history, key=lambda row: row["missed_recall"])
    if not is_first_process():
        return
    click.echo(
        f"{output}: mean recall {1 - best['missed_recall']:.1%} after epoch {best['epoch']:.0f} of {len(history)}, "
        f"median rank {best['image_to_text_median_rank']:g} image to text, "
        f"{best['text_to_image_median_rank']:g} text to image"
    )
