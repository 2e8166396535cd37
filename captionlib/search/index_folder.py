"""Reads and writes the folder of a search index, which is described by the file `index.json`.

    folder/
      index.json              the description, replaced atomically
      rows/HASH.arrow         the columns that search results show, one file per shard
      details/HASH.arrow      candidate captions, reference captions and attention weights, one file per shard
      failures/HASH.arrow     the images without a caption, one file per shard with such images
      text-HASH/              the Tantivy index
      vectors-HASH.faiss      the Faiss index
      trained-HASH.faiss      an empty Faiss index with trained centroids, used to add shards

HASH is the checksum of the content. Files are never modified, so versions of the index can share them. A build keeps
the files of the previous version for readers that are still opening it. The next build removes these files.
"""

import hashlib
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

from captionlib.config import build_config, to_dict
from captionlib.data.shards.markers import compute_checksum, from_json, to_json
from captionlib.errors import ConfigError, DatasetError
from captionlib.search.config import IndexConfig, VectorLayout
from captionlib.search.filters import FacetGroup
from captionlib.storage.folders import TEMPORARY_FOLDER, Folder, convert_full_disk_errors
from captionlib.storage.retries import convert_os_errors

__all__ = [
    "INDEX_FILE",
    "IndexDescription",
    "IndexedDataset",
    "IndexedDuplicates",
    "IndexedShard",
    "InputShard",
    "check_hash",
    "compute_hash",
    "damage_error",
    "fetch_locally",
    "fetch_path",
    "hash_json",
    "is_index_file",
    "publish_path",
    "read_description",
    "temporary_folder",
    "user_cache_folder",
    "write_description",
]

INDEX_FILE = "index.json"
FORMAT_VERSION = 4
SUBFOLDERS = ("rows", "details", "failures")

_HASH_CHARACTERS = 32
_PREFIXES = ("text-", "vectors-", "trained-")
_THREADS = 8


@dataclass(frozen=True)
class IndexedDataset:
    """A dataset that an index was built from."""

    folder: str
    fingerprint: str  # hash of everything that determines the rows of the dataset
    shards: int  # number of shards (Parquet files) of the complete dataset
    config: Mapping[str, Any] = field(default_factory=dict)  # of the dataset, such as the encoder and the captioner


@dataclass(frozen=True)
class IndexedDuplicates:
    """A dataset of duplicates, which are left out of the index or marked; see `IndexConfig`."""

    folder: str
    checksum: str


@dataclass(frozen=True)
class InputShard:
    """A finished shard of the captions, and the checksums of all its inputs, which are empty if they do not exist."""

    dataset: int  # position of the dataset among the datasets of the index
    shard: int  # number of the shard in the dataset
    rows: int  # number of captioned images, excluding duplicates that are left out
    captions: str
    embeddings: str
    duplicates: str = field(default="", kw_only=True)  # of the duplicates that are left out or marked
    failures: str = field(default="", kw_only=True)
    manifest: str = field(default="", kw_only=True)  # of the table of images, which contains the reference captions

    @property
    def content(self) -> tuple[str, ...]:
        """Values that identify the content. Shards with the same content share files, even if their datasets differ."""
        return self.captions, self.embeddings, self.duplicates, self.failures, self.manifest


@dataclass(frozen=True)
class IndexedShard(InputShard):
    """A shard in an index, and the names of its files. `failures_file` is empty if all images have a caption."""

    rows_file: str
    details_file: str
    failures_file: str


@dataclass(frozen=True)
class IndexDescription:
    """The content of `index.json`. A text-only index has no `embeddings`, `layout`, `vectors` and `trained`."""

    fingerprint: str  # hash of everything that determines the search results
    created: str  # time of the build, in UTC; it identifies the version
    config: IndexConfig
    captions: tuple[IndexedDataset, ...]
    embeddings: tuple[IndexedDataset, ...]  # in the order of the captions
    layout: VectorLayout | None
    shards: tuple[IndexedShard, ...]  # in the order of their rows
    groups: tuple[FacetGroup, ...]  # the text index contains the number of the group of each row
    captions_count: int  # number of searchable captions
    vectors_count: int  # number of searchable vectors
    text: str  # folder of the text index
    vectors: str  # file of the vector index
    trained: str  # file of a vector index with trained centroids and no vectors
    previous: tuple[str, ...] = ()  # files that only the previous version uses
    duplicates: IndexedDuplicates | None = None  # that are left out or marked

    @property
    def files(self) -> list[str]:
        """The files and folders of this version."""
        vectors = [self.vectors, self.trained] if self.vectors else []
        names = [name for each in self.shards for name in (each.rows_file, each.details_file, each.failures_file)]
        return [self.text, *vectors, *dict.fromkeys(filter(None, names))]

    @property
    def first_rows(self) -> list[int]:
        """The row number of the first row of each shard."""
        return list(accumulate((shard.rows for shard in self.shards[:-1]), initial=0))

    @property
    def ranker(self) -> str:
        """Hash of the ranker (image-text retrieval model) that computed the embeddings; empty if there is none."""
        return str(self.embeddings[0].config.get("ranker", "")) if self.embeddings else ""


def read_description(folder: Folder) -> IndexDescription | None:
    """Reads the description of an index; returns None if the folder has none."""
    address = folder.address(INDEX_FILE)
    try:
        content: dict[str, Any] = from_json(folder.read(INDEX_FILE))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError as error:
        raise DatasetError(f"{address} is damaged ({error}); build the index again with --overwrite") from error
    kind_and_version = (content.get("kind"), content.get("format_version")) if isinstance(content, dict) else None
    if kind_and_version != ("index", FORMAT_VERSION):
        raise DatasetError(
            f"{folder.uri}: expected an index of format version {FORMAT_VERSION}; "
            "build the index again with --overwrite"
        )
    if content.pop("checksum", None) != hash_json(content):
        raise damage_error(address)
    del content["kind"], content["format_version"]
    try:
        return build_config(IndexDescription, content, origin=address)
    except ConfigError as error:
        raise DatasetError(f"{error}; build the index again with --overwrite") from error


