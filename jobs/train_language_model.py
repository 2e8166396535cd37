"""`captionlib train-language-model`."""

import click

from captionlib.config import load_config
from captionlib.errors import TrainingInterrupted
from captionlib.training.language_modeling import LanguageModelTrainingConfig, train_language_model
from jobs.options import training_options

__all__ = ["command"]


@click.command()
@click.argument("source")
@training_options
def command(
    source: str,
    output: str,
    config: str | None,
    overrides: tuple[str, ...],
    device: str,
    overwrite: bool,
    progress: bool,
) -> None:
    """Fit a language model on the sentences of SOURCE: a features dataset, a manifest, or a text file.

    It is the captioner without its image. A text file has a line a sentence, or is one running text
    (--set layout=continuous); both are learned by the word or by the character (--set level=characters). Keeps the
    checkpoint of the epoch with the lowest perplexity on the splits val or dev, or on a share of the text file.
    Ctrl-C stops it after saving; the same command goes on where it stopped.

    \b
    Examples:
      captionlib train-language-model features -o language-model
      captionlib train-language-model sentences.txt -o language-model --set min_count=2
      captionlib train-language-model author.txt -o author --config characters
    """
    settings = load_config(LanguageModelTrainingConfig, config, overrides)
    try:
        history = train_language_model(source, output, settings, device=device, overwrite=overwrite, progress=progress)
    except TrainingInterrupted as interrupted:
        raise click.Abort from interrupted
    best = min(history, key=lambda row: row["perplexity"])
    click.echo(f"{output}: perplexity {best['perplexity']:.2f} after epoch {best['epoch']:.0f} of {len(history)}")
