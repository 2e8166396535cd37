"""Conditions of SQL over the rows of an index, by DuckDB."""

import tempfile
from collections.abc import Sequence
from typing import Any

import duckdb
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from captionlib.errors import QueryError
from captionlib.search.sql import SqlLimits, connect, lock
from captionlib.search.statements import check_reads_only

__all__ = ["Conditions"]


class Conditions:
    """Rows that take conditions. Safe to use from many threads.

    Args:
        rows: of an index, with their numbers in the column `row`.
    """

    def __init__(self, rows: pa.Table) -> None:
        self._spill = tempfile.TemporaryDirectory(prefix="captionlib-")
        self._connection = connect(SqlLimits(), self._spill.name)
        lock(self._connection, [])
        self._rows = rows
        self._columns = [name for name in rows.schema.names if name != "row"]

    def passing(self, where: str, parameters: Sequence[Any] = ()) -> npt.NDArray[np.int64]:
        """The numbers of the rows that a condition holds for, rising.

        Args:
            where: what stands behind WHERE; `?` stand for the parameters.
            parameters: their values.

        Raises:
            QueryError: it is no condition, or it fails.
        """
        # On lines of its own: a comment at its end hides nothing.
        sql = f"SELECT row FROM captions WHERE (\n{where}\n) ORDER BY row"
        try:
            cursor = self._connection.cursor()
            cursor.register("captions", self._rows)  # what is registered belongs to a cursor
            check_reads_only(cursor, sql)
            found = cursor.execute(sql, list(parameters)).fetchnumpy()["row"]
        except (duckdb.Error, QueryError) as error:
            message = str(error).removeprefix("query: ")
            raise QueryError(
                f"where: {message}\nExpected a condition over {', '.join(self._columns)}, "
                "such as: split = 'val' AND log_prob > -10"
            ) from error
        return np.ascontiguousarray(np.ma.getdata(found), np.int64)
