"""The command `captionlib recipes`."""

import re
from itertools import groupby, takewhile
from pathlib import Path

import click

from captionlib.recipes import find_recipe, list_recipes

__all__ = ["command"]


@click.command()
@click.argument("name", required=False)
def command(name: str | None) -> None:
    """List captionlib's recipes (built-in configurations), or print the recipe NAME.

    A recipe is a YAML file of settings for one command. Pass its name with --config. To change a few values, add --set.
    To change many, save the recipe to a file, edit the file, and pass it with --config.

    \b
    Examples:
      captionlib recipes
      captionlib recipes train-captioner/talk-lstm
      captionlib recipes train-captioner/talk-lstm > my-recipe.yaml
      captionlib train-captioner features -o captioner --config talk-lstm
    """
    if name is not None:
        click.echo(find_recipe(name).read_text(encoding="utf-8"), nl=False)
        return
    formatter = click.HelpFormatter(width=110)
    for folder, group in groupby(list_recipes().items(), key=lambda recipe: recipe[0].rpartition("/")[0]):
        with formatter.section(folder):
            formatter.write_dl([(f"{recipe.rpartition('/')[2]:<22}", _read_summary(path)) for recipe, path in group])
    click.echo(formatter.getvalue().strip())


def _read_summary(path: Path) -> str:
    """Returns the first sentence of the comment at the start of a recipe."""
    lines = takewhile(re.compile("# (?! )").match, path.read_text(encoding="utf-8").splitlines())
    comment = " ".join(line.removeprefix("# ") for line in lines)
    return re.split(r"(?<=\.) ", comment, maxsplit=1)[0].rstrip(":")
