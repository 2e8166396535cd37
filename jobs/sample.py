"""The command `captionlib sample`."""

import json
from dataclasses import asdict

import click

from jobs.options import config_options, device_option

__all__ = ["command"]

_DEFAULT_LENGTHS = {
    "sentences": {"words": 30, "characters": 200, "subwords": 60},
    "continuous": {"words": 100, "characters": 500, "subwords": 200},
}


@click.command()
@click.argument("checkpoint")
@click.option("--count", type=click.IntRange(min=1), default=1, show_default=True, help="Number of texts.")
@click.option("--prefix", default="", help="Words or characters that start every text.")
@click.option(
    "--length",
    type=click.IntRange(min=1),
    metavar="N",
    help="Maximum number of tokens (words, characters or subwords) after the prefix. A model trained on continuous "
    "text generates exactly N.",
)
@click.option("--temperature", type=float, help="A lower value makes texts more predictable.  [default: 1]")
@click.option("--top-k", type=int, help="Sample from the k most probable tokens.")
@click.option(
    "--top-p",
    type=float,
    help="Sample from the smallest set of most probable tokens with at least this total probability.",
)
@click.option("--seed", type=click.IntRange(min=0), help="The same seed produces the same texts.  [default: 0]")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object per line: text, log_prob, tokens.")
@config_options
@device_option
def command(
    checkpoint: str,
    count: int,
    prefix: str,
    length: int | None,
    as_json: bool,
    config: str | None,
    overrides: tuple[str, ...],
    device: str,
    **sampling_options: float | None,
) -> None:
    """Sample texts from the language model in CHECKPOINT.

    A model trained on sentences prints one sentence per line. A model trained on continuous text prints texts of
    --length tokens (words, characters or subwords), separated by ----. With --json, log_prob is a text's natural
    log-probability.

    Use --set for other decoding options, such as no_repeat_ngram_size or forbidden_words.

    \b
    Examples:
      captionlib sample language-model --count 10
      captionlib sample language-model --prefix "a dog" --temperature 0.7 --set no_repeat_ngram_size=3
      captionlib sample author --length 1000 --top-p 0.9 --seed 1
    """
    from captionlib.config import load_config
    from captionlib.models.checkpoints.checkpoint import load_language_model
    from captionlib.models.decoding.config import DecodingConfig
    from captionlib.models.decoding.text_sampling import sample_texts

    language_model = load_language_model(checkpoint, device)
    length = length or _DEFAULT_LENGTHS[language_model.layout][language_model.vocabulary.unit]
    settings = [f"{name}={value}" for name, value in sampling_options.items() if value is not None]
    decoding = load_config(DecodingConfig, config, [*overrides, *settings, "strategy=sample", f"max_tokens={length}"])
    for index, sample in enumerate(sample_texts(language_model, decoding, count, prefix)):
        if as_json:
            click.echo(json.dumps(asdict(sample), ensure_ascii=False))
            continue
        if index and language_model.layout == "continuous":
            click.echo("----")
        click.echo(sample.text)
