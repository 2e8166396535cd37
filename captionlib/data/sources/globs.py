"""Brace lists (`{a,b}.csv`, `{00..12}.tar`) and globs, in which `**` matches any number of folders."""

import fnmatch
import itertools
import re
from collections.abc import Callable, Iterable, Sequence

__all__ = ["PathFilter", "expand_braces", "filter_files", "filter_folders", "find_wildcard"]

PathFilter = Callable[[str], bool]

_WILDCARD = re.compile(r"[*?\[]")
_BRACES = re.compile(r"\{([^{}]*(?:,|\.\.)[^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")


def expand_braces(address: str) -> list[str]:
    """Expands `a{00..12}.tar` and `{train,val}.csv` as a shell does; leading zeros are kept."""
    match = _BRACES.search(address)
    if match is None:
        return [address]
    if span := _RANGE.fullmatch(match[1]):
        first, last = span.groups()
        width = len(first) if first.startswith("0") else 0
        step = 1 if int(first) <= int(last) else -1
        choices: Iterable[str] = (f"{number:0{width}d}" for number in range(int(first), int(last) + step, step))
    else:
        choices = match[1].split(",")
    before, after = address[: match.start()], expand_braces(address[match.end() :])
    return [f"{before}{choice}{rest}" for choice, rest in itertools.product(choices, after)]


def find_wildcard(path: str) -> int | None:
    """Returns the index of the first part of a path that contains a wildcard, or None if no part does."""
    return next((index for index, part in enumerate(path.split("/")) if _WILDCARD.search(part)), None)


def filter_files(glob: str) -> PathFilter:
    """Returns a filter for paths that match a glob."""
    parts = _split_parts(glob)
    return lambda path: _matches(path.split("/"), parts)


def _matches(names: Sequence[str], parts: Sequence[str]) -> bool:
    if not parts:
        return not names
    if parts[0] == "**":
        return any(_matches(names[start:], parts[1:]) for start in range(len(names)))
    return bool(names) and fnmatch.fnmatchcase(names[0], parts[0]) and _matches(names[1:], parts[1:])


def filter_folders(glob: str) -> PathFilter:
    """Returns a filter for folders that can contain matches of a glob. Other folders need not be listed."""
    parts = _split_parts(glob)[:-1]

    def can_contain_matches(folder: str) -> bool:
        for depth, name in enumerate(folder.split("/")):
            if depth >= len(parts):
                return False
            if parts[depth] == "**":
                return True
            if not fnmatch.fnmatchcase(name, parts[depth]):
                return False
        return True

    return can_contain_matches


def _split_parts(glob: str) -> list[str]:
    parts = [part for part in glob.split("/") if part]
    return [*parts, "*"] if parts[-1] == "**" else parts
