"""Recipes: YAML files in `configs/` that are installed with the package and selected by name."""

import difflib
from pathlib import Path

from captionlib.errors import ConfigError

__all__ = ["find_recipe", "list_recipes", "recipes_folder"]


def recipes_folder() -> Path:
    """Returns the folder of the recipes: `captionlib/configs` in an installed package, `configs` in a checkout."""
    installed = Path(__file__).parent / "configs"
    return installed if installed.is_dir() else installed.parent.parent / "configs"


def list_recipes(command: str | None = None) -> dict[str, Path]:
    """Returns all recipes by name, such as `train-captioner/talk-lstm`, or those of a command, such as `talk-lstm`.

    Files whose names start with `_` are left out, because other recipes extend them.
    """
    folder = recipes_folder() / command if command else recipes_folder()
    files = sorted(file for file in folder.rglob("*.yaml") if not file.name.startswith("_"))
    return {str(file.relative_to(folder).with_suffix("").as_posix()): file for file in files}


def find_recipe(name: str, command: str) -> Path:
    """Returns the file at a path, or the recipe with a short name among those of `command` or a full name.

    Raises:
        ConfigError: no file or recipe has this name.
    """
    if Path(name).is_file():
        return Path(name)
    short, full = list_recipes(command), list_recipes()
    if recipe := short.get(name) or full.get(name):
        return recipe
    nearest = difflib.get_close_matches(name, [*short, *full], n=1)
    hint = f" (did you mean {nearest[0]}?)" if nearest else ""
    known = ", ".join(short) or "none"
    raise ConfigError(
        f"{name} is neither a file nor a recipe of {command}{hint}; recipes: {known}; `captionlib recipes` lists all"
    )
