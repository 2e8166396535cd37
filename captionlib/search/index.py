"""Searches an index of images by caption text, by embedding vector, or by both.

The embeddings come from a ranker, which is a dual encoder for image-text retrieval.
"""

import bisect
import copy
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

import numpy as np
import pyarrow as pa
from cachetools import LRUCache

from captionlib.data.sources.values import is_unicode
from captionlib.errors import CaptionlibError, CheckpointError, DatasetError, QueryError
from captionlib.search.filters import FacetCounts, Facets, Filter, name_sources
from captionlib.search.index_folder import (
    INDEX_FILE,
    IndexDescription,
    IndexedDataset,
    fetch_locally,
    read_description,
)
from captionlib.search.rows import RESULT_COLUMNS, DetailStore, FailureStore, RowStore
from captionlib.search.text_index import Sort, TextIndex
from captionlib.search.vector_index import Hits, RowNumbers, VectorIndex, Vectors
from captionlib.storage.folders import Folder

if TYPE_CHECKING:
    from captionlib.models.families.ranker import RankingModel

__all__ = ["Filter", "Index", "fuse_rankings", "open_index"]

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")

_CACHED_FILTERS = 16
# Fusion combines the first 200 rows of each ranking; for later pages, the first 400, 600, ... rows. Pages that need the
# same number of rows show parts of the same fused ranking.
_FUSION_DEPTH = 200
_RANK_CONSTANT = 60  # see `fuse_rankings`
_LOGGER = logging.getLogger("captionlib")


class _Version:
    """The open files of one version of an index. They stay readable if the files are removed. Thread-safe."""

    def __init__(self, description: IndexDescription, path: Path) -> None:
        self.description = description
        self.rows = RowStore(path / shard.rows_file for shard in description.shards)
        self.details = DetailStore([path / shard.details_file for shard in description.shards], description.first_rows)
        self.facets = Facets(description.groups, name_sources([dataset.folder for dataset in description.captions]))
        self.failures = FailureStore(
            (path / shard.failures_file, self.facets.sources[shard.dataset])
            for shard in description.shards
            if shard.failures_file
        )
        self.text = TextIndex(path / description.text, description.config.language)
        self.vectors: VectorIndex | None = None
        if description.layout is not None:
            self.vectors = VectorIndex(path / description.vectors, description.layout, description.captions_count)
        self._lock = threading.Lock()
        self._matching: LRUCache[Filter, RowNumbers] = LRUCache(_CACHED_FILTERS)

    def find_matching(self, where: Filter) -> RowNumbers:
        """Returns the numbers of the rows that match a filter. The last results are cached."""
        with self._lock:
            rows = self._matching.get(where)
        if rows is None:
            condition, parameters = where.to_sql()
            if where.source is not None:
                condition += " AND row >= ? AND row < ?"
                parameters += self._find_rows(where.source)
            rows = self.rows.find_matching(condition, parameters)
            with self._lock:
                self._matching[where] = rows
        return rows

    def _find_rows(self, source: str) -> tuple[int, int]:
        """Returns the range of the row numbers of a source; the end is exclusive."""
        shards = zip(self.description.shards, self.description.first_rows, strict=False)
        found = [(first, first + shard.rows) for shard, first in shards if self.facets.sources[shard.dataset] == source]
        return (found[0][0], found[-1][1]) if found else (0, 0)  # the shards of a dataset are adjacent


