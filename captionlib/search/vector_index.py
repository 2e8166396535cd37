"""Builds and searches a Faiss index of embeddings.

A build trains centroids, writes a partial index for each shard, and merges the partial indexes. Scores are inner
products of unit vectors. An index with the encoding `Flat` has a single inverted list, so search is exact.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import faiss
import numpy as np
import numpy.typing as npt

from captionlib.errors import DatasetError
from captionlib.search.config import VectorLayout

__all__ = [
    "Hits",
    "RowMove",
    "RowNumbers",
    "VectorIndex",
    "Vectors",
    "merge_indexes",
    "write_partial_index",
    "write_trained_index",
]

Vectors = npt.NDArray[np.float32]
RowNumbers = npt.NDArray[np.int64]

_KMEANS_ITERATIONS = 10
_SEED = 1
_MAX_TIES = 4096  # if more vectors have the same score, their order is not defined


class RowMove(NamedTuple):
    """Rows `start` to `end` (exclusive) of an index. In its new version, their numbers begin at `new_start`."""

    start: int
    end: int
    new_start: int


@dataclass(frozen=True)
class Hits:
    """The rows that match a query, best first."""

    rows: RowNumbers  # `[hits]`
    scores: npt.NDArray[np.float32]  # `[hits]`, descending unless sorted by a different field

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, selection: "slice | npt.NDArray[np.bool_ | np.intp]") -> "Hits":
        return Hits(self.rows[selection], self.scores[selection])

    @classmethod
    def empty(cls) -> "Hits":
        return cls(np.empty(0, np.int64), np.empty(0, np.float32))


def write_trained_index(layout: VectorLayout, sample: Vectors, path: Path) -> None:
    """Trains centroids and quantizers on unit vectors, `[rows, dimension]`, and writes an index without vectors."""
    index = faiss.index_factory(layout.dimension, f"IVF{layout.nlist},{layout.encoding}", faiss.METRIC_INNER_PRODUCT)
    index.cp.seed = _SEED
    index.cp.niter = _KMEANS_ITERATIONS
    index.cp.min_points_per_centroid = 1  # no warning if the user chooses short lists
    index.cp.spherical = True
    if isinstance(index, faiss.IndexIVFPQ):
        index.pq.cp.min_points_per_centroid = 1
    missing = max(0, layout.nlist - len(sample))  # random vectors to add: k-means needs one per list
    random = np.random.default_rng(_SEED).normal(size=(missing, layout.dimension))
    vectors = np.concatenate([sample, random / np.linalg.norm(random, axis=1, keepdims=True)])
    index.train(np.ascontiguousarray(vectors, np.float32))
    _write_index(index, path)


def write_partial_index(trained: Path, rows: RowNumbers, vectors: Vectors, path: Path) -> None:
    """Writes the partial index of one shard. `rows` are the row numbers of its vectors in the whole index."""
    index = faiss.read_index(str(trained))
    if len(rows):
        index.add_with_ids(np.ascontiguousarray(vectors, np.float32), rows)
    _write_index(index, path)


def merge_indexes(base: Path, moves: Sequence[RowMove], parts: Iterable[Path], path: Path) -> int:
    """Merges partial indexes into a copy of the index `base`. Returns the number of vectors of the result.

    `moves` are the rows of `base` to keep, and their new row numbers. The vectors of each inverted list are sorted by
    row number, so the result is the same as if all vectors had been added at once.
    """
    index = faiss.read_index(str(base))
    if index.ntotal:
        _move_rows(index, sorted(moves))
    for part in parts:
        index.merge_from(faiss.read_index(str(part)), 0)
    for ids, codes in _iter_lists(index):
        order = np.argsort(ids, kind="stable")
        ids[:], codes[:] = ids[order], codes[order]
    _write_index(index, path)
    return int(index.ntotal)


def _write_index(index: Any, path: Path) -> None:
    """Writes an index through a Python file. Faiss's own writer may not raise an exception if the disk is full."""
    errors: list[OSError] = []
    with path.open("wb") as file:

        def write(content: bytes) -> None:
            try:
                file.write(content)
            except OSError as error:  # raised below, because it must not pass through Faiss
                errors.append(error)

        faiss.write_index(index, faiss.PyCallbackIOWriter(write))
        file.flush()
    if errors:
        raise errors[0]


def _move_rows(index: Any, moves: Sequence[RowMove]) -> None:
    """Renumbers the rows in `moves`, which must be sorted, and removes the vectors of all other rows."""
    # The zeros make `zip` yield three tuples even if `moves` is empty.
    starts, ends, new_starts = (np.array(values, np.int64) for values in zip((0, 0, 0), *moves, strict=True))
    last_row = max(int(ids.max(initial=0)) for ids, _ in _iter_lists(index))
    is_kept = np.zeros(max(int(ends.max()), last_row + 1), np.bool_)
    for start, end, _ in moves:
        is_kept[start:end] = True
    bitmap = np.packbits(~is_kept, bitorder="little")
    index.remove_ids(faiss.IDSelectorBitmap(bitmap))
    for ids, _ in _iter_lists(index):
        ids[:] += (new_starts - starts)[np.searchsorted(starts, ids, side="right") - 1]


