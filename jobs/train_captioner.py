"""The command `captionlib train-captioner`."""

import json
from typing import Any

import click

from jobs.options import training_options, weights_option

__all__ = ["command"]


@click.command()
@click.argument("source")
@click.option("--init-from", metavar="FOLDER", help="Captioner to start from; same as --set init_from=FOLDER.")
@weights_option
@training_options
def command(
    source: str, init_from: str | None, output: str, config: str | None, overrides: tuple[str, ...], **options: Any
) -> None:
    """Train a captioner on the features or images in SOURCE.

    If SOURCE is a features dataset (from extract-features), only the captioner is trained. If it is a manifest (a list
    of images, from prepare), the captioner is fine-tuned together with its encoder. Training uses the splits train and
    restval (images of COCO's val set that Karpathy's splits use for training). The checkpoint of the best epoch on val
    or dev is kept: the one with the lowest perplexity or, with objective=self_critical, the highest CIDEr. Ctrl-C saves
    the state and stops; the same command resumes. torchrun trains on several GPUs or machines, and the batch size is
    multiplied by the number of processes.

    \b
    Examples:
      captionlib train-captioner features -o captioner
      captionlib train-captioner features -o captioner --config talk-lstm --set training.epochs=30
      captionlib train-captioner features -o better --init-from captioner --set objective=self_critical

    A recipe (--config) is a built-in configuration; --set overrides single values. talk-lstm and talk-rnn have the
    settings of Karpathy & Li's talk "Automated Image Captioning with ConvNets and Recurrent Nets", and finetune-encoder
    is for manifests. For small datasets, train in three stages, each starting from the previous one (--init-from):
    first flickr8k-bag-of-words, which learns the words of a caption without their order, then flickr8k-attention or
    flickr8k-pooled, and last flickr8k-self-critical.

    A run stops with an error if its loss is not finite. It also stops if its perplexity stays above that of a unigram
    model (word frequencies) for training.unigram_patience epochs. In both cases, the best checkpoint is kept.

    In these examples, `maps` is a features dataset with a vector for each position of an image:

    \b
      captionlib train-captioner maps -o words --config flickr8k-bag-of-words
      captionlib train-captioner maps -o attention --config flickr8k-attention --init-from words
      captionlib train-captioner manifest -o tuned --config finetune-encoder --init-from captioner
      torchrun --nproc-per-node 4 --no-python captionlib train-captioner features -o captioner

    The output folder contains the checkpoint (model.safetensors, config.json, training.json; after fine-tuning also
    encoder.safetensors), resolved.json with all settings of the run, metrics.jsonl and curves.png, tensorboard/, the
    state to resume from in _training/, and the unreadable images in __failures/.
    """
    from captionlib.config import load_config
    from captionlib.data.shards.dataset import open_dataset
    from captionlib.training.captioning import CaptionerTrainingConfig, train_captioner
    from captionlib.training.distributed import is_first_process
    from captionlib.training.finetuning import FinetuningConfig, finetune_captioner

    if init_from is not None:
        overrides = (*overrides, f"init_from={json.dumps(init_from)}")
    if open_dataset(source).kind == "manifest":
        finetuning = load_config(FinetuningConfig, config, overrides)
        history = finetune_captioner(source, output, finetuning, **options)
    else:
        training = load_config(CaptionerTrainingConfig, config, overrides)
        history = train_captioner(source, output, training, **options)
    name = next(name for name in ("CIDEr", "perplexity", "word_perplexity") if name in history[0])
    best = (max if name == "CIDEr" else min)(history, key=lambda row: row[name])
    if is_first_process():
        click.echo(f"{output}: {name} {best[name]:.3f} after epoch {best['epoch']:.0f} of {len(history)}")
