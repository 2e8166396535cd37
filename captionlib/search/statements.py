"""Tells statements that only read from all others, by DuckDB's own parser."""

import json
from collections.abc import Iterator
from typing import Any

import duckdb

from captionlib.errors import QueryError

__all__ = ["check_reads_only"]

_ALLOWED_TABLE_FUNCTIONS = frozenset({"generate_series", "json_each", "json_tree", "range", "repeat", "unnest"})
_ALLOWED_NODES = frozenset({"CTE_NODE", "RECURSIVE_CTE_NODE", "SELECT_NODE", "SET_OPERATION_NODE"})


def check_reads_only(connection: duckdb.DuckDBPyConnection, sql: str) -> None:
    """Passes one SELECT (also DESCRIBE, SHOW, SUMMARIZE, VALUES, FROM) that calls no function which reaches outside.

    DuckDB's configuration already keeps a statement from files and settings. This also refuses what that does not
    cover, such as `enable_logging(storage_path=...)`, and anything that a later DuckDB may add.

    Raises:
        QueryError: it is something else, or cannot be parsed.
    """
    try:
        statements = connection.extract_statements(sql)
        if len(statements) != 1:
            raise QueryError(
                f"query: expected one SELECT statement, got {len(statements)} statements; give one at a time"
            )
        if statements[0].type != duckdb.StatementType.SELECT:
            kind = str(statements[0].type).rpartition(".")[-1]
            raise QueryError(f"query: expected a SELECT statement, got {kind}; the dataset can only be read")
        (row,) = connection.execute("SELECT json_serialize_sql(?)", [sql]).fetchall()
    except duckdb.Error as error:
        raise QueryError(f"query: {error}") from error
    try:
        nodes = list(_nodes(json.loads(row[0])))
    except RecursionError as error:
        raise QueryError("query: it is nested too deeply; write it with fewer levels") from error
    for node in nodes:
        _check_node(node)


def _check_node(node: dict[str, Any]) -> None:
    kind = node.get("type")
    if kind == "TABLE_FUNCTION" and (name := node["function"]["function_name"]) not in _ALLOWED_TABLE_FUNCTIONS:
        known = ", ".join(sorted(_ALLOWED_TABLE_FUNCTIONS))
        raise QueryError(f"query: the table function {name} is not allowed here; allowed are {known}")
    if isinstance(kind, str) and kind.endswith("_NODE") and kind not in _ALLOWED_NODES:
        raise QueryError(f"query: expected only SELECT, got {kind.split('_')[0]} inside; the dataset can only be read")


def _nodes(tree: Any) -> Iterator[dict[str, Any]]:
    """All mappings of a parsed statement, outer ones first."""
    waiting = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, dict):
            yield node
            waiting.extend(node.values())
        elif isinstance(node, list):
            waiting.extend(node)
