"""Captions in Tantivy: words without their endings, asked for by BM25.

A question is words and "phrases"; `+` before one: it must be there, `-`: it must not. All else is text, never syntax.
"""

import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import tantivy
from tantivy import Filter, Occur, Query

from captionlib.errors import DatasetError, QueryError
from captionlib.search.vector_index import Hits

__all__ = ["Sort", "TextIndex", "write_text"]

Sort = Literal["relevance", "log_prob"]

_ANALYZER = "captions"
_WRITER_BYTES = 128_000_000
_LONGEST_WORD = 40
_MOST_CLAUSES = 64
_CLAUSE = re.compile(r'([+-]?)(?:"([^"]*)"?|([^\s"]+))')

# Up to so many passing rows are looked for as such; of more, enough are among the first that match anyway.
_FEW_PASSING = 20_000


class _Clause(NamedTuple):
    occur: Occur
    words: list[tuple[int, str]]


def write_text(
    path: Path, language: str, rows: Iterable[pa.RecordBatch], base: Path | None, removed: Sequence[tuple[int, int]]
) -> int:
    """Writes the index of captions to a new folder.

    Args:
        path: of the folder.
        language: see `IndexConfig`.
        rows: with the columns row, image_id, split, caption and log_prob.
        base: an index of the same language that they are added to; it stays as it is.
        removed: ranges of rows to leave out of the base, the end excluded.

    Returns:
        How many captions there are.
    """
    if base is None:
        path.mkdir(parents=True)
        index = tantivy.Index(_schema(), path=str(path))
    else:
        shutil.copytree(base, path, ignore=shutil.ignore_patterns(".tantivy-*.lock"))
        index = tantivy.Index.open(str(path))
    index.register_tokenizer(_ANALYZER, _analyzer(language))
    # One thread: the same captions in the same order give the same index.
    writer = index.writer(_WRITER_BYTES, 1)
    for start, end in removed:
        writer.delete_documents_by_query(
            Query.range_query(index.schema, "row", tantivy.FieldType.Integer, start, end, include_upper=False)
        )
    for batch in rows:
        for document in _documents(batch):
            writer.add_document(document)
    writer.commit()
    writer.wait_merging_threads()
    index.reload()
    for lock in path.glob(".tantivy-*.lock"):
        lock.unlink()
    return int(index.searcher().num_docs)


def _schema() -> tantivy.Schema:
    builder = tantivy.SchemaBuilder()
    builder.add_text_field("caption", tokenizer_name=_ANALYZER, index_option="position")
    builder.add_text_field("image_id", tokenizer_name="raw", index_option="basic")
    builder.add_text_field("split", tokenizer_name="raw", index_option="basic")
    builder.add_float_field("log_prob", indexed=True, fast=True)
    builder.add_integer_field("row", indexed=True, fast=True)
    return builder.build()


def _analyzer(language: str) -> tantivy.TextAnalyzer:
    """Words in small letters, without stop words, endings and accents."""
    filters = [Filter.remove_long(_LONGEST_WORD), Filter.lowercase()]
    if language != "none":
        filters += [*_stop_words(language), Filter.stemmer(language)]
    builder = tantivy.TextAnalyzerBuilder(tantivy.Tokenizer.simple())
    for one in [*filters, Filter.ascii_fold()]:
        builder = builder.filter(one)
    return builder.build()


def _stop_words(language: str) -> list[Filter]:
    try:
        return [Filter.stopword(language)]
    except ValueError:  # Tantivy knows its endings, but not its stop words
        return []


def _documents(batch: pa.RecordBatch) -> Iterator[tantivy.Document]:
    names = ("row", "image_id", "split", "caption", "log_prob")
    for row, image_id, split, caption, log_prob in zip(*(batch[name].to_pylist() for name in names), strict=True):
        document = tantivy.Document()
        document.add_text("caption", caption)
        document.add_text("image_id", image_id)
        document.add_text("split", split)
        document.add_float("log_prob", log_prob)
        document.add_integer("row", row)
        yield document


