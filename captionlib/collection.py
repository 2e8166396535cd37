"""Collections: folders that contain a list of image sources, and the captions and search index of their images.

    folder/
      collection.yaml       sources, captioner (caption model), ranker (image-text retrieval model) and settings
      NAME/manifest         manifest of the source NAME: a table of its images
      NAME/captions         generated captions of these images
      NAME/embeddings       embeddings of these images, if there is a ranker
      duplicates/           groups of near-duplicate images, if the configuration has a `duplicate_threshold`
      index/                search index of all sources

`captionlib init` writes the configuration, and `captionlib update` writes the rest.
"""

import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

import yaml
from pydantic import Field

from captionlib.config import build_config, configclass, parse_yaml, to_dict
from captionlib.data.ingestion.prepare import PrepareConfig
from captionlib.data.shards.markers import DESCRIPTION_FILE
from captionlib.errors import ConfigError, DatasetError
from captionlib.models.families.registry import resolve_model_address
from captionlib.search.config import IndexConfig
from captionlib.storage.folders import Folder, resolve_address

__all__ = [
    "COLLECTION_FILE",
    "Collection",
    "CollectionConfig",
    "SourceConfig",
    "create_collection",
    "expand_collections",
    "is_collection",
    "open_collection",
]

COLLECTION_FILE = "collection.yaml"

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
_RESERVED = {"index", "duplicates"}
_DATASETS = ("manifest", "captions", "embeddings")


@configclass
class SourceConfig:
    """A source of images, such as a folder, a tar file or a table of URLs.

    Attributes:
        name: name of the source and of its subfolder.
        addresses: paths, URLs or glob patterns of the source.
        prepare: how to read the source.
    """

    name: str
    addresses: tuple[str, ...]
    prepare: PrepareConfig = field(default_factory=PrepareConfig)

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name) or self.name in _RESERVED:
            raise ConfigError(
                "sources: expected a name of letters, digits, - and _, other than "
                f"{' and '.join(sorted(_RESERVED))}, got {self.name!r}"
            )
        if not self.addresses:
            raise ConfigError(f"sources: expected at least one address for {self.name}, got none")


@configclass
class CollectionConfig:
    """Sources, models and settings of a collection. Paths are absolute, because commands may run in any folder.

    Attributes:
        sources: the sources of the images. An image id may occur in only one of them.
        captioner: checkpoint of the captioner, or the address of a model from another library, such as `hf:FOLDER`.
        ranker: checkpoint or address of the ranker (dual encoder for image-text retrieval). If None, the index is
            text-only.
        weights: weights file of the image encoder, if it needs one.
        duplicate_threshold: minimum cosine similarity, in (0, 1], of near-duplicates, such as 0.94. If set, only the
            largest of several similar images is indexed; see `captionlib deduplicate`. If None, all images are indexed.
        generation: configuration of `captionlib generate-captions`, such as `decoding`.
        index: how to build the index.
    """

    sources: tuple[SourceConfig, ...]
    captioner: str
    ranker: str | None = None
    weights: str | None = None
    duplicate_threshold: Annotated[float, Field(gt=0, le=1)] | None = None
    generation: dict[str, Any] = field(default_factory=dict)
    index: IndexConfig = field(default_factory=IndexConfig)

    def __post_init__(self) -> None:
        names = [source.name for source in self.sources]
        if not names or len(set(names)) < len(names):
            got = ", ".join(names) or "none"
            raise ConfigError(f"sources: expected one or more sources with different names, got {got}")
        if self.duplicate_threshold is not None and self.ranker is None:
            raise ConfigError("duplicate_threshold: requires embeddings; set ranker, or remove duplicate_threshold")


