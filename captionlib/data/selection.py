"""Selects images by split and id, and excludes duplicates."""

import hashlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from captionlib.data.shards.dataset import ShardedDataset, open_dataset
from captionlib.data.splits import add_split_aliases

__all__ = ["ALL_IMAGES", "ImageSelection", "hash_ids", "read_kept_images", "select_images"]


@dataclass(frozen=True)
class ImageSelection:
    """Selects images by split and id. The default selects all images."""

    splits: frozenset[str] = frozenset()  # if empty, all splits
    excluded: frozenset[str] = frozenset()  # image ids
    included: frozenset[str] | None = None  # image ids; if None, all

    def selects(self, image_id: str, split: str) -> bool:
        return (
            (not self.splits or split in self.splits)
            and image_id not in self.excluded
            and (self.included is None or image_id in self.included)
        )

    def describe(self) -> dict[str, list[str] | str | None]:
        """Returns JSON values that identify the selection."""
        included = None if self.included is None else hash_ids(self.included)
        return {"splits": sorted(self.splits), "excluded": hash_ids(self.excluded), "included": included}


ALL_IMAGES = ImageSelection()


def select_images(
    splits: Sequence[str] = (),
    duplicates: str | os.PathLike[str] | None = None,
    included: frozenset[str] | None = None,
) -> ImageSelection:
    """Returns a selection of images.

    Args:
        splits: names of splits; `val` and `dev` are synonyms. If empty, images of all splits are selected.
        duplicates: dataset of duplicates. If set, only one image of each group of duplicates is selected.
        included: if not None, only images with these ids are selected.

    Raises:
        DatasetError: `duplicates` is not a complete dataset of duplicates.
    """
    excluded = frozenset[str]()
    if duplicates is not None:
        excluded = frozenset(read_kept_images(open_dataset(duplicates, "duplicates").require_complete()))
    return ImageSelection(add_split_aliases(splits), excluded, included)


def read_kept_images(duplicates: ShardedDataset) -> dict[str, str]:
    """Maps the ids of duplicates, the images to exclude, to the id of the image that is kept from their group.

    If the kept image of a group has been removed from the dataset, no image of the group is excluded.
    """
    rows = pa.concat_tables(
        [duplicates.read(shard, ["image_id", "group", "kept"]) for shard in range(duplicates.shards)]
    )
    # `group` is the id of the image that is kept from the group.
    kept = rows.filter(rows["kept"])["image_id"].combine_chunks()
    excluded = rows.filter(pc.and_(pc.invert(rows["kept"]), pc.is_in(rows["group"], value_set=kept)))
    return dict(zip(excluded["image_id"].to_pylist(), excluded["group"].to_pylist(), strict=True))


def hash_ids(image_ids: Iterable[str]) -> str:
    """Returns a hash of a set of image ids."""
    digest = hashlib.sha256()
    for image_id in sorted(image_ids):
        digest.update(f"{len(image_id)} {image_id}".encode(errors="surrogatepass"))
    return digest.hexdigest()
