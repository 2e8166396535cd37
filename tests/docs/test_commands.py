import itertools
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click
import pytest

from captionlib.config import load_config, to_dict
from captionlib.errors import ConfigError
from captionlib.recipes import find_recipe
from docs.reference_pages import find_config_types, render_configuration
from jobs.cli import COMMANDS, captionlib
from tests.docs.markdown import PAGES, ROOT, read_commands

NAMES = [name for commands in COMMANDS.values() for name in commands]
COMMAND_LINES = [
    pytest.param(page, command, id=f"{page.relative_to(ROOT)}:{' '.join(command)}")
    for page in PAGES
    for command in read_commands(page)
]


@pytest.mark.parametrize(("page", "command"), COMMAND_LINES)
def test_command_line_of_the_documentation_parses(page: Path, command: list[str]) -> None:
    name, *arguments = command
    if name.startswith("-"):
        return  # an option of captionlib itself
    with click.Context(captionlib, info_name="captionlib") as parent:
        subcommand = captionlib.get_command(parent, name)
        assert subcommand is not None, f"no command {name}"
        # Parses without running; an unknown option, a missing argument or an unknown recipe raises.
        with subcommand.make_context(name, arguments, parent=parent, resilient_parsing=False):
            pass


def test_recipes_of_runners_in_the_documentation_exist() -> None:
    names = {
        word[1:]
        for page in PAGES
        for command in read_commands(page)
        if "--" in command
        for word in command[command.index("--") :]
        if word.startswith("@") and "/" not in word
    }
    assert names
    for name in names:
        find_recipe(f"runners/{name}", "")


def test_documentation_shows_every_command() -> None:
    shown = {command[0] for page in PAGES for command in read_commands(page)}
    assert set(NAMES) <= shown


@pytest.mark.parametrize(("page", "command"), COMMAND_LINES)
def test_settings_of_the_documentation_are_valid(page: Path, command: list[str]) -> None:
    options = list(itertools.pairwise(command))
    settings = [value for option, value in options if option == "--set"]
    settings += [f"init_from={value}" for option, value in options if option == "--init-from"]
    recipes = [value for option, value in options if option == "--config"]
    if not settings and not recipes:
        return
    recipe = find_recipe(recipes[0], {"caption": "generate-captions"}.get(command[0], command[0])) if recipes else None
    errors = []
    for config_type in find_config_types(command[0]):
        try:
            load_config(config_type, recipe, settings)
            return
        except ConfigError as error:
            errors.append(str(error))
    pytest.fail("\n".join(errors))


def test_reference_documents_the_configuration_of_all_commands() -> None:
    configured = []
    for name in NAMES:
        with click.Context(captionlib) as context:
            command = captionlib.get_command(context, name)
        assert command is not None
        configured += [name] if any(parameter.name == "config" for parameter in command.params) else []
    headings = re.findall(r"^## ([a-z-]+): \w+Config$", render_configuration(), re.MULTILINE)
    assert list(dict.fromkeys(headings)) == configured


def test_reference_documents_the_configuration_of_collections() -> None:
    section = render_configuration().split("\n## collection.yaml\n")[1]
    keys = re.findall(r"^\| `(.+?)` \|", section, re.MULTILINE)
    assert {"captioner", "ranker", "sources[].name", "sources[].prepare.options.uri_column", "index.language"} <= {
        *keys
    }
    assert "sources" not in keys


def test_configuration_keys_in_the_text_exist() -> None:
    types = {config_type for name in NAMES for config_type in find_config_types(name)}
    known = {key for config_type in types for key in list_keys(to_dict(config_type()))}
    sections = "|".join(sorted({key.split(".")[0] for key in known if "." in key}))
    for page in PAGES:
        mentioned = re.findall(rf"`((?:{sections})\.[a-z_.]+)`", page.read_text(encoding="utf-8"))
        assert {name for name in mentioned if not name.endswith((".safetensors", ".json"))} <= known, page


def list_keys(values: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in values.items():
        yield prefix + key
        if isinstance(value, dict):
            yield from list_keys(value, f"{prefix}{key}.")
