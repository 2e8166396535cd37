"""The command lines and the Python code of the documentation."""

import re
import shlex
import textwrap
from collections.abc import Collection
from pathlib import Path

__all__ = ["DOCS", "PAGES", "read_commands", "read_python"]

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted([*DOCS.rglob("*.md"), ROOT / "README.md"])

_BLOCK = re.compile(r"^ *```(\w*)\n(.*?)^ *```", re.MULTILINE | re.DOTALL)


def read_commands(page: Path, only_shell: bool = False) -> list[list[str]]:
    """Returns the arguments of each `captionlib` command line of a page, in order, without `captionlib` itself.

    Args:
        page: a Markdown file.
        only_shell: read only the blocks marked as `sh`.
    """
    languages = ("sh",) if only_shell else ("sh", "")
    blocks = [text for language, text in _BLOCK.findall(page.read_text(encoding="utf-8")) if language in languages]
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [
        words[words.index("captionlib") + 1 :]
        for line in lines
        if re.match(r" *(?:torchrun .*)?captionlib [a-z]", line)
        for words in [shlex.split(line, comments=True)]
    ]


def read_python(page: Path, packages: Collection[str]) -> list[str]:
    """Returns the Python blocks of a page that use one of these packages."""
    blocks = [
        textwrap.dedent(text)
        for language, text in _BLOCK.findall(page.read_text(encoding="utf-8"))
        if language == "python"
    ]
    return [block for block in blocks if any(re.search(rf"\b{package}\b", block) for package in packages)]
