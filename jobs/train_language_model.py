"""The command `captionlib train-language-model`."""

from typing import Any

import click

from jobs.options import training_options

__all__ = ["command"]


@click.command()
@click.argument("source")
@training_options
def command(source: str, output: str, config: str | None, overrides: tuple[str, ...], **options: Any) -> None:
    """Train a language model on SOURCE: a text file, or the captions of a features dataset or manifest.

    extract-features writes features datasets; prepare writes manifests (lists of images). The model is a captioner
    without image input. A text file has one sentence per line, or is one continuous text (--set layout=continuous).
    Tokens are words or characters (--set tokenization=characters). Training keeps the checkpoint of the epoch with the
    lowest perplexity on the val and dev splits or on a held-out part of the text file. Ctrl-C saves the state and
    stops; the same command resumes.

    \b
    Examples:
      captionlib train-language-model features -o language-model
      captionlib train-language-model sentences.txt -o language-model --set min_count=2
      captionlib train-language-model author.txt -o author --config characters

    A recipe (--config) is a built-in configuration; --set overrides single values. The recipe `characters` is for the
    text of one author. Its settings are from Karpathy & Li's talk "Automated Image Captioning with ConvNets and
    Recurrent Nets".

    The output folder contains the checkpoint (model.safetensors, config.json, training.json), resolved.json with all
    settings of the run, metrics.jsonl and curves.png, tensorboard/, and the state to resume from in _training/.
    """
    from captionlib.config import load_config
    from captionlib.training.language_modeling import LanguageModelTrainingConfig, train_language_model

    settings = load_config(LanguageModelTrainingConfig, config, overrides)
    history = train_language_model(source, output, settings, **options)
    best = min(history, key=lambda row: row["perplexity"])
    click.echo(f"{output}: perplexity {best['perplexity']:.2f} after epoch {best['epoch']:.0f} of {len(history)}")