def write_description(folder: Folder, description: IndexDescription) -> None:
    """Replaces the description. Readers that open the index afterwards use the new version."""
    content = {"kind": "index", "format_version": FORMAT_VERSION, **to_dict(description)}
    content = json.loads(to_json(content))
    folder.write(INDEX_FILE, to_json({**content, "checksum": hash_json(content)}))


def hash_json(content: Mapping[str, Any]) -> str:
    """Returns the checksum of JSON values."""
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def is_index_file(name: str) -> bool:
    """Returns whether a build may have written a file or folder with this name."""
    return name in (TEMPORARY_FOLDER, INDEX_FILE, *SUBFOLDERS) or name.startswith(_PREFIXES)


@contextmanager
def temporary_folder(folder: Folder) -> Iterator[Path]:
    """Creates a temporary folder. For a local index, it is inside the index, so files can be renamed into place."""
    parent = None
    if folder.is_local:
        parent = Path(folder.path(TEMPORARY_FOLDER))
        with convert_os_errors(str(parent)):
            parent.mkdir(parents=True, exist_ok=True)
    with convert_full_disk_errors(folder.uri), tempfile.TemporaryDirectory(prefix="captionlib-", dir=parent) as path:
        yield Path(path)


def compute_hash(path: Path) -> str:
    """Returns the checksum of a file or folder, as it appears in file names. Tantivy's lock files are ignored."""
    if not path.is_dir():
        with path.open("rb") as file:
            return compute_checksum(file).removeprefix("sha256:")[:_HASH_CHARACTERS]
    digest = hashlib.sha256()
    for child in sorted(child for child in path.iterdir() if child.suffix != ".lock"):
        digest.update(f"{child.name}\n{compute_hash(child)}\n".encode())
    return digest.hexdigest()[:_HASH_CHARACTERS]


def check_hash(path: Path, name: str, address: str) -> Path:
    """Checks that the content of `path` has the checksum in `name`, its name in the index. Returns `path`."""
    if compute_hash(path) != Path(name).stem.rpartition("-")[-1]:
        raise damage_error(address)
    return path


def publish_path(folder: Folder, path: Path, prefix: str, extension: str = "") -> str:
    """Moves a file or folder from `temporary_folder` into the index. Returns its name, which contains its checksum."""
    name = f"{prefix}{compute_hash(path)}{extension}"
    if not folder.is_local:
        files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
        for file in files:
            published_name = name if path.is_file() else f"{name}/{file.relative_to(path).as_posix()}"
            with folder.stage(published_name) as staged:
                shutil.copyfile(file, staged)
        return name
    published = Path(folder.path(name))
    published.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        folder.remove(name)  # `rename` cannot replace a folder that contains files
    for file in [path] if path.is_file() else path.iterdir():
        with file.open("rb") as written:
            os.fsync(written.fileno())
    path.rename(published)
    return name


def fetch_path(folder: Folder, name: str, copy: Path) -> Path:
    """Returns a local path of a file or folder in the index. A file in a remote index is first downloaded to `copy`."""
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

    All files are compared with their checksums, except the details of a local index, which `DetailStore` checks. The
    cache contains one version of each index. Its default is `$CAPTIONLIB_CACHE`, or else `captionlib/indexes` in the
    user's cache folder.

    Raises:
        DatasetError: a file is damaged.
        FileNotFoundError: a file does not exist, for example because a build has removed it.
    """
    with ThreadPoolExecutor(_THREADS) as pool:
        if folder.is_local and os.access(folder.path(description.text), os.W_OK):
            names = [name for name in description.files if not name.startswith("details/")]
            list(pool.map(lambda name: check_hash(Path(folder.path(name)), name, folder.address(name)), names))
            return Path(folder.path("")).absolute()
        # The index is remote, or its folder is read-only. Tantivy must write a lock file even to read an index.
        cache = cache or Path(os.environ.get("CAPTIONLIB_CACHE") or user_cache_folder() / "indexes")
        copy = cache / uuid.uuid5(uuid.NAMESPACE_URL, folder.uri).hex
        list(pool.map(partial(_fetch_to_cache, folder, copy), description.files))
    used = {copy / name for name in (*description.files, *SUBFOLDERS)}
    for path in [*copy.iterdir(), *(path for name in SUBFOLDERS for path in (copy / name).glob("*"))]:
        if path not in used and not path.name.startswith("."):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    return copy


def _fetch_to_cache(folder: Folder, index_copy: Path, name: str) -> None:
    cached = index_copy / name
    with suppress(FileNotFoundError, DatasetError):
        check_hash(cached, name, str(cached))
        return
    cached.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".copying-", dir=index_copy) as temporary:
        copy = Path(temporary) / cached.name
        path = fetch_path(folder, name, copy)
        if path != copy:  # the folder of a local index is read-only
            (shutil.copytree if path.is_dir() else shutil.copyfile)(path, copy)
        check_hash(copy, name, folder.address(name))
        if cached.is_dir():
            shutil.rmtree(cached, ignore_errors=True)
        try:
            copy.rename(cached)
        except OSError:
            if not cached.is_dir():  # if it is a folder, another process has made the same copy
                raise


def user_cache_folder() -> Path:
    """Returns captionlib's folder in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "captionlib"


def damage_error(address: str) -> DatasetError:
    return DatasetError(
        f"{address} is damaged: its content does not match its checksum; build the index again with --overwrite"
    )
