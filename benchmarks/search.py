"""An index of 1,000,000 captions and vectors: what building takes, how fast it answers, and how much of what is right.

`--rows N` measures another size. The index is built once and kept in `.bench/`.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from statistics import median
from typing import Any

import numpy as np
import numpy.typing as npt

import captionlib.search
from benchmarks.bars import report
from benchmarks.search_data import SearchData, make_data
from captionlib.search.index import Index
from captionlib.search.sql.session import SqlLimits, open_captions

QUESTIONS = 200
NEAREST = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    rows = parser.parse_args().rows
    data, built = make_data(rows)
    print(f"# built in {built['seconds']:.0f} s", flush=True)
    met = [report("search-build-gigabytes", built["megabytes"] / 1000, 1.5, at_least=False)]
    index = captionlib.search.open(data.index)
    met.append(_measure_text(data, index))
    met += _measure_vectors(data, index)
    sys.exit(not all(met))


def _measure_text(data: SearchData, index: Index) -> bool:
    """Two words, all of which must be there, with the number of captions that match; by turns with DuckDB."""
    questions = [question.split() for question in data.questions(QUESTIONS, 2, 0)]

    def ask(words: Sequence[str]) -> Any:
        return index.search_text_and_count(" ".join(f"+{word}" for word in words))

    with open_captions(data.captions, SqlLimits(threads=1)) as session:
        sql = "SELECT count(*) FROM captions WHERE caption LIKE ? AND caption LIKE ?"

        def scan(words: Sequence[str]) -> Any:
            return session.query(sql, [f"%{word}%" for word in words])

        ours = _times(ask, questions)
        theirs = _times(scan, questions[:15])
    print(f"# two words: {_milliseconds(ours)}, DuckDB's LIKE {_milliseconds(theirs)}", flush=True)
    return report("search-text-to-like", median(ours) / median(theirs), 1 / 50, at_least=False)


def _measure_vectors(data: SearchData, index: Index) -> list[bool]:
    vectors = data.all_vectors()
    met = []
    for name, questions, bar in (
        ("images", data.image_vectors(QUESTIONS, 99), 0.95),
        ("sentences", data.sentence_vectors(QUESTIONS, 99), 0.90),
    ):
        exact = [_brute(vectors, question) for question in questions]
        met.append(report(f"search-recall-{name}", _recall(index, questions, exact, None), bar))
    ours = _times(lambda question: index.search_vector(question, NEAREST), questions)
    theirs = _times(lambda question: _brute(vectors, question), questions[:15])
    print(f"# nearest vectors: {_milliseconds(ours)}, numpy {_milliseconds(theirs)}", flush=True)
    met.append(report("search-vector-to-brute-force", median(ours) / median(theirs), 1 / 20, at_least=False))
    for share, modulus in ((1, 100), (0.1, 1000)):
        where = f"CAST(split_part(image_id, '-', 2) AS INT) % {modulus} = 7"
        numbers = np.arange(len(vectors))
        passing = np.flatnonzero(numbers % (len(vectors) // 16) % modulus == 7)
        some = vectors[passing]
        exact = [passing[_brute(some, question)] for question in questions]
        met.append(report(f"search-recall-filter-{share}%", _recall(index, questions, exact, where), 0.95))
        filtered = _times(partial(index.search_vector, limit=NEAREST, where=where), questions)
        print(f"# with the filter: {_milliseconds(filtered)}", flush=True)
    return met


def _recall(
    index: Index, questions: npt.NDArray[np.float32], exact: Sequence[npt.NDArray[np.int64]], where: str | None
) -> float:
    """The share of the nearest that were found."""
    shard = len(index) // 16
    found = 0
    for question, rows in zip(questions, exact, strict=True):
        ids = index.search_vector(question, NEAREST, where=where)["image_id"].to_pylist()
        found += len({f"{row // shard:02d}-{row % shard:06d}" for row in rows.tolist()} & set(ids))
    return found / (len(questions) * NEAREST)


def _brute(vectors: npt.NDArray[np.float32], question: npt.NDArray[np.float32]) -> npt.NDArray[np.int64]:
    scores = vectors @ question
    best = np.argpartition(scores, -NEAREST)[-NEAREST:]
    order: npt.NDArray[np.int64] = best[np.argsort(-scores[best])]
    return order


def _times(ask: Callable[[Any], Any], questions: Iterable[Any]) -> list[float]:
    """Seconds of each, after a few that warm up."""
    questions = list(questions)
    for question in questions[:5]:
        ask(question)
    seconds = []
    for question in questions:
        began = time.perf_counter()
        ask(question)
        seconds.append(time.perf_counter() - began)
    return seconds


def _milliseconds(seconds: Sequence[float]) -> str:
    return f"{1000 * median(seconds):.2f} ms (95%: {1000 * float(np.quantile(seconds, 0.95)):.2f})"


if __name__ == "__main__":
    main()
