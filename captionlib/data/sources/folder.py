"""Reads a folder or a glob of images, one directory at a time to limit memory."""

import itertools
import os
import re
from collections.abc import Iterator, Sequence

from captionlib.data.images.addresses import is_part_address
from captionlib.data.images.formats import IMAGE_EXTENSIONS
from captionlib.data.sources.globs import PathFilter, filter_files, filter_folders
from captionlib.data.sources.locations import (
    Location,
    get_extension,
    is_glob,
    locate_all,
    scan_folder,
    split_glob,
)
from captionlib.data.sources.rows import ImageRecord, SkipCounter, SourceOptions
from captionlib.data.sources.versions import version_from_file, version_from_listing, version_from_stat
from captionlib.errors import DatasetError
from captionlib.storage.file_systems import split_protocol

__all__ = ["find_images", "read_folder"]

_DELETED = "deleted while the folder was listed"


def read_folder(addresses: Sequence[str], options: SourceOptions, skips: SkipCounter) -> Iterator[ImageRecord]:
    """Yields the images in folders and their subfolders, sorted by name. The id is the path relative to the folder.

    Images are files with an image extension or without an extension; they are not opened. Hidden files and folders are
    skipped. Symbolic links are followed unless they point to a parent folder. For a glob, ids are relative to the last
    folder before the first wildcard.
    """
    for location in itertools.chain.from_iterable(map(locate_all, addresses)):
        if is_glob(location):
            root, glob = split_glob(location)
            names = _walk(root, filter_files(glob), filter_folders(glob), skips)
        elif location.find_type() == "file":
            root, names = location.parent, iter([(location.name, version_from_file(location))])
        else:
            root = location
            names = _walk(root, lambda _: True, lambda _: True, skips)
        for name, version in names:
            if _is_image_name(name, skips):
                uri = f"{root.address}/{name}"
                if is_part_address(uri) and not root.is_local:  # such as x.parquet#row=1&column=y
                    skips.reject_image("name that looks like the address of a part of a file", uri)
                    continue
                yield ImageRecord(name, uri, options.default_split, (), uri, version)


def find_images(address: str) -> list[str]:
    """Returns the addresses of the images that a folder or glob contains. Any other address is returned unchanged.

    Raises:
        DatasetError: a folder cannot be read, or a folder or glob has no images.
    """
    if split_protocol(address)[0] in ("http", "https", "data"):
        return [address]
    skips = SkipCounter()
    if not any(is_glob(location) or location.find_type() == "directory" for location in locate_all(address)):
        return [address]
    images = [row.uri for row in read_folder([address], SourceOptions(), skips)]
    if not images:
        raise DatasetError(f"{address} has no images; skipped: {skips.describe()}; check the path")
    return images


def _is_image_name(name: str, skips: SkipCounter) -> bool:
    extension = get_extension(name)
    if extension and extension not in IMAGE_EXTENSIONS:
        # Extensions such as .001, .002 and so on share one reason; otherwise there could be too many reasons.
        is_common_form = re.fullmatch(r"\.[a-z][a-z0-9]{0,4}", extension)
        reason = f"not an image: extension {extension}" if is_common_form else "not an image: other extension"
        skips.count_ignored(reason)
        return False
    return True


def _walk(
    root: Location, include_file: PathFilter, enter_folder: PathFilter, skips: SkipCounter
) -> Iterator[tuple[str, str]]:
    """Yields file paths relative to `root`, each with a version: a string that changes when the file changes.

    The files of a directory come first, sorted by name, and then the files in its subdirectories.
    """
    pending: list[tuple[str, tuple[object, ...]]] = [("", ())]
    while pending:
        folder, ancestors = pending.pop()
        try:
            identity = _identify(root.join(folder))
            if identity in ancestors:
                skips.count_ignored("link to a parent folder")
                continue
            files, folders = _list_names(root.join(folder), identity, skips)
        except OSError as error:
            if not isinstance(error, FileNotFoundError) or not _was_deleted(root, folder, ancestors):
                reason = error.strerror or type(error).__name__
                raise DatasetError(f"folder {root.join(folder).address} cannot be read: {reason}") from error
            skips.count_ignored(_DELETED)
            continue
        prefix = f"{folder}/" if folder else ""
        yield from ((prefix + name, version) for name, version in files if include_file(prefix + name))
        ancestors = ancestors if identity is None else (*ancestors, identity)
        pending.extend((prefix + name, ancestors) for name in reversed(folders) if enter_folder(prefix + name))


def _identify(folder: Location) -> object | None:
    """Returns the device and inode of a local directory, after following links, or None for a remote directory."""
    if not folder.is_local:
        return None
    status = os.stat(folder.path or "/")  # noqa: PTH116  # faster than Path, for trees with many directories
    return status.st_dev, status.st_ino


def _was_deleted(root: Location, folder: str, ancestors: Sequence[object]) -> bool:
    """Returns whether a missing directory was deleted. Otherwise, its disk was unmounted.

    Unmounting a disk changes the device and inode of the nearest parent that exists, and deleting a directory does not.
    `ancestors` holds the identities of the parents of `folder` when they were listed, starting with `root`.
    """
    if not root.is_local:
        return bool(folder)
    parents = folder.split("/")[:-1]
    for depth in reversed(range(len(ancestors))):
        try:
            return _identify(root.join("/".join(parents[:depth]))) == ancestors[depth]
        except FileNotFoundError:  # this parent was deleted too
            continue
    return False


def _list_names(
    folder: Location, identity: object | None, skips: SkipCounter
) -> tuple[list[tuple[str, str]], list[str]]:
    """Returns the sorted files of a directory, as names and versions, and its sorted subdirectories."""
    files: list[tuple[str, str]] = []
    folders: list[str] = []
    for name, kind, details in scan_folder(folder):
        if name.startswith("."):
            skips.count_ignored("hidden")
        elif kind is None:
            skips.count_ignored("not a regular file")
        elif kind == "directory":
            folders.append(name)
        else:
            try:
                version = version_from_stat(details.stat()) if folder.is_local else version_from_listing(details)
            except FileNotFoundError:
                if _identify(folder) != identity:
                    raise
                skips.count_ignored(_DELETED)
            else:
                files.append((name, version))
    return sorted(files), sorted(folders)
