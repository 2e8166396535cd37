"""An index, opened to be asked: words, sentences, images, and words and sentences together."""

import os
import threading
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from captionlib.errors import CheckpointError, DatasetError, QueryError
from captionlib.search.encoders import SentenceEncoder
from captionlib.search.fusion import fuse_rankings
from captionlib.search.index_files import DESCRIPTION, IndexDescription, local_copy, read_description
from captionlib.search.index_rows import RowStore
from captionlib.search.text_index import Sort, TextIndex
from captionlib.search.vector_index import Hits, VectorIndex, Vectors
from captionlib.storage.folders import Folder

__all__ = ["Filter", "Index", "open_index"]

_KEPT_FILTERS = 16
_FUSED = 200  # of each ranking at least: what is fused must not depend on the page that is shown


@dataclass(frozen=True)
class Filter:
    """Which images may be found.

    Attributes:
        where: a condition of SQL over the columns of a row. It can only read, but may take long: not for strangers.
        split: that they must be of.
        min_log_prob: that their captions must have at least.
    """

    where: str | None = None
    split: str | None = None
    min_log_prob: float | None = None

    @property
    def is_open(self) -> bool:
        """Whether all may be found."""
        return self == Filter()

    def to_sql(self) -> tuple[str, list[Any]]:
        """One condition, and its parameters."""
        parts = {"split = ?": self.split, "log_prob >= ?": self.min_log_prob}
        given = {sql: value for sql, value in parts.items() if value is not None}
        own = [f"(\n{self.where}\n)"] if self.where is not None else []
        return " AND ".join([*own, *given]), list(given.values())


