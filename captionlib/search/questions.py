"""Questions that need no SQL; what is asked for is always a parameter, never part of a statement."""

import re

import pyarrow as pa

from captionlib.errors import QueryError
from captionlib.search.sql import SqlSession

__all__ = ["count_words", "find_captions", "find_image", "most_likely"]

# Letters, numbers and accents belong to a word: `man` is neither in `woman` nor in `mané`. RE2's \b knows ASCII alone.
_WORD_START = r"(?i)(?:^|[^\pL\pN\pM])"
_WORD_END = r"(?:$|[^\pL\pN\pM])"


def find_image(session: SqlSession, image_id: str) -> pa.Table:
    """The row of one image, in a dataset of any kind.

    The bloom filters of the Parquet files tell which row groups can hold it, the others are not read.

    Raises:
        QueryError: there is no such image, or it failed; the message has the reason.
    """
    view = session.view.replace('"', '""')
    found = session.query(f'SELECT * FROM "{view}" WHERE image_id = ?', [image_id])
    if found.num_rows:
        return found
    where = session.dataset.folder.uri
    for failure in session.query(
        "SELECT stage, error, message FROM failures WHERE image_id = ?", [image_id]
    ).to_pylist():
        reason = f"{failure['error']}: {failure['message']}"
        raise QueryError(f"{where}: image {image_id} has no row, it failed at {failure['stage']} with {reason}")
    raise QueryError(f"{where}: no image {image_id}; ids are matched exactly")


def find_captions(session: SqlSession, words: str, limit: int | None = None) -> pa.RecordBatchReader:
    """The captions that contain all of these words, in any order, case apart; the most likely first.

    Raises:
        QueryError: there are no words, or it is no captions dataset.
    """
    patterns = [_WORD_START + re.escape(word) + _WORD_END for word in words.split()]
    if not patterns:
        raise QueryError("contains: expected one or more words, got none")
    where = " AND ".join(["regexp_matches(caption, ?)"] * len(patterns))
    return _captions(session, f"WHERE {where}", patterns, limit)


def most_likely(session: SqlSession, limit: int) -> pa.RecordBatchReader:
    """The captions with the highest log-probability.

    Raises:
        QueryError: it is no captions dataset.
    """
    return _captions(session, "", [], limit)


def count_words(session: SqlSession, limit: int) -> pa.RecordBatchReader:
    """The most frequent words of the captions, and how often each occurs.

    Raises:
        QueryError: it is no captions dataset.
    """
    _require_captions(session)
    sql = """
        SELECT word, count(*) AS count
        FROM (SELECT unnest(string_split(lower(caption), ' ')) AS word FROM captions)
        WHERE word <> ''
        GROUP BY word ORDER BY count DESC, word LIMIT ?
    """
    return session.stream(sql, [limit])


def _captions(session: SqlSession, where: str, parameters: list[str], limit: int | None) -> pa.RecordBatchReader:
    _require_captions(session)
    sql = f"SELECT image_id, caption, log_prob, uri FROM captions {where} ORDER BY log_prob DESC, image_id"
    return session.stream(sql, parameters) if limit is None else session.stream(f"{sql} LIMIT ?", [*parameters, limit])


def _require_captions(session: SqlSession) -> None:
    if session.view != "captions":
        raise QueryError(
            f"{session.dataset.folder.uri}: expected a dataset of kind captions for this question, got {session.view}; "
            "ask it by SQL"
        )
