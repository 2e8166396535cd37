"""Reads a folder of images, or a glob, directory by directory: never more than one directory's names at once."""

import fnmatch
import os
import re
from collections.abc import Callable, Iterator, Sequence

from captionlib.data.sources.locations import (
    IMAGE_EXTENSIONS,
    Location,
    expand_braces,
    get_extension,
    is_pattern,
    locate,
    scan_folder,
    split_pattern,
)
from captionlib.data.sources.rows import ManifestRow, ReportSkip, SourceOptions
from captionlib.errors import DatasetError

__all__ = ["read_folder"]

Wanted = Callable[[str], bool]


def read_folder(addresses: Sequence[str], options: SourceOptions, report_skip: ReportSkip) -> Iterator[ManifestRow]:
    """The images below folders, in the order of their names; the id is the path below the folder.

    A file with an image's extension or none is a row, and decoding it decides; others are skipped, as are hidden
    files and folders, and what is no regular file. Links are followed, but not to a folder above them. A glob starts
    from its first folder without a wildcard, and ids are relative to that.

    Raises:
        DatasetError: a folder does not exist or may not be read.
    """
    for spelled in (one for address in addresses for one in _spellings(address)):
        location = locate(spelled)
        if is_pattern(location):
            root, pattern = split_pattern(location)
            names = _walk(root, _matcher(pattern), _leads_to(pattern), report_skip)
        elif location.fs.isfile(location.path):
            root, names = location.parent, iter([location.name])
        else:
            root = location
            names = _walk(root, lambda _: True, lambda _: True, report_skip)
        for name in names:
            if _is_image(name, report_skip):
                uri = f"{root.address}/{name}"
                yield ManifestRow(name, uri, options.default_split, ())


def _spellings(address: str) -> list[str]:
    location = locate(address)
    return [address] if location.fs.exists(location.path) else expand_braces(address)


def _is_image(name: str, report_skip: ReportSkip) -> bool:
    extension = get_extension(name)
    if extension and extension not in IMAGE_EXTENSIONS:
        # Without a bound on them, numbered extensions would be as many reasons as files.
        known = extension if re.fullmatch(r"\.[a-z][a-z0-9]{0,4}", extension) else "of another kind"
        report_skip(f"no image: extension {known}")
        return False
    try:
        name.encode()
    except UnicodeEncodeError:
        report_skip("name is not UTF-8")
        return False
    return True


def _walk(root: Location, wanted: Wanted, leads: Wanted, report_skip: ReportSkip) -> Iterator[str]:
    """The files below a folder, relative to it: those of a directory in order, then its subdirectories in order."""
    waiting: list[tuple[str, tuple[object, ...]]] = [("", ())]
    while waiting:
        folder, above = waiting.pop()
        try:
            itself = _identity(root.join(folder))
            if itself in above:
                report_skip("link to a folder above it")
                continue
            files, folders = _list_names(root.join(folder), report_skip)
        except OSError as error:
            reason = error.strerror or type(error).__name__
            raise DatasetError(f"folder {root.join(folder).address} cannot be read: {reason}") from error
        prefix = f"{folder}/" if folder else ""
        yield from filter(wanted, (prefix + name for name in files))
        above = above if itself is None else (*above, itself)
        waiting.extend((prefix + name, above) for name in reversed(folders) if leads(prefix + name))


def _identity(folder: Location) -> object | None:
    """What a local directory is told by, however it is reached."""
    if not folder.is_local:
        return None
    status = os.stat(folder.path or "/")  # noqa: PTH116  # called for every directory of millions of files
    return status.st_dev, status.st_ino


def _list_names(folder: Location, report_skip: ReportSkip) -> tuple[list[str], list[str]]:
    """The names of files and of subdirectories in one directory, sorted."""
    files: list[str] = []
    folders: list[str] = []
    for name, kind in scan_folder(folder):
        if name.startswith("."):
            report_skip("hidden")
        elif kind is None:
            report_skip("no regular file")
        else:
            (folders if kind == "directory" else files).append(name)
    return sorted(files), sorted(folders)


def _matcher(pattern: str) -> Wanted:
    """Whether a file's path matches a glob; `**` stands for any number of folders, `*` for a part of one name."""
    parts = _parts(pattern)
    return lambda name: _matches(name.split("/"), parts)


def _matches(names: Sequence[str], parts: Sequence[str]) -> bool:
    if not parts:
        return not names
    if parts[0] == "**":
        return any(_matches(names[start:], parts[1:]) for start in range(len(names)))
    return bool(names) and fnmatch.fnmatchcase(names[0], parts[0]) and _matches(names[1:], parts[1:])


def _leads_to(pattern: str) -> Wanted:
    """Whether a folder can hold matches of a glob, so that others are not listed."""
    parts = _parts(pattern)[:-1]

    def leads(folder: str) -> bool:
        for number, name in enumerate(folder.split("/")):
            if number >= len(parts):
                return False
            if parts[number] == "**":
                return True
            if not fnmatch.fnmatchcase(name, parts[number]):
                return False
        return True

    return leads


def _parts(pattern: str) -> list[str]:
    parts = [part for part in pattern.split("/") if part]
    return [*parts, "*"] if parts[-1] == "**" else parts
