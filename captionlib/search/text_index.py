"""Full-text search over captions with Tantivy, ranked by BM25.

A query is a list of words and "phrases". `+` before a word or phrase requires it, and `-` excludes it.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import tantivy
from tantivy import Filter, Occur, Query

from captionlib.data.sources.values import is_unicode
from captionlib.errors import DatasetError, QueryError, StorageError
from captionlib.search.vector_index import Hits, RowNumbers

__all__ = ["Sort", "TextIndex", "find_unclosed_phrase", "write_text_index"]

Sort = Literal["relevance", "log_prob", "image_text_score"]

_COLUMNS = ["row", "group", "image_id", "caption", "log_prob", "image_text_score"]
_ANALYZER = "captions"
_WRITER_MEMORY_BYTES = 128_000_000
_MAX_WORD_LENGTH = 40
_MAX_CLAUSES = 64
_MIN_CORRECTED_LENGTH = 4
_MIN_SIMILARITY = 0.6  # `difflib.SequenceMatcher.ratio`
_CAPTIONS_PER_SUGGESTION = 20
_QUOTES = str.maketrans("“”„«»", '"' * 5)  # phones and word processors replace plain quotation marks
_CLAUSE = re.compile(r'([+-]?)(?:"([^"]*)"?|([^\s"]+))')

# If a filter matches at most this many rows, their numbers become part of the query. Otherwise, the hits are filtered.
_MAX_TERM_SET = 20_000


class _Clause(NamedTuple):
    """A word or phrase of a query, and whether it is required, excluded or optional."""

    occur: Occur
    words: list[tuple[int, str]]  # position in the clause, stemmed word


def write_text_index(path: Path, language: str, rows: Iterable[pa.RecordBatch]) -> None:
    """Writes a text index to a new folder.

    `rows` have the columns of `search.rows.ROW_SCHEMA`, the row number `row`, and the number of a facet group, `group`.

    The index is always built from scratch. Captions that are removed from an existing index would remain in its files
    and in the word counts that determine BM25 scores.
    """
    try:
        _write_text_index(path, language, rows)
    except ValueError as error:
        if "IO error" in str(error):
            raise StorageError(f"{path} cannot be written: {error}; run the same command again") from error
        raise


def _write_text_index(path: Path, language: str, rows: Iterable[pa.RecordBatch]) -> None:
    path.mkdir(parents=True)
    index = tantivy.Index(_make_schema(), path=str(path))
    index.register_tokenizer(_ANALYZER, _make_analyzer(language))
    # One thread, so that the same captions in the same order give the same scores.
    writer = index.writer(_WRITER_MEMORY_BYTES, 1)
    for batch in rows:
        for row in batch.select(_COLUMNS).to_pylist():
            values = {name: value for name, value in row.items() if value is not None}
            writer.add_document(tantivy.Document.from_dict(values, index.schema))
    writer.commit()
    writer.wait_merging_threads()
    for lock in path.glob(".tantivy-*.lock"):
        lock.unlink()


def _make_schema() -> tantivy.Schema:
    builder = tantivy.SchemaBuilder()
    builder.add_text_field("caption", tokenizer_name=_ANALYZER, index_option="position")
    builder.add_text_field("image_id", tokenizer_name="raw", index_option="basic")
    builder.add_float_field("log_prob", indexed=True, fast=True)
    builder.add_float_field("image_text_score", indexed=True, fast=True)
    builder.add_integer_field("row", indexed=True, fast=True)
    builder.add_integer_field("group", indexed=True, fast=True)
    return builder.build()


def _make_analyzer(language: str) -> tantivy.TextAnalyzer:
    """Returns an analyzer that lowercases, removes stop words, stems, and folds accents."""
    filters = [Filter.remove_long(_MAX_WORD_LENGTH), Filter.lowercase()]
    if language != "none":
        with suppress(ValueError):  # Tantivy has no stop words for some languages
            filters.append(Filter.stopword(language))
        filters.append(Filter.stemmer(language))
    builder = tantivy.TextAnalyzerBuilder(tantivy.Tokenizer.simple())
    for word_filter in [*filters, Filter.ascii_fold()]:
        builder = builder.filter(word_filter)
    return builder.build()


class TextIndex:
    """An open text index. This class is thread-safe. `language` must be the one that the index was written with."""

    def __init__(self, path: Path, language: str) -> None:
        try:
            index = tantivy.Index.open(str(path))
            index.config_reader("manual")
        except (ValueError, OSError) as error:
            raise DatasetError(f"{path} is not a Tantivy index ({error}); build the index again") from error
        self._schema = index.schema
        self._searcher = index.searcher()
        self._analyzer = _make_analyzer(language)

    def __len__(self) -> int:
        return int(self._searcher.num_docs)

    def search(
        self,
        query: str,
        limit: int,
        matching: RowNumbers | None = None,
        groups: Sequence[int] | None = None,
        min_log_prob: float | None = None,
        sort: Sort = "relevance",
    ) -> Hits:
        """Returns the best captions for a query.

        `matching` contains the row numbers to search, ascending; `groups` contains the facet groups to search. None
        does not restrict the search.
        """
        parsed = self._restrict(self._parse(query), groups, min_log_prob)
        if matching is None:
            return self._search(parsed, limit, sort)
        if len(matching) <= _MAX_TERM_SET:
            row_query = Query.const_score_query(Query.term_set_query(self._schema, "row", matching.tolist()), 0.0)
            return self._search(Query.boolean_query([(Occur.Must, parsed), (Occur.Must, row_query)]), limit, sort)
        fetched = limit
        while True:
            fetched = min(4 * fetched, max(1, len(self)))
            hits = self._search(parsed, fetched, sort)
            positions = np.searchsorted(matching, hits.rows).clip(max=len(matching) - 1)
            is_match = matching[positions] == hits.rows
            if np.count_nonzero(is_match) >= limit or len(hits) < fetched or fetched == len(self):
                return hits[is_match][:limit]

    def count_groups(self, query: str, groups: int, min_log_prob: float | None = None) -> npt.NDArray[np.int64]:
        """Counts the captions that match a query, by facet group, `[groups]`."""
        parsed = self._restrict(self._parse(query), None, min_log_prob)
        counts = np.zeros(groups, np.int64)
        if groups:
            aggregation = {"groups": {"terms": {"field": "group", "size": groups}}}
            for bucket in self._searcher.aggregate(parsed, aggregation)["groups"]["buckets"]:
                counts[int(bucket["key"])] = bucket["doc_count"]
        return counts

    def filter_hits(self, query: str, hits: Hits) -> Hits:
        """Returns the hits of another search whose captions contain every required word and no excluded word."""
        clauses = [clause for clause in self._parse_clauses(query) if clause.occur != Occur.Should]
        if not clauses or not len(hits):
            return hits
        rows = Query.const_score_query(Query.term_set_query(self._schema, "row", hits.rows.tolist()), 1.0)
        parts = [(clause.occur, self._to_query(clause.words)) for clause in clauses]
        kept = self._search(Query.boolean_query([(Occur.Must, rows), *parts]), len(hits), "relevance")
        return hits[np.isin(hits.rows, kept.rows)]

    def find_words(self, query: str, texts: Sequence[str]) -> list[list[tuple[int, int]]]:
        """Returns, for each text, the start and end (exclusive) of every word that a query searches for."""
        clauses = self._parse_clauses(query) if texts else ()
        words = {word for clause in clauses if clause.occur != Occur.MustNot for _, word in clause.words}
        return [
            [
                (token.char_offset_from, token.char_offset_to)
                for token in self._analyzer.pre_tokenize(text).tokens
                if token.text in words
            ]
            for text in texts
        ]

    def to_sentence(self, query: str) -> str:
        """Returns a query without `+`, `-`, quotation marks and excluded words."""
        return " ".join(phrase or word for sign, phrase, word in _find_clauses(query) if sign != "-")

    def suggest_query(self, query: str, find_captions: Callable[[RowNumbers], list[str]]) -> str | None:
        """Corrects the spelling of words that occur in no caption. Returns None if no word was corrected."""
        replacements: dict[str, str] = {}
        for clause in self._parse_clauses(query):
            for _, word in clause.words:
                if clause.occur != Occur.MustNot and not self._searcher.doc_freq("caption", word):
                    similar = self._find_similar_word(word, find_captions)
                    if similar is not None:
                        replacements[word] = similar
        parts, end = [], 0
        for token in self._analyzer.pre_tokenize(query).tokens:
            if token.text in replacements:
                parts += [query[end : token.char_offset_from], replacements[token.text]]
                end = token.char_offset_to
        return "".join([*parts, query[end:]]) if parts else None

    def _find_similar_word(self, word: str, find_captions: Callable[[RowNumbers], list[str]]) -> str | None:
        """Returns the most frequent word in captions that is similar to a stemmed word; None if there is none."""
        if len(word) < _MIN_CORRECTED_LENGTH:
            return None
        for distance in (1, 2):
            similar = Query.fuzzy_term_query(self._schema, "caption", word, distance)
            counts = Counter[str]()
            for caption in find_captions(self._search(similar, _CAPTIONS_PER_SUGGESTION, "relevance").rows):
                tokens = self._analyzer.pre_tokenize(caption).tokens
                spellings = {token.text: caption[token.char_offset_from : token.char_offset_to] for token in tokens}
                counts.update(spellings[match] for match in get_close_matches(word, spellings, 1, _MIN_SIMILARITY))
            if counts:
                return counts.most_common(1)[0][0].lower()
        return None

    def find_image(self, image_id: str) -> int | None:
        """Returns the row number of an image, or None if the image is not in the index."""
        hits = self._search(Query.term_query(self._schema, "image_id", image_id, "basic"), 1, "relevance")
        return int(hits.rows[0]) if len(hits) else None

    def _search(self, query: Query, limit: int, sort: Sort) -> Hits:
        if not limit:
            return Hits.empty()
        order_by = None if sort == "relevance" else sort
        limit = min(limit, max(1, len(self)))
        try:
            result: Any = self._searcher.search(query, limit, count=False, order_by_field=order_by)
        except ValueError as error:
            if order_by != "image_text_score":
                raise
            raise QueryError("the index has no image_text_score; build it again with --overwrite") from error
        hits = [hit for hit in result.hits if hit[0] is not None]  # captions may have no score
        rows = self._searcher.fast_field_values("row", [address for _, address in hits])
        return Hits(np.array(rows, np.int64), np.array([score for score, _ in hits], np.float32))

    def _restrict(self, query: Query, groups: Sequence[int] | None, min_log_prob: float | None) -> Query:
        conditions = []
        if groups is not None:
            conditions.append(Query.term_set_query(self._schema, "group", groups))
        if min_log_prob is not None:
            kind = tantivy.FieldType.Float
            conditions.append(Query.range_query(self._schema, "log_prob", kind, lower_bound=float(min_log_prob)))
        if not conditions:
            return query
        unscored = [(Occur.Must, Query.const_score_query(condition, 0.0)) for condition in conditions]
        return Query.boolean_query([(Occur.Must, query), *unscored])

    def _parse(self, query: str) -> Query:
        if not is_unicode(query):
            raise QueryError(f"text: expected valid Unicode, got {query!a:.200}; remove the lone surrogates")
        clauses = list(self._parse_clauses(query))
        if not clauses:
            raise QueryError(f"text: expected words to search for, got {query!r}; stop words such as `the` are ignored")
        if len(clauses) > _MAX_CLAUSES:
            raise QueryError(f"text: expected at most {_MAX_CLAUSES} words and phrases, got {len(clauses)}")
        parts = [(clause.occur, self._to_query(clause.words)) for clause in clauses]
        if all(clause.occur == Occur.MustNot for clause in clauses):
            parts.append((Occur.Must, Query.all_query()))
        return Query.boolean_query(parts)

    def _parse_clauses(self, query: str) -> Iterator[_Clause]:
        signs = {"+": Occur.Must, "-": Occur.MustNot, "": Occur.Should}
        for sign, phrase, word in _find_clauses(query):
            tokens = self._analyzer.pre_tokenize(phrase or word).tokens
            if tokens:
                yield _Clause(signs[sign], [(token.position, token.text) for token in tokens])

    def _to_query(self, words: list[tuple[int, str]]) -> Query:
        if len(words) == 1:
            return Query.term_query(self._schema, "caption", words[0][1])
        first = words[0][0]
        return Query.phrase_query(self._schema, "caption", [(position - first, word) for position, word in words])


def _find_clauses(query: str) -> list[tuple[str, str, str]]:
    """Returns the sign, phrase and word of each clause; the phrase or the word is empty."""
    clauses: list[tuple[str, str, str]] = _CLAUSE.findall(query.translate(_QUOTES))
    return clauses


def find_unclosed_phrase(query: str) -> str | None:
    """Returns the last phrase of a query if its closing quotation mark is missing, and otherwise None."""
    parts = query.translate(_QUOTES).split('"')
    return parts[-1].strip() or None if len(parts) % 2 == 0 else None
