"""SQL over a dataset, by DuckDB: strangers may ask, and can neither change the dataset nor reach outside it."""

import os
import signal
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

import duckdb
import pyarrow as pa

from captionlib.data.shards.dataset import ShardedDataset, open_dataset
from captionlib.data.shards.markers import FAILURES_FOLDER, part_name
from captionlib.data.shards.schemas import FAILURES_SCHEMA
from captionlib.errors import ConfigError, QueryError
from captionlib.search.dataset_files import DatasetFiles
from captionlib.search.statements import check_reads_only

__all__ = ["SqlLimits", "SqlSession", "connect", "lock", "open_captions", "open_sql", "query_sql"]

_BATCH_ROWS = 10_000

# Of a connection before it is locked: nothing is loaded, nothing of Python's variables or of the home folder is seen.
_ISOLATED = {
    "allow_community_extensions": False,
    "allow_persistent_secrets": False,
    "autoinstall_known_extensions": False,
    "autoload_known_extensions": False,
    "python_enable_replacements": False,
}


@dataclass(frozen=True)
class SqlLimits:
    """What a query may use.

    Attributes:
        memory: DuckDB's buffers, such as `500MB` or `8GB`; beyond it intermediate results go to disk.
        threads: None is one a core.
        spill: the most of them on disk.
    """

    memory: str = "2GB"
    threads: int | None = None
    spill: str = "20GB"


class SqlSession:
    """A dataset that takes questions. Made by `open_sql`.

    Attributes:
        dataset: what is asked.
        view: the name of its rows in SQL, which is its kind; its failures are `failures`.
    """

    def __init__(self, connection: duckdb.DuckDBPyConnection, dataset: ShardedDataset) -> None:
        self.dataset = dataset
        self.view = dataset.kind
        self._connection = connection

    def stream(self, sql: str, parameters: Sequence[Any] = ()) -> pa.RecordBatchReader:
        """The rows of one SELECT, in batches, as they are computed; to be read before the session ends.

        Args:
            sql: one statement; `?` or `$1` stand for the parameters.
            parameters: their values, which are never part of the SQL.

        Raises:
            QueryError: it is no SELECT, it asks for what is not there, or it fails; the last also while reading.
        """
        with _query_errors(self.view):
            check_reads_only(self._connection, sql)
            # Without parameters they must be None: only then do all versions of DuckDB stream.
            reader = self._connection.sql(sql, params=list(parameters) or None).to_arrow_reader(_BATCH_ROWS)
        return pa.RecordBatchReader.from_batches(reader.schema, _read(reader, self.view))

    def query(self, sql: str, parameters: Sequence[Any] = ()) -> pa.Table:
        """All rows of one SELECT; see `stream`."""
        return self.stream(sql, parameters).read_all()


@contextmanager
def open_sql(
    folder: str | os.PathLike[str], kind: str | None = None, limits: SqlLimits | None = None
) -> Iterator[SqlSession]:
    """Opens a dataset for SQL: its rows are a view named by its kind, its failed images the view `failures`.

    Only shards that are done are seen, so that a dataset may be asked while it is written.

    Args:
        folder: where it lies, on any file system of fsspec.
        kind: what it must be; None is any.
        limits: memory, threads and disk; None is the default.

    Raises:
        DatasetError: there is no such dataset.
        ConfigError: DuckDB does not understand the limits.
    """
    dataset = open_dataset(folder, kind)
    files, failures = _done_parts(dataset)
    with tempfile.TemporaryDirectory(prefix="captionlib-") as spill:
        connection = connect(limits or SqlLimits(), spill)
        try:
            disk = DatasetFiles(dataset.folder.fs, {**files, **failures})
            connection.register_filesystem(disk)
            lock(connection, disk.addresses)
            _create_view(connection, dataset.kind, disk.addresses[: len(files)], dataset.schema)
            _create_view(connection, "failures", disk.addresses[len(files) :], FAILURES_SCHEMA)
            with _stopped_by_ctrl_c(connection):
                yield SqlSession(connection, dataset)
        finally:
            connection.close()


def open_captions(
    folder: str | os.PathLike[str], limits: SqlLimits | None = None
) -> AbstractContextManager[SqlSession]:
    """`open_sql` for a captions dataset."""
    return open_sql(folder, "captions", limits)


def query_sql(
    folder: str | os.PathLike[str], sql: str, parameters: Sequence[Any] = (), limits: SqlLimits | None = None
) -> pa.Table:
    """Asks a dataset one SELECT and returns all its rows.

    Raises:
        DatasetError: there is no such dataset.
        QueryError: see `SqlSession.stream`.
    """
    with open_sql(folder, limits=limits) as session:
        return session.query(sql, parameters)


def _done_parts(dataset: ShardedDataset) -> tuple[dict[str, str], dict[str, str]]:
    """Names and paths of the data and of the failures of all shards that are done."""
    done = range(dataset.shards) if dataset.is_complete() else sorted(dataset.read_markers())
    with_failures = set(dataset.folder.list(FAILURES_FOLDER))
    parts = {f"{dataset.kind}/{part_name(shard)}.parquet": dataset.part_path(shard) for shard in done}
    names = [name for shard in done if (name := f"{part_name(shard)}.parquet") in with_failures]
    return parts, {f"failures/{name}": dataset.folder.path(f"{FAILURES_FOLDER}/{name}") for name in names}


def connect(limits: SqlLimits, spill: str) -> duckdb.DuckDBPyConnection:
    config: dict[str, Any] = {**_ISOLATED, "memory_limit": limits.memory, "temp_directory": spill}
    if limits.threads is not None:
        config["threads"] = limits.threads
    try:
        connection = duckdb.connect(config=config)
        # Given above it would be shown, but not kept to.
        connection.execute("SET max_temp_directory_size = ?", [limits.spill])
    except duckdb.Error as error:
        raise ConfigError(f"limits of the query: {error}") from error
    return connection


def lock(connection: duckdb.DuckDBPyConnection, addresses: Sequence[str]) -> None:
    """From here on only these files can be opened, and no setting can be changed."""
    connection.execute("SET allowed_paths = ?", [list(addresses)])
    connection.execute("SET enable_external_access = false")
    connection.execute("SET lock_configuration = true")


def _create_view(connection: duckdb.DuckDBPyConnection, name: str, addresses: Sequence[str], schema: pa.Schema) -> None:
    if addresses:
        connection.read_parquet(list(addresses)).create_view(name)
    else:
        connection.register(name, schema.empty_table())


def _read(reader: pa.RecordBatchReader, view: str) -> Iterator[pa.RecordBatch]:
    with _query_errors(view):
        yield from reader


@contextmanager
def _stopped_by_ctrl_c(connection: duckdb.DuckDBPyConnection) -> Iterator[None]:
    """Lets Ctrl-C stop a query at once: left to itself DuckDB waits until its threads are through with it."""
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        connection.interrupt()
        before(number, frame)

    signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _query_errors(view: str) -> Iterator[None]:
    """What DuckDB says, as a QueryError; Arrow and the file system wrap it in errors of their own."""
    try:
        yield
    except duckdb.CatalogException as error:
        raise QueryError(f"query: {error}\nThe dataset has the views {view} and failures.") from error
    except (duckdb.Error, pa.ArrowException, OSError) as error:
        raise QueryError(f"query: {error}") from error
    except RuntimeError as error:
        if "interrupted" in str(error):  # how DuckDB passes Ctrl-C on
            raise KeyboardInterrupt from error
        raise
