from pathlib import Path

import click
import pytest

from captionlib.recipes import find_recipe
from jobs.cli import COMMANDS, captionlib
from tests.docs.markdown import PAGES, ROOT, read_commands

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
    assert {name for commands in COMMANDS.values() for name in commands} <= shown
