"""An index as a folder: one file says which others it is made of, and is replaced in one step.

    folder/
      index.json              what it was built from, and the names of all below
      rows/part-00000-HASH.arrow ...
      text-HASH/              Tantivy's
      vectors-HASH.faiss
      trained-HASH.faiss      the centroids alone, to add further shards with

Whoever has the old one open keeps it: what only the version before the last uses is removed by the next build.
"""

import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from captionlib.config import build_config, to_dict
from captionlib.data.shards.markers import to_json
from captionlib.errors import ConfigError, DatasetError
from captionlib.search.index_config import IndexConfig, VectorLayout
from captionlib.storage.folders import TEMPORARY_FOLDER, Folder

__all__ = [
    "DESCRIPTION",
    "IndexDescription",
    "IndexedShard",
    "Source",
    "fetch_tree",
    "local_copy",
    "publish_tree",
    "read_description",
    "scratch",
    "write_description",
]

DESCRIPTION = "index.json"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class Source:
    """A dataset that an index was built from.

    Attributes:
        folder: its address.
        fingerprint: of all that its rows depend on.
        shards: that it has when it is complete.
        ranker: the fingerprint of the ranker that made the vectors; empty for captions.
    """

    folder: str
    fingerprint: str
    shards: int
    ranker: str = ""


@dataclass(frozen=True)
class IndexedShard:
    """A shard that an index holds.

    Attributes:
        shard: its number in the datasets.
        offset: the number of its first row in the index.
        rows: how many.
        captions: the checksum of its captions.
        embeddings: the checksum of its embeddings; empty without.
        file: its rows.
    """

    shard: int
    offset: int
    rows: int
    captions: str
    embeddings: str
    file: str

    @property
    def end(self) -> int:
        return self.offset + self.rows


@dataclass(frozen=True)
class IndexDescription:
    """What an index is.

    Attributes:
        fingerprint: of all that its answers depend on.
        created: when, in UTC.
        config: how it was built.
        captions: what it was built from.
        embeddings: likewise; None without vectors.
        layout: of the vectors; None without.
        shards: in the order of their rows.
        capacity: row numbers lie below this; those of shards that were replaced are not used again.
        captions_count: captions that can be found.
        vectors_count: images that can be found by their vectors.
        text: the folder of the text index.
        vectors: the file of the vectors; empty without.
        trained: the file of the centroids; empty without.
        previous: files of the version before that this one does not use.
    """

    fingerprint: str
    created: str
    config: IndexConfig
    captions: Source
    embeddings: Source | None
    layout: VectorLayout | None
    shards: tuple[IndexedShard, ...]
    capacity: int
    captions_count: int
    vectors_count: int
    text: str
    vectors: str
    trained: str
    previous: tuple[str, ...] = ()

    @property
    def files(self) -> list[str]:
        """The files and folders that it is made of."""
        vectors = [self.vectors, self.trained] if self.vectors else []
        return [self.text, *vectors, *(shard.file for shard in self.shards)]

    @property
    def is_complete(self) -> bool:
        """Whether every shard of the captions is in it."""
        return len(self.shards) == self.captions.shards


def read_description(folder: Folder) -> IndexDescription | None:
    """What an index is; None where there is none.

    Raises:
        DatasetError: it is damaged, or of another version.
    """
    try:
        content: dict[str, Any] = json.loads(folder.read(DESCRIPTION))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError as error:
        raise DatasetError(f"{folder.address(DESCRIPTION)} is damaged ({error}); build the index again") from error
    found = (content.pop("kind", None), content.pop("format_version", None)) if isinstance(content, dict) else None
    if found != ("index", FORMAT_VERSION):
        raise DatasetError(f"{folder.uri}: expected an index of version {FORMAT_VERSION}; build it again")
    try:
        return build_config(IndexDescription, content, origin=folder.address(DESCRIPTION))
    except ConfigError as error:
        raise DatasetError(f"{error}; build the index again") from error


def write_description(folder: Folder, description: IndexDescription) -> None:
    """Makes an index what its readers see from now on."""
    content: Mapping[str, Any] = to_dict(description)
    folder.write(DESCRIPTION, to_json({"kind": "index", "format_version": FORMAT_VERSION, **content}))


@contextmanager
def scratch(folder: Folder) -> Iterator[Path]:
    """A new local folder that is gone after the block; beside a local index, so that files can be moved into it."""
    parent = None
    if folder.is_local:
        parent = Path(folder.path(TEMPORARY_FOLDER))
        parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="captionlib-", dir=parent) as path:
        yield Path(path)


def publish_tree(folder: Folder, path: Path, name: str) -> None:
    """Moves a folder or file out of `scratch` to where it belongs, in place of one that a build left that died."""
    folder.remove(name)
    if folder.is_local:
        target = Path(folder.path(name))
        target.parent.mkdir(parents=True, exist_ok=True)
        path.rename(target)
        return
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    for file in files:
        target_name = name if path.is_file() else f"{name}/{file.relative_to(path).as_posix()}"
        with folder.stage(target_name) as staged:
            shutil.copyfile(file, staged)


def fetch_tree(folder: Folder, name: str, path: Path) -> Path:
    """A local path of a folder or file of an index: its own where it is local, else a copy.

    Args:
        folder: of the index.
        name: in it.
        path: where a copy may go.
    """
    if folder.is_local:
        return Path(folder.path(name))
    path.parent.mkdir(parents=True, exist_ok=True)
    if files := folder.list(name):
        path.mkdir()
        for file in files:
            folder.download(f"{name}/{file}", path / file)
    else:
        folder.download(name, path)
    return path


def local_copy(folder: Folder, description: IndexDescription, cache: Path | None = None) -> Path:
    """A local folder with all files of an index: its own, or a copy that is made once.

    Copies are kept by address and fingerprint; one of another version of the same index makes room for it.

    Args:
        folder: of the index.
        description: what it is.
        cache: where copies are kept; None is `$CAPTIONLIB_CACHE`, or `captionlib` in the user's cache folder.
    """
    if folder.is_local and os.access(folder.path(description.text), os.W_OK):  # Tantivy locks where it reads
        return Path(folder.path("")).absolute()
    place = (cache or _cache_folder()) / uuid.uuid5(uuid.NAMESPACE_URL, folder.uri).hex
    copy = place / description.fingerprint
    if copy.is_dir():
        return copy
    place.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".copying-", dir=place) as partial:
        whole = Path(partial) / "index"
        for name in description.files:
            found = fetch_tree(folder, name, whole / name)
            if found != whole / name:
                _copy_local(found, whole / name)
        try:
            whole.rename(copy)
        except OSError:
            if not copy.is_dir():  # else another process has just copied the same
                raise
    for other in place.iterdir():
        if other.name != description.fingerprint and not other.name.startswith("."):
            shutil.rmtree(other, ignore_errors=True)
    return copy


def _copy_local(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    (shutil.copytree if source.is_dir() else shutil.copyfile)(source, target)


def _cache_folder() -> Path:
    if configured := os.environ.get("CAPTIONLIB_CACHE"):
        return Path(configured)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "captionlib" / "indexes"
