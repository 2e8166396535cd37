"""Finds recipes: built-in configurations in YAML that are installed with the package and selected by name."""

from pathlib import Path

from captionlib.errors import ConfigError, suggest

__all__ = ["find_recipe", "list_recipes", "recipes_folder"]


def recipes_folder() -> Path:
    """Returns the folder that holds the recipes: `captionlib/configs` if installed, `configs` in a source checkout."""
    installed = Path(__file__).parent / "configs"
    return installed if installed.is_dir() else installed.parent.parent / "configs"


def list_recipes(command: str | None = None) -> dict[str, Path]:
    """Returns recipes by name, such as `train-captioner/talk-lstm`, or `talk-lstm` if `command` is `train-captioner`.

    Files whose names start with `_` are omitted: they are bases that recipes extend.
    """
    folder = recipes_folder() / command if command else recipes_folder()
    files = sorted(file for file in folder.rglob("*.yaml") if not file.name.startswith("_"))
    return {str(file.relative_to(folder).with_suffix("").as_posix()): file for file in files}


def find_recipe(name: str, command: str | None = None) -> Path:
    """Returns `name` if it is the path of a file, or else the file of the recipe with this full or short name.

    If `command` is None, the short name must be unique among the recipes of all commands.
    """
    if Path(name).is_file():
        return Path(name)
    recipes = list_recipes()
    if command is None:
        short_names = {recipe: recipe.rpartition("/")[2] for recipe in recipes}
    else:
        short_names = {f"{command}/{recipe}": recipe for recipe in list_recipes(command)}
    matches = [recipe for recipe in recipes if name in (recipe, short_names.get(recipe))]
    if len(matches) > 1:
        raise ConfigError(f"{name} is the name of {len(matches)} recipes; use one of {', '.join(matches)}")
    if matches:
        return recipes[matches[0]]
    raise ConfigError(
        f"{name} is neither a file nor a recipe{f' of {command}' if command else ''}"
        f"{suggest(name, [*short_names.values(), *recipes])}; `captionlib recipes` lists all recipes"
    )