class Index:
    """Takes questions and gives Arrow tables, the best row first. Made by `open_index`; safe to use from many threads.

    The tables have the columns image_id, uri, split, caption, log_prob, tokens and `score`: BM25 for words, the inner
    product for vectors, and reciprocal ranks for both together. There are as many rows as were asked for, unless no
    more exist.

    Every question takes `limit` rows after the first `offset`, and `where`: a `Filter`, or a condition of SQL.

    Attributes:
        description: what it was built from.
    """

    def __init__(self, description: IndexDescription, path: Path, encoder: SentenceEncoder | None = None) -> None:
        self.description = description
        self._rows = RowStore(path / shard.file for shard in description.shards)
        self._text = TextIndex(path / description.text, description.config.language)
        self._vectors: VectorIndex | None = None
        if description.layout is not None:
            self._vectors = VectorIndex(path / description.vectors, description.layout, description.capacity)
        self._encoder = encoder
        self._lock = threading.Lock()
        self._passing: OrderedDict[Filter, npt.NDArray[np.int64]] = OrderedDict()

    def __len__(self) -> int:
        return self.description.captions_count

    @property
    def has_vectors(self) -> bool:
        return self._vectors is not None

    @property
    def has_sentences(self) -> bool:
        """Whether it takes sentences: it has vectors, and was opened with their ranker."""
        return self.has_vectors and self._encoder is not None

    def text(
        self,
        question: str,
        limit: int = 20,
        offset: int = 0,
        where: Filter | str | None = None,
        sort: Sort = "relevance",
    ) -> pa.Table:
        """Captions by their words.

        Args:
            question: words, "phrases", `+must`, `-must not`.
            limit: how many rows.
            offset: how many to pass over.
            where: which images may be found.
            sort: by BM25, or the most likely first.

        Raises:
            QueryError: no word is left to look for, or the condition is none.
        """
        return self._table(self._find_text(question, offset + limit, _filter(where), sort)[offset:])

    def text_and_count(
        self, question: str, limit: int = 20, offset: int = 0, where: Filter | None = None
    ) -> tuple[pa.Table, int]:
        """Captions by their words, and how many match in all; `where` without SQL. See `text`."""
        chosen = where or Filter()
        if chosen.where is not None:
            raise QueryError("text_and_count: expected a filter without SQL; ask for the rows and count them")
        hits, count = self._text.search_and_count(question, offset + limit, chosen.split, chosen.min_log_prob)
        return self._table(hits[offset:]), count

    def sentence(self, sentence: str, limit: int = 20, offset: int = 0, where: Filter | str | None = None) -> pa.Table:
        """Images that a sentence describes, whatever their captions say.

        Raises:
            QueryError: the index has no vectors, was opened without their ranker, or that knows none of the words.
        """
        return self.vector(self._encode(sentence), limit, offset, where)

    def vector(self, vector: Vectors, limit: int = 20, offset: int = 0, where: Filter | str | None = None) -> pa.Table:
        """Images by a vector of the ranker's space, `[size]`.

        Raises:
            QueryError: the index has no vectors, or they are of another size.
        """
        return self._table(self._find_vector(vector, offset + limit, _filter(where))[offset:])

    def similar(self, image_id: str, limit: int = 20, offset: int = 0, where: Filter | str | None = None) -> pa.Table:
        """The images that lie nearest to one of the index, which is left out itself.

        Raises:
            QueryError: there is no such image, or it has no vector.
        """
        row = self._row(image_id)
        vector = self._require_vectors().vector(row)
        if vector is None:
            raise QueryError(f"image {image_id} has no vector: it failed where the embeddings were made")
        hits = self._find_vector(vector, offset + limit + 1, _filter(where))
        others = hits.rows != row
        return self._table(Hits(hits.rows[others], hits.scores[others])[offset : offset + limit])

    def hybrid(
        self,
        question: str,
        limit: int = 20,
        offset: int = 0,
        where: Filter | str | None = None,
        vector: Vectors | None = None,
    ) -> pa.Table:
        """Images by the words of their captions and by their vectors, fused by reciprocal rank.

        What must be in a caption, or must not, holds for all of them. Words that the ranker never learned are
        looked for in captions alone.

        Args:
            question: see `text`; it is also the sentence, without its signs, unless a vector is given.
            limit: how many rows.
            offset: how many to pass over.
            where: which images may be found.
            vector: in place of the sentence's.

        Raises:
            QueryError: no word is left to look for, or sentences cannot be asked.
        """
        depth = -(-max(1, offset + limit) // _FUSED) * _FUSED
        chosen = _filter(where)
        rankings = [self._find_text(question, depth, chosen, "relevance")]
        if vector is None and self._knows(sentence := self._text.wanted_words(question)):
            vector = self._encode(sentence)
        if vector is not None:
            rankings.append(self._find_allowed(question, vector, depth, chosen))
        return self._table(fuse_rankings(rankings)[offset : offset + limit])

    def image(self, image_id: str) -> dict[str, Any]:
        """The row of one image.

        Raises:
            QueryError: there is no such image.
        """
        row: dict[str, Any] = self._rows.take(np.array([self._row(image_id)])).to_pylist()[0]
        return row

    def sample(self, limit: int = 20) -> pa.Table:
        """Some images, from all over the index; each scores 0."""
        rows = self._rows.spread(limit)
        return self._table(Hits(rows, np.zeros(len(rows), np.float32)))

    def splits(self) -> list[str]:
        """The splits that its images are of, sorted."""
        return self._rows.splits()

    def _find_text(self, question: str, limit: int, where: Filter, sort: Sort) -> Hits:
        if where.where is None:
            return self._text.search(question, limit, None, where.split, where.min_log_prob, sort)
        return self._text.search(question, limit, self._passing_rows(where), sort=sort)

    def _find_vector(self, vector: Vectors, limit: int, where: Filter) -> Hits:
        vectors = self._require_vectors()
        if vector.shape != (vectors.layout.size,):
            raise QueryError(f"expected a vector of shape [{vectors.layout.size}], got {list(vector.shape)}")
        return vectors.search(vector, limit, None if where.is_open else self._passing_rows(where))

    def _find_allowed(self, question: str, vector: Vectors, limit: int, where: Filter) -> Hits:
        """The nearest of which the captions have what they must have."""
        asked = limit
        while True:
            hits = self._find_vector(vector, asked, where)
            kept = self._text.allowed(question, hits)
            if len(kept) >= limit or len(hits) < asked:
                return kept[:limit]
            asked *= 4

    def _passing_rows(self, where: Filter) -> npt.NDArray[np.int64]:
        """The rows that pass; of the filters asked last they are kept, for the next page."""
        with self._lock:
            known = self._passing.get(where)
            if known is not None:
                self._passing.move_to_end(where)
                return known
        rows = self._rows.passing(*where.to_sql())
        with self._lock:
            self._passing[where] = rows
            if len(self._passing) > _KEPT_FILTERS:
                self._passing.popitem(last=False)
        return rows

    def _row(self, image_id: str) -> int:
        row = self._text.find(image_id)
        if row is None:
            raise QueryError(f"no image {image_id} in the index; ids are matched exactly")
        return row

    def _knows(self, sentence: str) -> bool:
        """Whether a sentence has words to look for; without a ranker it is for `_encode` to complain."""
        return bool(sentence) and (self._encoder is None or self._encoder.has_known_word(sentence))

    def _encode(self, sentence: str) -> Vectors:
        self._require_vectors()
        if not sentence.strip():
            raise QueryError("sentence: expected words, got none")
        if self._encoder is None:
            raise QueryError("sentences need the ranker that made the embeddings; open the index with its checkpoint")
        if not self._encoder.has_known_word(sentence):
            raise QueryError(f"sentence: expected words that the ranker has learned, got none of them in {sentence!r}")
        vector: Vectors = self._encoder.encode_sentences([sentence])[0]
        return vector

    def _require_vectors(self) -> VectorIndex:
        if self._vectors is None:
            raise QueryError("the index holds text alone; build it with embeddings to ask for sentences and images")
        return self._vectors

    def _table(self, hits: Hits) -> pa.Table:
        rows = self._rows.take(hits.rows)
        return rows.append_column(pa.field("score", pa.float32(), nullable=False), pa.array(hits.scores, pa.float32()))


def open_index(
    folder: str | os.PathLike[str], encoder: SentenceEncoder | None = None, cache: str | os.PathLike[str] | None = None
) -> Index:
    """Opens an index; one that lies elsewhere is copied to this machine once.

    Args:
        folder: where it lies, on any file system of fsspec.
        encoder: the ranker that made its embeddings, to ask for sentences.
        cache: where copies are kept; None is `$CAPTIONLIB_CACHE`, or `captionlib/indexes` in the user's cache folder.

    Raises:
        DatasetError: there is no index.
        CheckpointError: the ranker is another one.
    """
    address = Folder(folder)
    description = read_description(address)
    if description is None:
        raise DatasetError(f"{address.uri} is no index: expected a folder that holds {DESCRIPTION}; see build-index")
    made_by = description.embeddings.ranker if description.embeddings else ""
    if encoder is not None and made_by and encoder.fingerprint != made_by:
        raise CheckpointError(
            f"{address.uri}: expected the ranker {made_by}, which made its vectors, got {encoder.fingerprint}; "
            "give that one, or embed the images again and build the index anew"
        )
    path = local_copy(address, description, None if cache is None else Path(cache))
    return Index(description, path, encoder)


def _filter(where: Filter | str | None) -> Filter:
    return where if isinstance(where, Filter) else Filter(where=where)
