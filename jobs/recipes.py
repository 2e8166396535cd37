"""`captionlib recipes`."""

import difflib
import re
from itertools import groupby, takewhile
from pathlib import Path

import click

from captionlib.errors import ConfigError
from captionlib.recipes import list_recipes

__all__ = ["command"]


@click.command()
@click.argument("name", required=False)
def command(name: str | None) -> None:
    """List the recipes that come with captionlib, or print the one called NAME.

    A recipe is a YAML file of settings for one command, which takes it with --config. To change a value, add --set; to
    change many, save the recipe to a file, edit it, and pass the file to --config.

    \b
    Examples:
      captionlib recipes
      captionlib recipes train-captioner/talk-lstm
      captionlib recipes train-captioner/talk-lstm > my-recipe.yaml
      captionlib train-captioner features -o captioner --config talk-lstm
    """
    if name is not None:
        click.echo(_find(name).read_text(encoding="utf-8"), nl=False)
        return
    formatter = click.HelpFormatter(width=110)
    for folder, group in groupby(list_recipes().items(), key=lambda recipe: recipe[0].rpartition("/")[0]):
        with formatter.section(folder):
            formatter.write_dl([(f"{recipe.rpartition('/')[2]:<22}", _read_summary(path)) for recipe, path in group])
    click.echo(formatter.getvalue().strip())


def _find(name: str) -> Path:
    """Returns the recipe with this name, which may lack the command if no other recipe has it."""
    recipes = list_recipes()
    matches = [recipe for recipe in recipes if name in (recipe, recipe.rpartition("/")[2])]
    if not matches:
        nearest = difflib.get_close_matches(name, recipes, n=1, cutoff=0.4)
        hint = f" (did you mean {nearest[0]}?)" if nearest else ""
        raise ConfigError(f"{name} is not a recipe{hint}; `captionlib recipes` lists all")
    if len(matches) > 1:
        raise ConfigError(f"{name} is the name of {len(matches)} recipes; give one of {', '.join(matches)}")
    return recipes[matches[0]]


def _read_summary(path: Path) -> str:
    """Returns the first sentence of the comment that a recipe begins with."""
    lines = takewhile(re.compile("# (?! )").match, path.read_text(encoding="utf-8").splitlines())
    comment = " ".join(line.removeprefix("# ") for line in lines)
    return re.split(r"(?<=\.) ", comment, maxsplit=1)[0].rstrip(":")
