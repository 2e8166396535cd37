"""Rejects SQL statements that do more than read the dataset, using DuckDB's parser."""

import json
import re
from collections.abc import Iterator, Set
from typing import Any

import duckdb

from captionlib.errors import QueryError

__all__ = ["check_condition", "check_reads_only", "to_query_error"]

_ALLOWED_TABLE_FUNCTIONS = frozenset({"generate_series", "json_each", "json_tree", "range", "repeat", "unnest"})
_ALLOWED_NODES = frozenset({"CTE_NODE", "RECURSIVE_CTE_NODE", "SELECT_NODE", "SET_OPERATION_NODE"})

# These functions read settings and variables, sleep, write to the log or change sequences.
_REFUSED_FUNCTIONS = frozenset(
    {"current_setting", "currval", "getenv", "getvariable", "nextval", "pg_sleep", "setval", "sleep_ms", "write_log"}
)

# Matches a Python stack trace in the text of an error. Group 1 is the message of the exception.
_STACK_TRACE = re.compile(r"Traceback \(most recent call last\):\n(?:  .*\n)*[\w.]+: (.*)")


def check_reads_only(connection: duckdb.DuckDBPyConnection, sql: str) -> None:
    """Checks that SQL is one SELECT (or DESCRIBE, SHOW, SUMMARIZE, VALUES, FROM) with only safe table functions.

    The configuration of the connection already blocks access to files. This check also rejects functions that it does
    not block, such as `enable_logging(storage_path=...)`, and everything that reads settings, because they can contain
    secrets: DuckDB copies the password of a proxy from the environment.
    """
    try:
        statements = connection.extract_statements(sql)
        if len(statements) != 1:
            raise QueryError(f"query: expected one SELECT statement, got {len(statements)} statements")
        if statements[0].type != duckdb.StatementType.SELECT:
            kind = str(statements[0].type).rpartition(".")[-1]
            raise QueryError(f"query: expected a SELECT statement, got {kind}; the dataset is read-only")
        (row,) = connection.execute("SELECT json_serialize_sql(?)", [sql]).fetchall()
        views = connection.execute("SELECT lower(view_name), internal, schema_name FROM duckdb_views()").fetchall()
    except duckdb.Error as error:
        raise to_query_error(error) from error
    try:
        nodes = list(_walk_nodes(json.loads(row[0])))
    except RecursionError as error:
        raise QueryError("query: nested too deeply; rewrite it with fewer levels") from error
    system_views = {name for name, internal, schema in views if internal and schema != "information_schema"}
    dataset_views = {name for name, internal, _ in views if not internal}
    for node in nodes:
        _check_node(node)
        _check_views(node, system_views, dataset_views)


def _check_node(node: dict[str, Any]) -> None:
    kind = node.get("type")
    if kind == "FUNCTION" and (name := node["function_name"].lower()) in _REFUSED_FUNCTIONS:
        raise QueryError(f"query: function {name} is not allowed; a query reads only the dataset")
    if kind == "TABLE_FUNCTION" and (name := node["function"]["function_name"]) not in _ALLOWED_TABLE_FUNCTIONS:
        allowed = ", ".join(sorted(_ALLOWED_TABLE_FUNCTIONS))
        raise QueryError(f"query: table function {name} is not allowed; expected one of {allowed}")
    if isinstance(kind, str) and kind.endswith("_NODE") and kind not in _ALLOWED_NODES:
        raise QueryError(f"query: expected only SELECT, got a nested {kind.split('_')[0]}; the dataset is read-only")


def _check_views(node: dict[str, Any], system_views: Set[str], dataset_views: Set[str]) -> None:
    """Rejects system views, such as `pg_settings`, and `SHOW` with the name of a setting."""
    kind, name = node.get("type"), str(node.get("table_name")).lower()
    is_setting = kind == "SHOW_REF" and node["show_type"] == "SHOW" and name not in dataset_views
    if is_setting or (kind == "BASE_TABLE" and name in system_views):
        raise QueryError(f"query: {name} is not a view of the dataset; expected {' or '.join(sorted(dataset_views))}")


def check_condition(connection: duckdb.DuckDBPyConnection, condition: str) -> None:
    """Raises duckdb.Error if SQL is not one expression, such as `true) UNION (SELECT 1`.

    `check_reads_only` must still check the statement that contains it.
    """
    # The line break ends a comment at the end of the condition. The brackets reject `1) FROM a WHERE (1`.
    connection.extract_statements(f"SELECT [(\n{condition}\n)]")


def _walk_nodes(tree: Any) -> Iterator[dict[str, Any]]:
    stack = [tree]
    while stack:
        node = stack.pop()
        if isinstance(node, dict):
            yield node
            stack.extend(node.values())
        elif isinstance(node, list):
            stack.extend(node)


def to_query_error(error: Exception) -> QueryError:
    """Converts a DuckDB error. Keeps only its description, as one line, without SQL, advice and stack traces."""
    raised = _STACK_TRACE.search(str(error))
    description, _, _ = (raised[1] if raised else str(error)).partition("\n\n")
    return QueryError(f"query: {' '.join(description.split())}")
