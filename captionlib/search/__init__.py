"""Questions to the Parquet and to the index."""

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from captionlib.search.encoders import SentenceEncoder
    from captionlib.search.index import Index

__all__ = ["open"]


def open(
    index: str | os.PathLike[str],
    ranker: "str | os.PathLike[str] | SentenceEncoder | None" = None,
    cache: str | os.PathLike[str] | None = None,
) -> "Index":
    """Opens an index to be asked; see `captionlib.search.index.Index`.

    Args:
        index: the folder that `build_index` wrote, on any file system of fsspec; a remote one is copied here once.
        ranker: the checkpoint that made its embeddings, or what was loaded of it; None asks for words alone.
        cache: where copies of remote indexes are kept; None is the user's cache folder.

    Raises:
        DatasetError: there is no index.
        CheckpointError: the ranker is not the one that made the embeddings.
    """
    # SQL alone needs none of this.
    from captionlib.search.encoders import load_encoder
    from captionlib.search.index import open_index

    encoder = load_encoder(ranker) if isinstance(ranker, str | os.PathLike) else ranker
    return open_index(index, encoder, cache)
