"""Reads and writes the folder of a search index, which is described by the file `index.json`.

    folder/
      index.json              the description, replaced atomically
      rows/part-00000-HASH.arrow ...  the columns that search results show
      text-HASH/              the Tantivy index
      vectors-HASH.faiss      the Faiss index
      trained-HASH.faiss      an empty Faiss index with trained centroids, used to add shards

A build keeps the files of the previous version for readers that have it open. The next build removes them.
"""

import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from captionlib.config import build_config, to_dict
from captionlib.data.shards.markers import to_json
from captionlib.errors import ConfigError, DatasetError
from captionlib.search.config import IndexConfig, VectorLayout
from captionlib.storage.folders import TEMPORARY_FOLDER, Folder

__all__ = [
    "DESCRIPTION",
    "IndexDescription",
    "IndexedDataset",
    "IndexedShard",
    "fetch_locally",
    "fetch_path",
    "publish_path",
    "read_description",
    "temporary_folder",
    "user_cache_folder",
    "write_description",
]

DESCRIPTION = "index.json"
FORMAT_VERSION = 2


@dataclass(frozen=True)
class IndexedDataset:
    """A dataset that an index was built from.

    Attributes:
        fingerprint: hash of everything that determines the rows of the dataset.
        shards: number of shards of the complete dataset.
        ranker: fingerprint of the ranker, the image-text dual encoder that computed the embeddings; empty for captions.
    """

    folder: str
    fingerprint: str
    shards: int
    ranker: str = ""


@dataclass(frozen=True)
class IndexedShard:
    """A shard of the captions and embeddings in an index.

    Attributes:
        shard: number of the shard in the datasets.
        offset: row number in the index of the first row of the shard.
        captions: checksum of the captions.
        embeddings: checksum of the embeddings; empty if the index is text-only.
        file: name of the file that contains the rows.
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
    """The content of `index.json`.

    Attributes:
        fingerprint: hash of everything that determines the search results.
        created: time of the build, in UTC.
        embeddings: the embeddings dataset; None if the index is text-only.
        layout: type of the vector index; None if the index is text-only.
        shards: the indexed shards, ordered by row number.
        end_row: one more than the largest row number ever used; row numbers of removed shards are not reused.
        captions_count: number of searchable captions.
        vectors_count: number of searchable vectors.
        text: folder of the text index.
        vectors: file of the vector index; empty if the index is text-only.
        trained: file of the trained vector index without vectors; empty if the index is text-only.
        previous: files that only the previous version uses.
    """

    fingerprint: str
    created: str
    config: IndexConfig
    captions: IndexedDataset
    embeddings: IndexedDataset | None
    layout: VectorLayout | None
    shards: tuple[IndexedShard, ...]
    end_row: int
    captions_count: int
    vectors_count: int
    text: str
    vectors: str
    trained: str
    previous: tuple[str, ...] = ()

    @property
    def files(self) -> list[str]:
        """The files and folders of this version."""
        vectors = [self.vectors, self.trained] if self.vectors else []
        return [self.text, *vectors, *(shard.file for shard in self.shards)]

    @property
    def is_complete(self) -> bool:
        """Whether the index contains every shard of the captions."""
        return len(self.shards) == self.captions.shards


def read_description(folder: Folder) -> IndexDescription | None:
    """Reads the description of an index; returns None if the folder has none.

    Raises:
        DatasetError: the description is invalid or has a different format version.
    """
    try:
        content: dict[str, Any] = json.loads(folder.read(DESCRIPTION))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError as error:
        raise DatasetError(f"{folder.address(DESCRIPTION)} is invalid ({error}); build the index again") from error
    version = (content.pop("kind", None), content.pop("format_version", None)) if isinstance(content, dict) else None
    if version != ("index", FORMAT_VERSION):
        raise DatasetError(f"{folder.uri}: expected an index of format version {FORMAT_VERSION}; build the index again")
    try:
        return build_config(IndexDescription, content, origin=folder.address(DESCRIPTION))
    except ConfigError as error:
        raise DatasetError(f"{error}; build the index again") from error


def write_description(folder: Folder, description: IndexDescription) -> None:
    """Replaces the description. Readers that open the index afterwards use the new version."""
    content = {"kind": "index", "format_version": FORMAT_VERSION, **to_dict(description)}
    folder.write(DESCRIPTION, to_json(content))


@contextmanager
def temporary_folder(folder: Folder) -> Iterator[Path]:
    """Creates a temporary folder. For a local index, it is inside the index, so files can be renamed into place."""
    parent = None
    if folder.is_local:
        parent = Path(folder.path(TEMPORARY_FOLDER))
        parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="captionlib-", dir=parent) as path:
        yield Path(path)


def publish_path(folder: Folder, path: Path, name: str) -> None:
    """Moves a file or folder from `temporary_folder` into the index, replacing leftovers of an interrupted build."""
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


def fetch_path(folder: Folder, name: str, copy: Path) -> Path:
    """Returns a local path of a file or folder in the index, which is first copied to `copy` if the index is remote."""
    if folder.is_local:
        return Path(folder.path(name))
    copy.parent.mkdir(parents=True, exist_ok=True)
    if files := folder.list(name):
        copy.mkdir()
        for file in files:
            folder.download(f"{name}/{file}", copy / file)
    else:
        folder.download(name, copy)
    return copy


def fetch_locally(folder: Folder, description: IndexDescription, cache: Path | None = None) -> Path:
    """Returns a local folder with all files of an index: the index itself, or a copy in the cache.

    The cache is keyed by URI and fingerprint, and contains one version of each index. If `cache` is None, the cache is
    `$CAPTIONLIB_CACHE` or, if the variable is not set, `captionlib/indexes` in the user's cache folder.
    """
    if folder.is_local and os.access(folder.path(description.text), os.W_OK):  # Tantivy writes a lock file even to read
        return Path(folder.path("")).absolute()
    cache = cache or Path(os.environ.get("CAPTIONLIB_CACHE") or user_cache_folder() / "indexes")
    versions = cache / uuid.uuid5(uuid.NAMESPACE_URL, folder.uri).hex
    copy = versions / description.fingerprint
    if copy.is_dir():
        return copy
    versions.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".copying-", dir=versions) as temporary:
        partial = Path(temporary) / "index"
        for name in description.files:
            path = fetch_path(folder, name, partial / name)
            if path != partial / name:  # the index is local, but read-only
                (partial / name).parent.mkdir(parents=True, exist_ok=True)
                (shutil.copytree if path.is_dir() else shutil.copyfile)(path, partial / name)
        try:
            partial.rename(copy)
        except OSError:
            if not copy.is_dir():  # if it exists, a different process has made the same copy
                raise
    for other in versions.iterdir():
        if other.name != description.fingerprint and not other.name.startswith("."):
            shutil.rmtree(other, ignore_errors=True)
    return copy


def user_cache_folder() -> Path:
    """Returns captionlib's folder in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "captionlib"
