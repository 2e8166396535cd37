"""Opens the datasets that a command changes, and locks them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from captionlib.errors import DatasetError

if TYPE_CHECKING:
    from captionlib.collection import Collection
    from captionlib.data.shards.dataset import ShardedDataset

__all__ = ["open_datasets"]


@contextmanager
def open_datasets(
    folders: Sequence[str], command: str, find_datasets: Callable[[Collection], list[str]], *, lock: bool = True
) -> Iterator[tuple[list[ShardedDataset], list[str]]]:
    """Opens datasets, and locks them and their collections until the block ends.

    `folders` contains collections, datasets and indexes. `find_datasets` returns the addresses of the existing datasets
    of a collection. Yields the datasets, and the addresses of the indexes.
    """
    from captionlib.collection import is_collection, open_collection
    from captionlib.data.shards.dataset import open_dataset
    from captionlib.search.index_folder import INDEX_FILE
    from captionlib.storage.folders import Folder
    from captionlib.storage.lock import lock_folder

    addresses: list[str] = []
    indexes: list[str] = []
    with ExitStack() as stack:
        for folder in folders:
            if is_collection(folder):
                collection = open_collection(folder)
                if lock:
                    stack.enter_context(lock_folder(collection.folder, f"captionlib {command}"))
                found = find_datasets(collection)
                if not found:
                    raise DatasetError(f"{folder}: expected datasets, got none; run `captionlib update {folder}` first")
                addresses += found
                indexes += [collection.index] if Folder(collection.index).list() else []
            elif Folder(folder).exists(INDEX_FILE):
                indexes.append(folder)
            else:
                addresses.append(folder)
        if lock:
            for address in addresses:
                stack.enter_context(lock_folder(open_dataset(address).folder, f"captionlib {command}"))
        yield [open_dataset(address) for address in addresses], indexes
