"""Recipes: YAML files in `configs/` that are installed with the package and selected by name."""

import difflib
from pathlib import Path

from captionlib.errors import ConfigError

__all__ = ["find_recipe", "list_recipes", "recipes_folder"]


def recipes_folder() -> Path:
    """Returns the folder of the recipes: `captionlib/configs` in an installed package, `configs` in a checkout."""
    package = Path(__file__).parent
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def list_recipes(command: str | None = None) -> dict[str, Path]:
    """Returns the recipes by name, such as `train-captioner/talk-lstm`.

    Files whose names start with `_` are left out: other recipes extend them.

    Args:
        command: returns only the recipes of this command, by short names such as `talk-lstm`; None returns all.
    """
    folder = recipes_folder() / command if command else recipes_folder()
    files = sorted(file for file in folder.rglob("*.yaml") if not file.name.startswith("_"))
    return {str(file.relative_to(folder).with_suffix("").as_posix()): file for file in files}


def find_recipe(name: str, command: str) -> Path:
    """Returns the file of a recipe.

    Args:
        name: a path, a short name such as `talk-lstm`, or a full name such as `train-captioner/talk-lstm`.
        command: the command whose recipes have short names.

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
