"""`captionlib sample`."""

import json
from dataclasses import asdict

import click

from captionlib.config import load_config
from captionlib.models.checkpoints.checkpoint import load_language_model
from captionlib.models.decoding.config import DecodingConfig
from captionlib.models.decoding.text_sampling import sample_texts
from jobs.options import config_options, device_option

__all__ = ["command"]

_LENGTHS = {("sentences", "words"): 30, ("sentences", "characters"): 200, ("continuous", "words"): 100}
_LONGEST = 500  # of running characters


@click.command()
@click.argument("checkpoint")
@click.option("--count", type=click.IntRange(min=1), default=1, show_default=True, help="How many texts.")
@click.option("--prefix", default="", help="What every text begins with.")
@click.option("--length", type=click.IntRange(min=1), help="Words or characters at the most; of running text, exactly.")
@click.option("--temperature", type=float, help="Below 1 keeps to what is likely, above 1 dares more.")
@click.option("--top-k", type=int, help="Draw among so many of the likeliest words or characters.")
@click.option("--top-p", type=float, help="Draw among the likeliest that together have this probability.")
@click.option("--seed", type=click.IntRange(min=0), help="Another seed writes other texts.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line: text, log_prob, tokens.")
@config_options
@device_option
def command(
    checkpoint: str,
    count: int,
    prefix: str,
    length: int | None,
    temperature: float | None,
    top_k: int | None,
    top_p: float | None,
    seed: int | None,
    as_json: bool,
    config: str | None,
    overrides: tuple[str, ...],
    device: str,
) -> None:
    """Print sentences or text that the language model in CHECKPOINT writes.

    \b
    Examples:
      captionlib sample language-model --count 10
      captionlib sample language-model --prefix "a dog" --temperature 0.7 --set no_repeat_ngram_size=3
      captionlib sample author --length 1000 --top-p 0.9 --seed 1
    """
    language_model = load_language_model(checkpoint, device)
    chosen = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
    length = length or _LENGTHS.get((language_model.layout, language_model.vocabulary.level), _LONGEST)
    given = [f"{name}={value}" for name, value in chosen.items() if value is not None]
    settings = load_config(DecodingConfig, config, [*overrides, *given, "strategy=sample", f"max_tokens={length}"])
    for number, sample in enumerate(sample_texts(language_model, settings, count, prefix)):
        if as_json:
            click.echo(json.dumps(asdict(sample), ensure_ascii=False))
        else:
            if number and language_model.layout == "continuous":
                click.echo("----")
            click.echo(sample.text)
