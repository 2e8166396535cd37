"""Common queries, for callers who do not want to write SQL. Arguments become SQL parameters, never part of the SQL.

All functions except `find_image` raise QueryError if the dataset does not contain captions.
"""

import re

import pyarrow as pa

from captionlib.errors import QueryError
from captionlib.search.sql.session import SqlSession

__all__ = ["count_words", "find_captions", "find_image", "find_top_captions"]

# Letters, numbers and accents are part of a word: `man` matches neither `woman` nor `mané`. RE2's \b is ASCII only.
_WORD_START = r"(?i)(?:^|[^\pL\pN\pM])"
_WORD_END = r"(?:$|[^\pL\pN\pM])"


def find_image(session: SqlSession, image_id: str) -> pa.Table:
    """Returns the row of one image from a dataset of any kind, or its rows from several datasets.

    Bloom filters in the Parquet files let DuckDB skip most row groups.
    """
    view = session.view.replace('"', '""')
    rows = session.query(f'SELECT * FROM "{view}" WHERE image_id = ?', [image_id])
    if rows.num_rows:
        return rows
    failures = session.query("SELECT stage, error, message FROM failures WHERE image_id = ?", [image_id])
    for failure in failures.to_pylist():
        reason = f"{failure['error']}: {failure['message']}"
        raise QueryError(
            f"{session.folders}: image {image_id} has no row: it failed at stage {failure['stage']} with {reason}"
        )
    raise QueryError(f"{session.folders}: no image {image_id}; image ids must match exactly")


def find_captions(session: SqlSession, words: str, limit: int | None = None) -> pa.RecordBatchReader:
    """Returns the captions that contain all words, in any order, ignoring case, most probable first."""
    patterns = [_WORD_START + re.escape(word) + _WORD_END for word in words.split()]
    if not patterns:
        raise QueryError("words to search for: expected one or more, got none")
    where = " AND ".join(["regexp_matches(caption, ?)"] * len(patterns))
    return _stream_captions(session, f"WHERE {where}", patterns, limit)


def find_top_captions(session: SqlSession, limit: int) -> pa.RecordBatchReader:
    return _stream_captions(session, "", [], limit)


def count_words(session: SqlSession, limit: int) -> pa.RecordBatchReader:
    """Returns the most frequent words of the captions with their counts."""
    _require_captions(session)
    sql = """
        SELECT word, count(*) AS count
        FROM (SELECT unnest(string_split(lower(caption), ' ')) AS word FROM captions)
        WHERE word <> ''
        GROUP BY word ORDER BY count DESC, word LIMIT ?
    """
    return session.stream(sql, [limit])


def _stream_captions(session: SqlSession, where: str, parameters: list[str], limit: int | None) -> pa.RecordBatchReader:
    _require_captions(session)
    sql = f"SELECT image_id, caption, log_prob, uri FROM captions {where} ORDER BY log_prob DESC, image_id"
    return session.stream(sql, parameters) if limit is None else session.stream(f"{sql} LIMIT ?", [*parameters, limit])


def _require_captions(session: SqlSession) -> None:
    if session.view != "captions":
        raise QueryError(
            f"{session.folders}: expected a dataset of kind captions, got {session.view}; query it with SQL"
        )