@dataclass(frozen=True)
class Collection:
    """A folder with a configuration. Its datasets need not exist yet. Addresses of datasets are paths or URLs."""

    folder: Folder
    config: CollectionConfig

    @property
    def index(self) -> str:
        return self.folder.address("index")

    @property
    def duplicates(self) -> str:
        """Address of the duplicates among the images of all sources."""
        return self.folder.address("duplicates")

    def manifest(self, source: SourceConfig) -> str:
        return self.folder.address(f"{source.name}/manifest")

    def captions(self, source: SourceConfig) -> str:
        return self.folder.address(f"{source.name}/captions")

    def embeddings(self, source: SourceConfig) -> str:
        return self.folder.address(f"{source.name}/embeddings")

    def list_captions(self) -> list[str]:
        return [self.captions(source) for source in self.config.sources]

    def list_embeddings(self) -> list[str]:
        """Returns the addresses of the embeddings of all sources, or an empty list without a ranker."""
        return [self.embeddings(source) for source in self.config.sources] if self.config.ranker else []

    def list_datasets(self) -> list[str]:
        """Returns the addresses of the datasets of all sources, in the order in which they are written."""
        getters = [self.manifest, self.captions, *([self.embeddings] if self.config.ranker else [])]
        return [get_address(source) for source in self.config.sources for get_address in getters]

    def find_manifests(self) -> list[str]:
        """Returns the addresses of the manifests of all sources, including those of removed sources."""
        manifests = [self.manifest(source) for source in self.config.sources]
        earlier = [address for address in self.find_datasets() if address.endswith("/manifest")]
        return list(dict.fromkeys([*manifests, *earlier]))

    def find_datasets(self) -> list[str]:
        """Returns the addresses of all datasets in the folder, including those of removed sources."""
        names = [f"{name}/{kind}" for name in self.folder.list() for kind in _DATASETS if name not in _RESERVED]
        return [
            self.folder.address(name)
            for name in [*names, "duplicates"]
            if self.folder.exists(f"{name}/{DESCRIPTION_FILE}")
        ]


def create_collection(folder: str | os.PathLike[str], config: CollectionConfig) -> Collection:
    """Writes the configuration of a new collection. Relative paths become absolute."""
    created = Folder(folder)
    if names := created.list():
        raise DatasetError(f"{created.uri}: expected a new or empty folder, got files ({', '.join(names[:3])})")
    content = (
        "# The sources and models of this collection. To change them, edit this file and run `captionlib update`.\n"
        + yaml.safe_dump(_to_absolute_values(config), sort_keys=False, allow_unicode=True)
    )
    created.write(COLLECTION_FILE, content.encode())
    return open_collection(folder)


def _to_absolute_values(config: CollectionConfig) -> dict[str, Any]:
    """Returns the values of a configuration that differ from the defaults, with absolute paths."""
    values = to_dict(config)
    for source in values["sources"]:
        source["addresses"] = [resolve_address(address) for address in source["addresses"]]
        if (root := source["prepare"]["options"]["image_root"]) is not None:
            source["prepare"]["options"]["image_root"] = resolve_address(root)
        source["prepare"] = _drop_defaults(source["prepare"], to_dict(PrepareConfig()))
    for key in ("captioner", "ranker"):
        values[key] = None if values[key] is None else resolve_model_address(values[key])
    values["weights"] = None if config.weights is None else resolve_address(config.weights)
    values["index"] = _drop_defaults(values["index"], to_dict(IndexConfig()))
    return {key: value for key, value in values.items() if value}


def _drop_defaults(values: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    changed = {key: value for key, value in values.items() if value != defaults.get(key)}
    return {
        key: _drop_defaults(value, defaults[key]) if isinstance(value, dict) and defaults.get(key) else value
        for key, value in changed.items()
    }


def is_collection(folder: str | os.PathLike[str]) -> bool:
    return Folder(folder).exists(COLLECTION_FILE)


def expand_collections(
    addresses: Iterable[str], list_datasets: Callable[[Collection], list[str]] = Collection.list_captions
) -> list[str]:
    """Replaces the address of each collection with the addresses of its datasets."""
    return [
        dataset
        for address in addresses
        for dataset in (list_datasets(open_collection(address)) if is_collection(address) else [address])
    ]


def open_collection(folder: str | os.PathLike[str]) -> Collection:
    """Reads the configuration of a collection."""
    opened = Folder(folder)
    address = opened.address(COLLECTION_FILE)
    try:
        text = opened.read(COLLECTION_FILE).decode()
    except (FileNotFoundError, NotADirectoryError):
        raise DatasetError(
            f"{opened.uri} is not a collection: expected a folder with {COLLECTION_FILE}; `captionlib init` creates one"
        ) from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{address} is not YAML: {error}") from error
    values = parse_yaml(text, address)
    if not isinstance(values, dict):
        raise ConfigError(f"{address}: expected `key: value` lines, got {values!r}")
    return Collection(opened, build_config(CollectionConfig, values, address))