class TextIndex:
    """The captions of an index, opened to be asked. Safe to use from many threads.

    Args:
        path: of the folder.
        language: that it was written in.

    Raises:
        DatasetError: there is no such index.
    """

    def __init__(self, path: Path, language: str) -> None:
        try:
            index = tantivy.Index.open(str(path))
            index.config_reader("manual")
        except (ValueError, OSError) as error:
            raise DatasetError(f"{path} is no Tantivy index ({error}); build the index again") from error
        self._schema = index.schema
        self._searcher = index.searcher()
        self._analyzer = _analyzer(language)

    def __len__(self) -> int:
        return int(self._searcher.num_docs)

    def search(
        self,
        question: str,
        limit: int,
        passing: "np.ndarray[Any, np.dtype[np.int64]] | None" = None,
        split: str | None = None,
        min_log_prob: float | None = None,
        sort: Sort = "relevance",
    ) -> Hits:
        """The captions that match, the best first.

        Args:
            question: words, "phrases", `+must`, `-must not`.
            limit: how many.
            passing: the rows that may be found, in order; None is all.
            split: that they must be of.
            min_log_prob: that they must have at least.
            sort: by BM25, or the most likely first.

        Raises:
            QueryError: no word is left to look for.
        """
        query = self._narrow(self._parse(question), split, min_log_prob)
        if passing is None:
            return self._search(query, limit, sort)
        if len(passing) <= _FEW_PASSING:
            only = Query.const_score_query(Query.term_set_query(self._schema, "row", passing.tolist()), 0.0)
            return self._search(Query.boolean_query([(Occur.Must, query), (Occur.Must, only)]), limit, sort)
        asked = limit
        while True:
            asked = min(4 * asked, max(1, len(self)))
            hits = self._search(query, asked, sort)
            places = np.searchsorted(passing, hits.rows).clip(max=len(passing) - 1)
            kept = passing[places] == hits.rows
            if np.count_nonzero(kept) >= limit or len(hits) < asked or asked == len(self):
                return Hits(hits.rows[kept], hits.scores[kept])[:limit]

    def allowed(self, question: str, hits: Hits) -> Hits:
        """Those of other hits that have all that must be there, and nothing that must not; in the same order."""
        clauses = [clause for clause in self._clauses(question) if clause.occur != Occur.Should]
        if not clauses or not len(hits):
            return hits
        rows = Query.const_score_query(Query.term_set_query(self._schema, "row", hits.rows.tolist()), 1.0)
        parts = [(clause.occur, self._to_query(clause.words)) for clause in clauses]
        found = self._search(Query.boolean_query([(Occur.Must, rows), *parts]), len(hits), "relevance")
        kept = np.isin(hits.rows, found.rows)
        return Hits(hits.rows[kept], hits.scores[kept])

    def wanted_words(self, question: str) -> str:
        """A question as a sentence: without its signs, and without what must not be there."""
        found = _CLAUSE.findall(question)
        return " ".join(phrase or word for sign, phrase, word in found if sign != "-")

    def search_and_count(
        self, question: str, limit: int, split: str | None = None, min_log_prob: float | None = None
    ) -> tuple[Hits, int]:
        """The captions that match, and how many do; one pass over both takes less than two. See `search`."""
        query = self._narrow(self._parse(question), split, min_log_prob)
        found: Any = self._searcher.search(query, min(max(1, limit), max(1, len(self))), count=True)
        return self._to_hits(found.hits)[:limit], int(found.count)

    def find(self, image_id: str) -> int | None:
        """The row of an image; None where there is none."""
        hits = self._search(Query.term_query(self._schema, "image_id", image_id, "basic"), 1, "relevance")
        return int(hits.rows[0]) if len(hits) else None

    def _search(self, query: Query, limit: int, sort: Sort) -> Hits:
        if not limit:
            return Hits(np.empty(0, np.int64), np.empty(0, np.float32))
        by = None if sort == "relevance" else sort
        most = min(limit, max(1, len(self)))
        return self._to_hits(self._searcher.search(query, most, count=False, order_by_field=by).hits)

    def _to_hits(self, found: list[tuple[Any, Any]]) -> Hits:
        rows = self._searcher.fast_field_values("row", [address for _, address in found])
        return Hits(np.array(rows, np.int64), np.array([score for score, _ in found], np.float32))

    def _narrow(self, query: Query, split: str | None, min_log_prob: float | None) -> Query:
        conditions = []
        if split is not None:
            conditions.append(Query.term_query(self._schema, "split", split, "basic"))
        if min_log_prob is not None:
            kind = tantivy.FieldType.Float
            conditions.append(Query.range_query(self._schema, "log_prob", kind, lower_bound=float(min_log_prob)))
        if not conditions:
            return query
        silent = [(Occur.Must, Query.const_score_query(one, 0.0)) for one in conditions]
        return Query.boolean_query([(Occur.Must, query), *silent])

    def _parse(self, question: str) -> Query:
        clauses = list(self._clauses(question))
        if not clauses:
            raise QueryError(
                f"text: expected words to look for, got {question!r}; very frequent words such as `the` do not count"
            )
        if len(clauses) > _MOST_CLAUSES:
            raise QueryError(f"text: expected at most {_MOST_CLAUSES} words and phrases, got {len(clauses)}")
        parts = [(clause.occur, self._to_query(clause.words)) for clause in clauses]
        if all(clause.occur == Occur.MustNot for clause in clauses):
            parts.append((Occur.Must, Query.all_query()))
        return Query.boolean_query(parts)

    def _clauses(self, question: str) -> Iterator[_Clause]:
        signs = {"+": Occur.Must, "-": Occur.MustNot, "": Occur.Should}
        for sign, phrase, word in _CLAUSE.findall(question):
            tokens = self._analyzer.pre_tokenize(phrase or word).tokens
            if tokens:
                yield _Clause(signs[sign], [(token.position, token.text) for token in tokens])

    def _to_query(self, words: list[tuple[int, str]]) -> Query:
        if len(words) == 1:
            return Query.term_query(self._schema, "caption", words[0][1])
        first = words[0][0]
        return Query.phrase_query(self._schema, "caption", [(place - first, word) for place, word in words])
