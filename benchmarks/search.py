"""Measures build memory, query latency and recall of an index of 1,000,000 captions and vectors.

`--rows N` measures a different size. The index is built once and kept in `.bench/`.
"""

import argparse
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from statistics import median
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.bars import measure_seconds, report, run_benchmark
from benchmarks.search_data import SearchData, prepare_data
from captionlib.search.index import Index, open_index
from captionlib.search.sql.session import SqlLimits, open_sql

QUERIES = 200
NEAREST = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    rows = parser.parse_args().rows
    data, built = prepare_data(rows)
    print(f"# built in {built['seconds']:.0f} s", flush=True)
    report("search-build-gigabytes", built["megabytes"] / 1000, 1.5, at_least=False)
    index = open_index(data.index)
    _measure_text(data, index)
    _measure_vectors(data, index)


def _measure_text(data: SearchData, index: Index) -> None:
    queries = [query.split() for query in data.sample_queries(QUERIES, 2, 0)]

    def search(words: Sequence[str]) -> Any:
        return index.search_text_and_count(" ".join(f"+{word}" for word in words))

    with open_sql(data.captions, "captions", SqlLimits(threads=1)) as session:
        sql = "SELECT count(*) FROM captions WHERE caption LIKE ? AND caption LIKE ?"

        def scan(words: Sequence[str]) -> Any:
            return session.query(sql, [f"%{word}%" for word in words])

        ours = _time_queries(search, queries)
        theirs = _time_queries(scan, queries[:15])
    print(f"# two words: {_format_milliseconds(ours)}, DuckDB's LIKE {_format_milliseconds(theirs)}", flush=True)
    report("search-text-to-like", median(ours) / median(theirs), 1 / 50, at_least=False)


def _measure_vectors(data: SearchData, index: Index) -> None:
    vectors = data.all_vectors()
    for name, queries, bar in (
        ("images", data.image_vectors(QUERIES, 99), 0.95),
        ("sentences", data.sentence_vectors(QUERIES, 99), 0.90),
    ):
        exact = [_search_exactly(vectors, query) for query in queries]
        report(f"search-recall-{name}", _recall(index, queries, exact, None), bar)
    ours = _time_queries(lambda query: index.search_vector(query, NEAREST), queries)
    theirs = _time_queries(lambda query: _search_exactly(vectors, query), queries[:15])
    print(f"# nearest vectors: {_format_milliseconds(ours)}, numpy {_format_milliseconds(theirs)}", flush=True)
    report("search-vector-to-brute-force", median(ours) / median(theirs), 1 / 20, at_least=False)
    for percent, modulus in ((1, 100), (0.1, 1000)):
        where = f"CAST(split_part(image_id, '-', 2) AS INT) % {modulus} = 7"
        numbers = np.arange(len(vectors))
        passing = np.flatnonzero(numbers % (len(vectors) // 16) % modulus == 7)
        candidates = vectors[passing]
        exact = [passing[_search_exactly(candidates, query)] for query in queries]
        report(f"search-recall-filter-{percent}%", _recall(index, queries, exact, where), 0.95)
        filtered = _time_queries(partial(index.search_vector, limit=NEAREST, where=where), queries)
        print(f"# with the filter: {_format_milliseconds(filtered)}", flush=True)


def _recall(
    index: Index, queries: npt.NDArray[np.float32], exact: Sequence[npt.NDArray[np.int64]], where: str | None
) -> float:
    """Returns the fraction of the nearest vectors that the index finds."""
    shard = len(index) // 16
    found = 0
    for query, rows in zip(queries, exact, strict=True):
        ids = index.search_vector(query, NEAREST, where=where)["image_id"].to_pylist()
        found += len({f"{row // shard:02d}-{row % shard:06d}" for row in rows.tolist()} & set(ids))
    return found / (len(queries) * NEAREST)


def _search_exactly(vectors: npt.NDArray[np.float32], query: npt.NDArray[np.float32]) -> npt.NDArray[np.int64]:
    scores = vectors @ query
    best = np.argpartition(scores, -NEAREST)[-NEAREST:]
    order: npt.NDArray[np.int64] = best[np.argsort(-scores[best])]
    return order


def _time_queries(search: Callable[[Any], Any], queries: Iterable[Any]) -> list[float]:
    """Returns the seconds of each query, after a few queries as warm-up."""
    queries = list(queries)
    for query in queries[:5]:
        search(query)
    seconds = []
    for query in queries:
        seconds.append(measure_seconds(partial(search, query)))
    return seconds


def _format_milliseconds(seconds: Sequence[float]) -> str:
    return f"{1000 * median(seconds):.2f} ms (95%: {1000 * float(np.quantile(seconds, 0.95)):.2f})"


if __name__ == "__main__":
    run_benchmark(main)