def _on_one_version(
    search: "Callable[Concatenate[Index, Parameters], Result]",
) -> "Callable[Concatenate[Index, Parameters], Result]":
    """Makes a method run on one version of the index, even if a newer one is opened in the meantime."""

    @wraps(search)
    def run(index: "Index", /, *args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        return search(index.snapshot(), *args, **kwargs)

    return run


class Index:
    """An open index, returned by `open_index`. This class is thread-safe.

    Every search returns an Arrow table, best row first, with the columns image_id, uri, split, caption, log_prob,
    tokens (number of tokens), image_text_score (null if captions have no scores), width, height and score. The score is
    BM25 for text, the inner product for vectors, and the reciprocal rank fusion score for hybrid searches.

    Every search takes `limit`, the maximum number of rows, `offset`, the number of rows to skip, and `where`, a
    `Filter` or SQL condition that selects the images to search. Methods with an `image_id` raise QueryError if the
    image is not in the index.

    A build publishes a new version of the index, and an open index switches to it between searches. Use `snapshot` for
    several searches of the same version.
    """

    def __init__(
        self,
        folder: Folder,
        ranker: "RankingModel | None" = None,
        cache: Path | None = None,
        refresh_seconds: float | None = 1.0,
    ) -> None:
        self._folder = folder
        self._ranker = ranker
        self._cache = cache
        self._refresh_seconds = refresh_seconds
        self._refresh_lock = threading.RLock()  # `try_refresh` calls `refresh`
        self._logged_error = ""
        self._checked_at = time.monotonic()
        self._index_file_version = self._read_index_file_version()
        self._version = self._open(self._read_description())

    def __len__(self) -> int:
        return self.description.captions_count

    @property
    def description(self) -> IndexDescription:
        """The datasets, configuration and files of the index."""
        return self._version.description

    @property
    def has_vectors(self) -> bool:
        """Whether the index contains embeddings, and not only text."""
        return self._version.vectors is not None

    @property
    def supports_sentences(self) -> bool:
        """Whether the index has vectors, and the ranker that computed them is loaded."""
        return self.has_vectors and self._ranker is not None

    def snapshot(self) -> "Index":
        """Returns an index that never changes to a newer version, for several searches of the same version."""
        if self._refresh_seconds is not None and time.monotonic() >= self._checked_at + self._refresh_seconds:
            self.try_refresh()
        snapshot = copy.copy(self)
        snapshot._refresh_seconds = None
        return snapshot

    def refresh(self) -> bool:
        """Opens the newest version of the index. Returns whether the version has changed.

        Running searches continue on the previous version.

        Raises:
            DatasetError: the index no longer exists, or is damaged; the previous version stays open.
            CheckpointError: a different ranker computed the embeddings; the previous version stays open.
        """
        with self._refresh_lock:
            index_file_version = self._read_index_file_version()
            if index_file_version == self._index_file_version:
                return False
            description = self._read_description()
            has_changed = description.created != self.description.created
            if has_changed:
                self._version = self._open(description)
            self._index_file_version = index_file_version
            return has_changed

    def try_refresh(self) -> None:
        """Calls `refresh` and logs errors. Does nothing if another thread is refreshing the index."""
        if not self._refresh_lock.acquire(blocking=False):
            return
        try:
            self.refresh()
            self._logged_error = ""
        except (CaptionlibError, OSError) as error:
            if str(error) != self._logged_error:
                _LOGGER.warning("%s; searches continue on the version created at %s", error, self.description.created)
            self._logged_error = str(error)
        finally:
            self._checked_at = time.monotonic()
            self._refresh_lock.release()

    def _read_index_file_version(self) -> str:
        """Returns a string that changes with every new version; empty if the index no longer exists."""
        try:
            return self._folder.fetch_version(INDEX_FILE)
        except (FileNotFoundError, NotADirectoryError):
            return ""

    def _open(self, description: IndexDescription) -> _Version:
        """Opens a version, or a newer one if builds have removed files of the version in the meantime."""
        while True:
            try:
                return _Version(description, fetch_locally(self._folder, description, self._cache))
            except (FileNotFoundError, DatasetError) as error:
                newest = self._read_description()
                if newest.created != description.created:
                    description = newest
                elif isinstance(error, FileNotFoundError):
                    raise DatasetError(
                        f"{self._folder.uri}: {error.filename or error} is missing; build the index again with "
                        "--overwrite"
                    ) from error
                else:
                    raise

    def _read_description(self) -> IndexDescription:
        description = read_description(self._folder)
        if description is None:
            raise DatasetError(
                f"{self._folder.uri} is not an index: expected a folder with {INDEX_FILE}; see `captionlib build-index`"
            )
        if self._ranker is not None and description.ranker not in ("", self._ranker.fingerprint):
            raise CheckpointError(
                f"{self._folder.uri}: expected the ranker {description.ranker}, which computed the embeddings, got "
                f"{self._ranker.fingerprint}; use that ranker, or embed the images again and rebuild the index"
            )
        return description

    @_on_one_version
    def search_text(
        self,
        query: str,
        limit: int = 20,
        offset: int = 0,
        where: Filter | str | None = None,
        sort: Sort = "relevance",
    ) -> pa.Table:
        """Finds captions by the words that they contain.

        `query` contains words and "phrases"; `+` before a word or phrase requires it, `-` excludes it.

        `sort` is `relevance` (BM25 score), `log_prob` (log-probability) or `image_text_score` (similarity of caption
        and image). Captions that lack the score to sort by are omitted.

        Raises:
            QueryError: the query contains no words other than stop words, or the condition is invalid.
        """
        return self._to_table(self._find_text(query, offset + limit, _to_filter(where), sort)[offset:])

    @_on_one_version
    def search_text_and_count(
        self,
        query: str,
        limit: int = 20,
        offset: int = 0,
        where: Filter | None = None,
        sort: Sort = "relevance",
    ) -> tuple[pa.Table, FacetCounts]:
        """Works like `search_text`, and also counts the matches by facet; see `count_facets`.

        Raises:
            QueryError: see `search_text` and `count_facets`; also raised if `where` contains SQL.
        """
        where = where or Filter()
        if where.where is not None:
            raise QueryError("search_text_and_count: expected a filter without SQL; use search_text and count its rows")
        version = self._version
        matches = version.text.count_groups(query, len(version.facets), where.min_log_prob)
        counts = version.facets.count(where, matches)
        hits = self._find_text(query, offset + limit if counts.total else 0, where, sort)
        return self._to_table(hits[offset:]), counts

    @_on_one_version
    def search_sentence(
        self, sentence: str, limit: int = 20, offset: int = 0, where: Filter | str | None = None
    ) -> pa.Table:
        """Finds images whose embeddings are most similar to the embedding of a sentence (semantic search).

        Raises:
            QueryError: the index has no vectors or no ranker, or no word is in the ranker's vocabulary.
        """
        return self.search_vector(self._encode(sentence), limit, offset, where)

    @_on_one_version
    def search_vector(
        self, vector: Vectors, limit: int = 20, offset: int = 0, where: Filter | str | None = None
    ) -> pa.Table:
        """Finds the images nearest to a vector in the ranker's joint embedding space, `[dimension]`.

        Raises:
            QueryError: the index has no vectors, or they have a different dimension.
        """
        return self._to_table(self._find_vector(vector, offset + limit, _to_filter(where))[offset:])

    @_on_one_version
    def search_similar(
        self, image_id: str, limit: int = 20, offset: int = 0, where: Filter | str | None = None
    ) -> pa.Table:
        """Finds the images most similar to an image in the index, excluding the image itself.

        Raises:
            QueryError: the image is not in the index, or has no vector.
        """
        row = self._find_row(image_id)
        vector = self._require_vectors().get_vector(row)
        if vector is None:
            raise QueryError(f"image {image_id} has no vector: computing its embedding failed")
        hits = self._find_vector(vector, offset + limit + 1, _to_filter(where))
        return self._to_table(hits[hits.rows != row][offset : offset + limit])

    @_on_one_version
    def search_hybrid(
        self,
        query: str,
        limit: int = 20,
        offset: int = 0,
        where: Filter | str | None = None,
        vector: Vectors | None = None,
    ) -> pa.Table:
        """Finds images by caption text and by vector, and combines the two rankings by reciprocal rank fusion.

        The vector is `vector`, `[dimension]`, or by default the embedding of the query. Required and excluded words
        apply to both rankings. Words outside the ranker's vocabulary match only captions.

        Raises:
            QueryError: the query contains no words other than stop words, or `vector` is None and the index does not
                support sentences.
        """
        depth = -(-max(1, offset + limit) // _FUSION_DEPTH) * _FUSION_DEPTH
        where = _to_filter(where)
        rankings = [self._find_text(query, depth, where, "relevance")]
        sentence = self._version.text.to_sentence(query)
        # Without a ranker, `_encode` raises a QueryError.
        if vector is None and sentence and (self._ranker is None or self._ranker.has_known_word(sentence)):
            vector = self._encode(sentence)
        if vector is not None:
            rankings.append(self._find_vector_with_words(query, vector, depth, where))
        return self._to_table(fuse_rankings(rankings)[offset : offset + limit])

    @_on_one_version
    def get_image(self, image_id: str) -> dict[str, Any]:
        """Returns the row of one image."""
        row: dict[str, Any] = self._version.rows.take(np.array([self._find_row(image_id)])).to_pylist()[0]
        return row

    @_on_one_version
    def get_details(self, image_id: str) -> dict[str, Any]:
        """Returns the candidate captions of an image, best first, its references and its attention weights.

        The references are None if the index has none. The attention weights, `[tokens, positions]`, are None if the
        captions were generated without them.
        """
        return self._version.details.read(self._find_row(image_id))

    @property
    def sources(self) -> Sequence[str]:
        """The names of the captions datasets, which are the shortest distinct parts of their paths."""
        return self._version.facets.sources

    @property
    def failures(self) -> FailureStore:
        """The images without a caption, with the reasons."""
        return self._version.failures

    @_on_one_version
    def sample(self, limit: int = 20, where: Filter | str | None = None) -> pa.Table:
        """Returns evenly spaced rows of the index, with a score of 0."""
        where = _to_filter(where)
        if where == Filter():
            rows = self._version.rows.sample(limit)
        else:
            matching = self._version.find_matching(where)
            rows = matching[np.linspace(0, len(matching), min(limit, len(matching)), endpoint=False).astype(int)]
        return self._to_table(Hits(rows, np.zeros(len(rows), np.float32)))

    @_on_one_version
    def suggest_query(self, query: str) -> str | None:
        """Replaces the words of a query that no caption contains with similar words. Returns None if there are none."""

        def find_captions(rows: RowNumbers) -> list[str]:
            captions: list[str] = self._version.rows.take(rows)["caption"].to_pylist()
            return captions

        return self._version.text.suggest_query(query, find_captions)

    @_on_one_version
    def count_facets(self, where: Filter | None = None) -> FacetCounts:
        """Counts images by facet. The SQL condition and the minimum log-probability of `where` are ignored.

        Raises:
            QueryError: `where` selects a month, and the index can only count the images of whole years.
        """
        return self._version.facets.count(where or Filter())

    def list_uris(self) -> Iterator[str]:
        """Yields the URIs of all images."""
        return self._version.rows.list_uris()

    @_on_one_version
    def find_words(self, query: str, captions: Sequence[str]) -> list[list[tuple[int, int]]]:
        """Returns, for each caption, the start and end (exclusive) of every word that a query matches."""
        return self._version.text.find_words(query, captions)

    @_on_one_version
    def find_dataset(self, image_id: str) -> IndexedDataset:
        """Returns the captions dataset that contains an image."""
        return self.description.captions[self._find_dataset(image_id)]

    @_on_one_version
    def find_source(self, image_id: str) -> str:
        """Returns the name of the source of an image; see `sources`."""
        return self.sources[self._find_dataset(image_id)]

    def _find_dataset(self, image_id: str) -> int:
        shard = bisect.bisect_right(self.description.first_rows, self._find_row(image_id)) - 1
        return self.description.shards[shard].dataset

    def _find_text(self, query: str, limit: int, where: Filter, sort: Sort) -> Hits:
        text, facets = self._version.text, self._version.facets
        if where.where is None and facets.supports_date(where):  # faster than SQL
            return text.search(query, limit, None, facets.select(where), where.min_log_prob, sort)
        return text.search(query, limit, self._version.find_matching(where), sort=sort)

    def _find_vector(self, vector: Vectors, limit: int, where: Filter) -> Hits:
        vectors = self._require_vectors()
        if vector.shape != (vectors.layout.dimension,):
            raise QueryError(f"expected a vector of shape [{vectors.layout.dimension}], got {list(vector.shape)}")
        return vectors.search(vector, limit, None if where == Filter() else self._version.find_matching(where))

    def _find_vector_with_words(self, query: str, vector: Vectors, limit: int, where: Filter) -> Hits:
        """Returns the nearest vectors whose captions contain every required word and no excluded word."""
        depth = limit
        while True:
            hits = self._find_vector(vector, depth, where)
            admitted = self._version.text.filter_hits(query, hits)
            if len(admitted) >= limit or len(hits) < depth:
                return admitted[:limit]
            depth *= 4

    def _find_row(self, image_id: str) -> int:
        row = self._version.text.find_image(image_id)
        if row is None:
            raise QueryError(f"no image {image_id} in the index; image ids must match exactly")
        return row

    def _encode(self, sentence: str) -> Vectors:
        self._require_vectors()
        if not sentence.strip():
            raise QueryError("sentence: expected words, got none")
        if not is_unicode(sentence):
            raise QueryError(f"sentence: expected valid Unicode, got {sentence!a:.200}; remove the lone surrogates")
        if self._ranker is None:
            raise QueryError("searching by sentence requires the ranker that computed the embeddings; specify `ranker`")
        if not self._ranker.has_known_word(sentence):
            raise QueryError(f"sentence: expected words in the ranker's vocabulary, got none in {sentence!r}")
        vector: Vectors = self._ranker.encode_sentences([sentence])[0]
        return vector

    def _require_vectors(self) -> VectorIndex:
        vectors = self._version.vectors
        if vectors is None:
            raise QueryError("the index contains only text; build it with embeddings to search by sentence or image")
        return vectors

    def _to_table(self, hits: Hits) -> pa.Table:
        rows = self._version.rows.take(hits.rows).select(RESULT_COLUMNS)
        return rows.append_column(pa.field("score", pa.float32(), nullable=False), pa.array(hits.scores, pa.float32()))


def fuse_rankings(rankings: Sequence[Hits]) -> Hits:
    """Combines rankings of rows by reciprocal rank fusion (Cormack, Clarke and Buettcher, SIGIR 2009).

    A row's score is the sum of 1 / (60 + rank) over the rankings that contain it; ranks start at 1. Equal scores are
    ordered by row number.
    """
    rows = np.concatenate([np.empty(0, np.int64), *(hits.rows for hits in rankings)])
    terms = np.concatenate([np.empty(0), *(1.0 / (_RANK_CONSTANT + 1 + np.arange(len(hits))) for hits in rankings)])
    unique, positions = np.unique(rows, return_inverse=True)
    scores = np.bincount(positions, weights=terms, minlength=len(unique))
    order = np.lexsort((unique, -scores))
    return Hits(unique[order], scores[order].astype(np.float32))


def open_index(
    folder: str | os.PathLike[str],
    ranker: "str | os.PathLike[str] | RankingModel | None" = None,
    cache: str | os.PathLike[str] | None = None,
    refresh_seconds: float | None = 1.0,
) -> Index:
    """Opens an index for searching. The files of a remote index are copied to this machine, each only once.

    Example:
        >>> index = captionlib.open_index("index", ranker="ranker")
        >>> index.search_text("circle", limit=5).column_names
        ['image_id', 'uri', 'split', 'caption', 'log_prob', 'tokens', 'image_text_score', 'width', 'height', 'score']
        >>> index.search_sentence("a red ring", limit=5, where="split = 'test'").num_rows
        4

    Args:
        folder: path or fsspec URL of an index written by `captionlib build-index`.
        ranker: the ranker that computed the embeddings, or its checkpoint folder; required to search by sentence.
        cache: folder for copies. The default is `$CAPTIONLIB_CACHE`, or else a folder in the user's cache folder.
        refresh_seconds: minimum time between two checks for a new version. A search checks before it starts. If None,
            only `Index.refresh` opens a new version.

    Raises:
        DatasetError: the folder is not an index, or a file of the index is damaged.
        CheckpointError: a different ranker computed the embeddings.
    """
    if isinstance(ranker, str | os.PathLike):
        from captionlib.models.families.ranker import open_ranker  # imports torch, which takes seconds

        ranker = open_ranker(ranker, "cpu")
    return Index(Folder(folder), ranker, None if cache is None else Path(cache), refresh_seconds)


def _to_filter(where: Filter | str | None) -> Filter:
    return where if isinstance(where, Filter) else Filter(where=where)
