"""`captionlib train-captioner`."""

import json

import click

from captionlib.config import load_config
from captionlib.training.captioning import CaptioningConfig, train_captioner
from captionlib.training.loop import TrainingStopped
from captionlib.training.processes import is_first_process
from jobs.options import training_options

__all__ = ["command"]


@click.command()
@click.argument("features")
@click.option(
    "--start-from", metavar="FOLDER", help="The captioner whose weights to start from: --set start_from=FOLDER."
)
@training_options
def command(
    features: str,
    start_from: str | None,
    output: str,
    config: str | None,
    overrides: tuple[str, ...],
    device: str,
    overwrite: bool,
    progress: bool,
) -> None:
    """Fit a captioner on FEATURES.

    Learns from the rows of the splits train and restval, and keeps the checkpoint of the epoch with the lowest
    perplexity, or the highest CIDEr, on val or dev. Ctrl-C stops it after saving; the same command goes on where it
    stopped. `torchrun` starts it on several GPUs or machines: one run, with batches as many times as large.

    \b
    Examples:
      captionlib train-captioner features -o captioner
      captionlib train-captioner features -o captioner --config configs/captioner-flickr8k-attention.yaml
      captionlib train-captioner features -o captioner --set training.epochs=30 --set captioner.hidden_size=256
      captionlib train-captioner features -o captioner --set best_by=cider --set training.average_decay=0.999
      captionlib train-captioner features -o captioner --set word_vectors=w2v.bin --set captioner.word_size=300
      captionlib train-captioner features -o tuned --start-from captioner --set training.learning_rate=0.0001
      captionlib train-captioner features -o best --start-from captioner --set objective=self_critical
      torchrun --nproc-per-node 4 --no-python captionlib train-captioner features -o captioner
    """
    if start_from is not None:
        overrides = (*overrides, f"start_from={json.dumps(start_from)}")
    settings = load_config(CaptioningConfig, config, overrides)
    try:
        history = train_captioner(features, output, settings, device=device, overwrite=overwrite, progress=progress)
    except TrainingStopped as stopped:
        raise click.Abort from stopped
    name, choose = ("CIDEr", max) if settings.best_by == "cider" else ("perplexity", min)
    best = choose(history, key=lambda row: row[name])
    if is_first_process():
        click.echo(f"{output}: {name} {best[name]:.3f} after epoch {best['epoch']:.0f} of {len(history)}")
