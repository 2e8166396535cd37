"""The command `captionlib train-ranker`."""

from typing import Any

import click

from jobs.options import training_options

__all__ = ["command"]


@click.command()
@click.argument("features")
@training_options
def command(features: str, output: str, config: str | None, overrides: tuple[str, ...], **options: Any) -> None:
    """Train a ranker (a dual encoder for image-text retrieval) on the features dataset FEATURES.

    extract-features writes features datasets. Training uses the splits train and restval (images of COCO's val set
    that Karpathy's splits use for training). The checkpoint of the epoch with the highest mean recall on val or dev is
    kept. Ctrl-C saves the state and stops; the same command resumes. torchrun trains on several GPUs or machines, and
    the batch size is multiplied by the number of processes.

    \b
    Examples:
      captionlib train-ranker features -o ranker
      captionlib train-ranker features -o ranker --config flickr8k
      captionlib train-ranker features -o ranker --set ranker.sentence_encoder=mean --set batch_images=500
      torchrun --nproc-per-node 4 --no-python captionlib train-ranker features -o ranker

    A recipe (--config) is a built-in configuration; --set overrides single values. The recipe flickr8k is for small
    datasets. The sentence encoder `mean` averages the word embeddings of a sentence.

    The output folder contains the checkpoint (model.safetensors, config.json, training.json), resolved.json with all
    settings of the run, metrics.jsonl and curves.png, tensorboard/, and the state to resume from in _training/.
    """
    from captionlib.config import load_config
    from captionlib.training.distributed import is_first_process
    from captionlib.training.ranking import RankerTrainingConfig, train_ranker

    settings = load_config(RankerTrainingConfig, config, overrides)
    history = train_ranker(features, output, settings, **options)
    best = max(history, key=lambda row: row["mean_recall"])
    if is_first_process():
        click.echo(
            f"{output}: mean recall {best['mean_recall']:.1%} after epoch {best['epoch']:.0f} of {len(history)}, "
            f"median rank {best['image_to_text_median_rank']:g} image to text, "
            f"{best['text_to_image_median_rank']:g} text to image"
        )
