"""Attempts to reach outside a dataset, or to change it, with SQL."""

import hashlib
from pathlib import Path

import duckdb
import pytest

from captionlib.errors import QueryError
from captionlib.search.sql.file_system import DatasetFile, DatasetFileSystem
from captionlib.search.sql.session import open_sql, query_sql
from captionlib.search.sql.statements import _REFUSED_FUNCTIONS

SECRET = "the secret"


@pytest.fixture
def outside(local: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Makes a folder with a secret the working directory, and links to the secret from inside the dataset."""
    folder = tmp_path / "outside"
    folder.mkdir()
    (folder / "secret.csv").write_text(f"{SECRET}\n")
    (Path(local) / "link.csv").symlink_to(folder / "secret.csv")
    (Path(local) / "part-00007.parquet").symlink_to(folder / "secret.csv")
    monkeypatch.chdir(folder)
    return folder


READS = [
    "SELECT * FROM read_csv('{outside}/secret.csv')",
    "SELECT * FROM '{outside}/secret.csv'",
    "SELECT * FROM 'secret.csv'",
    "SELECT * FROM read_text('file://{outside}/secret.csv')",
    "SELECT * FROM read_blob('{local}/../outside/secret.csv')",
    "SELECT * FROM read_text('{local}/link.csv')",
    "SELECT * FROM read_parquet('{local}/part-*.parquet')",
    "SELECT * FROM read_text('{local}/_dataset.json')",
    "SELECT * FROM read_text('dataset://captions/../../outside/secret.csv')",
    "SELECT * FROM read_parquet('dataset://captions/part-00002.parquet')",
    "SELECT * FROM read_parquet('dataset://*/*')",
    "SELECT * FROM glob('/*')",
    "SELECT * FROM read_text('/proc/self/environ')",
    "SELECT * FROM read_text('/dev/stdin')",
    "SELECT * FROM read_csv('https://127.0.0.1:1/x.csv')",
    "SELECT * FROM 's3://bucket/x.parquet'",
    "SELECT * FROM query('SELECT * FROM read_text(''secret.csv'')')",
    "SELECT * FROM query_table('secret.csv')",
    "SELECT (SELECT content FROM read_text('secret.csv'))",
    "DESCRIBE SELECT * FROM read_csv('secret.csv')",
    "SELECT * FROM captions ORDER BY (SELECT content FROM read_text('secret.csv'))",
    "WITH c AS MATERIALIZED (FROM read_text('secret.csv')) FROM c",
    "SELECT * FROM parquet_metadata('{local}/part-00000.parquet')",
    "SELECT * FROM sniff_csv('secret.csv')",
    "SELECT * FROM read_duckdb('secret.csv')",
    "SELECT * FROM local_variable",
    "SELECT * FROM duckdb_secrets()",
    "SELECT getenv('HOME')",
    "SELECT * FROM pandas_scan(0)",
    "SELECT * FROM arrow_scan(0, 0, 0)",
]

CHANGES = [
    "COPY captions TO '{outside}/x.csv'",
    "COPY (SELECT 1) TO 'dataset://captions/part-00000.parquet' (FORMAT parquet)",
    "COPY (SELECT 1) TO '{local}/part-00000.parquet' (FORMAT parquet)",
    "WITH x AS (COPY (SELECT 1) TO '{outside}/x.csv') SELECT 1",
    "WITH x AS (DELETE FROM captions RETURNING *) FROM x",
    "EXPLAIN ANALYZE COPY captions TO '{outside}/x.csv'",
    "EXPORT DATABASE '{outside}/db'",
    "IMPORT DATABASE '{outside}'",
    "ATTACH '{outside}/x.db'",
    "ATTACH 'dataset://captions/part-00000.parquet' AS x",
    "INSTALL httpfs",
    "LOAD httpfs",
    "LOAD '{outside}/x.duckdb_extension'",
    "CREATE TABLE t AS SELECT 1",
    "CREATE PERSISTENT SECRET (TYPE s3, KEY_ID 'x', SECRET 'y')",
    "CREATE OR REPLACE VIEW captions AS SELECT 1",
    "DROP VIEW captions",
    "INSERT INTO captions VALUES (1)",
    "SET enable_external_access = true",
    "SET lock_configuration = false",
    "RESET memory_limit",
    "SET threads = 99",
    "PRAGMA enable_profiling = 'json'",
    "PRAGMA import_database('{outside}')",
    "CALL enable_logging(storage_path = '{outside}/log')",
    "SELECT * FROM enable_logging(storage = 'file', storage_path = '{outside}/log')",
    "SELECT * FROM force_checkpoint()",
    "SELECT 1; COPY captions TO '{outside}/x.csv'",
    "PREPARE p AS COPY captions TO '{outside}/x.csv'",
    "USE memory",
    "CHECKPOINT",
    "VACUUM",
    "BEGIN",
]


def hash_files(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.mark.parametrize("sql", READS + CHANGES)
def test_sql_reaches_nothing_outside_and_changes_nothing(local: str, outside: Path, sql: str) -> None:
    local_variable = [[SECRET]]
    before = hash_files(outside.parent)
    with open_sql(local) as session:
        with pytest.raises(QueryError) as rejected:
            session.query(sql.format(outside=outside, local=local))
        assert session.query("SELECT count(*) AS n FROM captions")["n"].to_pylist() == [4]
    assert SECRET not in str(rejected.value)
    assert hash_files(outside.parent) == before
    assert local_variable


@pytest.mark.parametrize("sql", [sql for sql in READS + CHANGES if "enable_logging" not in sql])
def test_restricted_connection_alone_prevents_file_access(local: str, outside: Path, sql: str) -> None:
    before = hash_files(outside.parent)
    with open_sql(local) as session:
        try:
            output = str(session._connection.execute(sql.format(outside=outside, local=local)).fetchall())
        except duckdb.Error as error:
            output = str(error)
    assert SECRET not in output
    assert hash_files(outside.parent) == before


SETTINGS = [
    "SELECT current_setting('http_proxy')",
    "SELECT Current_Setting('http_proxy')",
    "SELECT system.main.current_setting('http_proxy')",
    "SELECT 'http_proxy'.current_setting()",
    "SELECT list_transform([1], lambda k: current_setting('http_proxy'))",
    "FROM captions WHERE caption = (SELECT current_setting('http_proxy'))",
    "SELECT getvariable('x')",
    "SHOW http_proxy",
    "FROM pg_settings",
    "FROM PG_CATALOG.PG_SETTINGS",
    "SUMMARIZE pg_settings",
    "FROM (WITH pg_settings AS (SELECT 1) FROM pg_settings), pg_settings",
    "FROM duckdb_settings()",
    "FROM duckdb_databases",
    "SELECT sleep_ms(1)",
    "SELECT pg_sleep(1)",
]


@pytest.mark.parametrize("sql", SETTINGS)
def test_sql_does_not_read_settings(local: str, monkeypatch: pytest.MonkeyPatch, sql: str) -> None:
    """DuckDB copies the proxy and its password from the environment."""
    monkeypatch.setenv("HTTP_PROXY", f"http://user:{SECRET}@127.0.0.1:1")
    with pytest.raises(QueryError, match=r"not allowed|is not a view of the dataset; expected captions or failures"):
        query_sql(local, sql)


# Functions that are not pure, but neither read settings nor wait.
REVIEWED_FUNCTIONS = frozenset(
    {"current_connection_id", "current_database", "current_date", "current_query", "current_query_id"}
    | {"current_schema", "current_schemas", "current_transaction_id", "error", "gen_random_uuid", "get_current_time"}
    | {"get_current_timestamp", "in_search_path", "now", "random", "setseed", "stats", "today", "transaction_timestamp"}
    | {"txid_current", "uuid", "uuidv4", "uuidv7", "vector_type", "current_localtime", "current_localtimestamp"}
)


def test_every_function_with_side_effects_is_refused_or_reviewed() -> None:
    """Fails if a new version of DuckDB adds such a function."""
    with duckdb.connect() as connection:
        sql = "SELECT function_name FROM duckdb_functions() WHERE stability <> 'CONSISTENT' OR has_side_effects"
        names = {name for (name,) in connection.execute(sql).fetchall()}
    assert names - REVIEWED_FUNCTIONS <= _REFUSED_FUNCTIONS


def test_file_system_is_read_only_and_holds_only_its_files(tmp_path: Path) -> None:
    import fsspec

    (tmp_path / "a").write_bytes(b"0123456789")
    (tmp_path / "b").write_bytes(b"other")
    files = DatasetFileSystem({"dataset://captions/a": DatasetFile(fsspec.filesystem("file"), str(tmp_path / "a"))})
    file = files.open("captions/a")
    assert (file.seek(2), file.read(3), file.tell(), file.read(), file.read()) == (2, b"234", 5, b"56789", b"")
    assert (file.seek(-1, 2), file.read(5)) == (9, b"9")
    assert files.glob("dataset://captions/*") == []
    for mode in ("wb", "ab", "r+b"):
        with pytest.raises(PermissionError, match="read-only"):
            files.open("dataset://captions/a", mode)
    for path in ("dataset://captions/b", str(tmp_path / "b"), "dataset://captions/../b"):
        assert not files.exists(path)
        with pytest.raises(FileNotFoundError, match="not a file of the dataset"):
            files.open(path)


def test_other_connections_are_not_affected(local: str) -> None:
    with open_sql(local), duckdb.connect() as other:
        assert other.execute("SELECT current_setting('enable_external_access')").fetchall() == [(True,)]
