"""Search: SQL over datasets, and an index of captions and embeddings."""

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from captionlib.search.index import Index
    from captionlib.search.models import QueryEncoder

__all__ = ["open"]


def open(
    index: str | os.PathLike[str],
    ranker: "str | os.PathLike[str] | QueryEncoder | None" = None,
    cache: str | os.PathLike[str] | None = None,
) -> "Index":
    """Opens an index for searching; see `captionlib.search.index.Index`.

    Args:
        index: the folder that `build-index` wrote, on any file system of fsspec; a remote index is copied to this
            machine once.
        ranker: the checkpoint that computed the embeddings, or the loaded ranker; None supports text queries only.
        cache: the folder for copies of remote indexes; None is the user's cache folder.

    Raises:
        DatasetError: the folder is not an index.
        CheckpointError: the embeddings are of another ranker.
    """
    from captionlib.search.index import open_index  # imported here: SQL alone needs neither Faiss nor Tantivy

    if isinstance(ranker, str | os.PathLike):
        from captionlib.search.models import load_query_encoder  # imports torch, which takes seconds

        ranker = load_query_encoder(ranker)
    return open_index(index, ranker, cache)
