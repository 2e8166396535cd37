"""Finds recipes: built-in configurations in YAML that are installed with the package and selected by name."""

import difflib
from pathlib import Path

from captionlib.errors import ConfigError

__all__ = ["find_recipe", "list_recipes", "recipes_folder"]


def recipes_folder() -> Path:
    """Returns the folder that holds the recipes: `captionlib/configs` if installed, `configs` in a source checkout."""
    installed = Path(__file__).parent / "configs"
    return installed if installed.is_dir() else installed.parent.parent / "configs"


def list_recipes(command: str | None = None) -> dict[str, Path]:
    """Returns recipes by name, such as `train-captioner/talk-lstm`, or `talk-lstm` if `command` is `train-captioner`.

    Files whose names start with `_` are omitted, because they exist only for other recipes to extend.
    """
    folder = recipes_folder() / command if command else recipes_folder()
    files = sorted(file for file in folder.rglob("*.yaml") if not file.name.startswith("_"))
    return {str(file.relative_to(folder).with_suffix("").as_posix()): file for file in files}


def find_recipe(name: str, command: str) -> Path:
    """Returns the file if `name` is a path, or else the recipe with this short name (for `command`) or full name.

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
