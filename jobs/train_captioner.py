"""`captionlib train-captioner`."""

import json
from typing import Any

import click

from captionlib.config import load_config
from captionlib.data.shards.dataset import open_dataset
from captionlib.errors import TrainingInterrupted
from captionlib.training.captioning import CaptionerTrainingConfig, train_captioner
from captionlib.training.distributed import is_first_process
from captionlib.training.finetuning import FinetuningConfig, finetune_captioner
from jobs.options import training_options

__all__ = ["command"]


@click.command()
@click.argument("source")
@click.option(
    "--init-from", metavar="FOLDER", help="The captioner whose weights to start from: --set init_from=FOLDER."
)
@click.option("--weights", metavar="FILE", help="The encoder's weights to tune, where they are a file of your own.")
@training_options
def command(
    source: str,
    init_from: str | None,
    weights: str | None,
    output: str,
    config: str | None,
    overrides: tuple[str, ...],
    device: str,
    overwrite: bool,
    progress: bool,
) -> None:
    """Fit a captioner on SOURCE: features; or a manifest, to tune a captioner and its encoder on the images.

    Learns from the rows of the splits train and restval, and keeps the checkpoint of the epoch with the lowest
    perplexity, or the highest CIDEr, on val or dev. Ctrl-C stops it after saving; the same command goes on where it
    stopped. `torchrun` starts it on several GPUs or machines: one run, with batches as many times as large.

    From a manifest the encoder is tuned too, with a learning rate of its own; its weights are kept with the captioner,
    which captions images with them. Images that cannot be read are left out, and listed in the run's folder. Where its
    last layers are enough, captioner.encoder_top tunes them on the stored maps of the layer before, for much less time.

    \b
    Examples:
      captionlib train-captioner features -o captioner
      captionlib train-captioner features -o captioner --config talk-lstm
      captionlib train-captioner features -o captioner --set training.epochs=30 --set captioner.hidden_size=256
      captionlib train-captioner features -o captioner --set best_by=cider --set training.ema_decay=0.999
      captionlib train-captioner features -o captioner --set word_vectors=w2v.bin --set captioner.embedding_size=300
      captionlib train-captioner features -o tuned --init-from captioner --set training.learning_rate=0.0001
      captionlib train-captioner features -o better --init-from captioner --set objective=self_critical
      captionlib train-captioner manifest -o tuned --init-from captioner --config finetune-encoder
      captionlib train-captioner manifest -o tuned --init-from captioner --set encoder.from_node=features.17
      captionlib train-captioner maps -o captioner --set captioner.encoder_top=features.29   # maps of features.23
      captionlib train-captioner features -o words --set objective=bag_of_words   # then --init-from words
      torchrun --nproc-per-node 4 --no-python captionlib train-captioner features -o captioner
    """
    if init_from is not None:
        overrides = (*overrides, f"init_from={json.dumps(init_from)}")
    how: dict[str, Any] = {"device": device, "overwrite": overwrite, "progress": progress}
    settings: CaptionerTrainingConfig | FinetuningConfig
    try:
        if open_dataset(source).kind == "manifest":
            settings = load_config(FinetuningConfig, config, overrides)
            history = finetune_captioner(source, output, settings, weights=weights, **how)
        else:
            settings = load_config(CaptionerTrainingConfig, config, overrides)
            history = train_captioner(source, output, settings, weights=weights, **how)
    except TrainingInterrupted as interrupted:
        raise click.Abort from interrupted
    name = next(name for name in ("CIDEr", "perplexity", "word_perplexity") if name in history[0])
    best = (max if name == "CIDEr" else min)(history, key=lambda row: row[name])
    if is_first_process():
        click.echo(f"{output}: {name} {best[name]:.3f} after epoch {best['epoch']:.0f} of {len(history)}")