def _iter_lists(index: Any) -> Iterator[tuple[RowNumbers, npt.NDArray[np.uint8]]]:
    """Yields the row numbers and codes of each inverted list, without copying them."""
    lists = index.invlists
    for list_id in range(index.nlist):
        if size := lists.list_size(list_id):
            codes = faiss.rev_swig_ptr(lists.get_codes(list_id), size * lists.code_size).reshape(size, lists.code_size)
            yield faiss.rev_swig_ptr(lists.get_ids(list_id), size), codes


class VectorIndex:
    """An open, memory-mapped vector index. This class is thread-safe. A query runs on one thread.

    `rows` is the number of rows of the whole index, including rows without a vector.
    """

    def __init__(self, path: Path, layout: VectorLayout, rows: int) -> None:
        try:
            self._index: Any = faiss.read_index(str(path), faiss.IO_FLAG_MMAP | faiss.IO_FLAG_READ_ONLY)
        except RuntimeError as error:
            raise DatasetError(f"{path} is not a Faiss index ({error}); build the index again") from error
        if (self._index.d, self._index.nlist) != (layout.dimension, layout.nlist):
            raise DatasetError(
                f"{path}: expected {layout.nlist} lists of vectors of dimension {layout.dimension}, "
                f"got {self._index.nlist} of {self._index.d}; build the index again"
            )
        # By default, Faiss starts 32 prefetch threads per query. Starting them takes ten times as long as the query.
        faiss.downcast_InvertedLists(self._index.invlists).prefetch_nthread = 0
        self.layout = layout
        self._rows = rows

    def __len__(self) -> int:
        return int(self._index.ntotal)

    def search(self, vector: Vectors, limit: int, matching: RowNumbers | None = None) -> Hits:
        """Returns the nearest vectors. Equal scores are ordered by row number.

        If `matching` is not None, only these rows are searched, in more inverted lists if they are few. If there are
        fewer than `limit` hits, the search continues in more lists, up to all of them.
        """
        searchable_count = len(self) if matching is None else len(matching)
        if not min(limit, searchable_count):
            return Hits.empty()
        depth = min(limit + 1, searchable_count)
        selector = None
        if matching is not None:
            mask = np.zeros(self._rows, np.bool_)
            mask[matching] = True
            bitmap = np.packbits(mask, bitorder="little")  # the selector points to it, so it must stay alive
            selector = faiss.IDSelectorBitmap(bitmap)
        hits = self._search_lists(vector, depth, searchable_count, selector)
        # Ties are ordered by row number, so search deeper while rows that tie with the last hit may be missing.
        while len(hits) > limit and hits.scores[limit - 1] == hits.scores[-1] and len(hits) == depth < searchable_count:
            if depth > _MAX_TIES + limit:
                break
            depth = min(4 * depth, searchable_count)
            hits = self._search_lists(vector, depth, searchable_count, selector)
        return hits[np.lexsort((hits.rows, -hits.scores))[:limit]]

    def _search_lists(self, vector: Vectors, limit: int, searchable_count: int, selector: Any) -> Hits:
        layout = self.layout
        nprobe = layout.nprobe
        if selector is not None:
            nprobe = min(layout.nlist, round(nprobe * self._rows / searchable_count))
        query = np.ascontiguousarray(vector, np.float32).reshape(1, -1)
        while True:
            parameters = faiss.SearchParametersIVF(sel=selector, nprobe=nprobe)
            scores, rows = self._index.search(query, limit, params=parameters)
            is_hit = rows[0] >= 0
            if is_hit.all() or nprobe == layout.nlist:
                return Hits(rows[0], scores[0])[is_hit]
            nprobe = min(layout.nlist, 4 * nprobe)

    def get_vector(self, row: int) -> Vectors | None:
        """Returns the vector of a row, `[dimension]`, scaled to unit length; None if it has none."""
        lists = self._index.invlists
        for list_id in range(self.layout.nlist):
            ids = faiss.rev_swig_ptr(lists.get_ids(list_id), lists.list_size(list_id))
            positions = np.flatnonzero(ids == row)
            if len(positions):
                vector: Vectors = np.empty(self.layout.dimension, np.float32)
                self._index.reconstruct_from_offset(list_id, int(positions[0]), faiss.swig_ptr(vector))
                return vector / max(float(np.linalg.norm(vector)), 1e-12)
        return None
