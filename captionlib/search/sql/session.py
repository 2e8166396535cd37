"""Opens a dataset for SQL in a DuckDB connection that cannot change the dataset or access anything else."""

import os
import signal
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

import duckdb
import pyarrow as pa
from pydantic import ByteSize, TypeAdapter, ValidationError

from captionlib.data.shards.dataset import ShardedDataset, open_dataset
from captionlib.data.shards.markers import FAILURES_FOLDER, part_name
from captionlib.data.shards.schemas import FAILURES_SCHEMA
from captionlib.errors import ConfigError, QueryError
from captionlib.search.sql.file_system import DatasetFileSystem
from captionlib.search.sql.statements import check_reads_only, describe_error

__all__ = ["SqlLimits", "SqlSession", "connect", "lock_connection", "open_sql", "query_sql"]

_BATCH_ROWS = 10_000

# Disables extensions, access to Python variables, and secrets stored in the home folder.
_ISOLATION = {
    "allow_community_extensions": False,
    "allow_persistent_secrets": False,
    "autoinstall_known_extensions": False,
    "autoload_known_extensions": False,
    "python_enable_replacements": False,
}


@dataclass(frozen=True)
class SqlLimits:
    """The resources that a query may use.

    Attributes:
        memory: the memory limit, such as `500MB` or `8GB`; larger intermediate results are spilled to disk.
        threads: the number of threads. If None, one per core.
        spill: the maximum size of spilled intermediate results.
    """

    memory: str = "2GB"
    threads: int | None = None
    spill: str = "20GB"

    @property
    def memory_bytes(self) -> int:
        """The memory limit in bytes.

        Raises:
            ConfigError: the memory limit is not a size.
        """
        try:
            return int(TypeAdapter(ByteSize).validate_python(self.memory))
        except ValidationError as error:
            raise ConfigError(f"memory: expected a size such as 500MB or 8GB, got {self.memory!r}") from error


class SqlSession:
    """A dataset opened for SQL by `open_sql`.

    Attributes:
        view: the name of the view over the rows, which is the kind of the dataset, such as `captions`.
    """

    def __init__(self, connection: duckdb.DuckDBPyConnection, dataset: ShardedDataset) -> None:
        self.dataset = dataset
        self.view = dataset.kind
        self._connection = connection

    def stream(self, sql: str, parameters: Sequence[Any] = ()) -> pa.RecordBatchReader:
        """Runs one SELECT and streams its rows in batches, which must be read before the session ends.

        `?` and `$1` are placeholders for parameters, whose values are never parsed as SQL.

        Raises:
            QueryError: the statement is not a valid SELECT, or it fails, possibly while its rows are read.
        """
        with _raise_query_errors(self.view):
            check_reads_only(self._connection, sql)
            # Some versions of DuckDB stream only if `params` is None rather than empty.
            reader = self._connection.sql(sql, params=list(parameters) or None).to_arrow_reader(_BATCH_ROWS)

        def read_batches() -> Iterator[pa.RecordBatch]:
            with _raise_query_errors(self.view):
                yield from reader

        return pa.RecordBatchReader.from_batches(reader.schema, read_batches())

    def query(self, sql: str, parameters: Sequence[Any] = ()) -> pa.Table:
        """Runs one SELECT and returns all its rows; see `stream`."""
        return self.stream(sql, parameters).read_all()


@contextmanager
def open_sql(
    folder: str | os.PathLike[str], kind: str | None = None, limits: SqlLimits = SqlLimits()
) -> Iterator[SqlSession]:
    """Opens a dataset for SQL, with its rows in a view named after its kind, such as `captions`.

    The view `failures` contains the images that could not be processed. A dataset can be queried while it is being
    written, because the views contain only complete shards.

    Raises:
        DatasetError: the folder is not a dataset of the given kind.
        ConfigError: DuckDB rejects the limits.
    """
    dataset = open_dataset(folder, kind)
    parts, failures = _list_files(dataset)
    with tempfile.TemporaryDirectory(prefix="captionlib-") as spill, closing(connect(limits, spill)) as connection:
        files = DatasetFileSystem(dataset.folder.fs, {**parts, **failures})
        connection.register_filesystem(files)
        lock_connection(connection, files.addresses)
        _create_view(connection, dataset.kind, files.addresses[: len(parts)], dataset.schema)
        _create_view(connection, "failures", files.addresses[len(parts) :], FAILURES_SCHEMA)
        with _interrupt_on_ctrl_c(connection):
            yield SqlSession(connection, dataset)


def query_sql(
    folder: str | os.PathLike[str], sql: str, parameters: Sequence[Any] = (), limits: SqlLimits = SqlLimits()
) -> pa.Table:
    """Runs one SELECT over a dataset and returns all its rows.

    The query runs in this process, without a time limit, and some functions of DuckDB exceed the memory limit. For
    untrusted SQL, use the command `captionlib query`, which runs it in a process that it can kill.

    Example:
        >>> captionlib.query_sql("captions", "SELECT count(*) AS images FROM captions").to_pylist()
        [{'images': 26}]

    Args:
        folder: the dataset. The query refers to it by its kind, such as `captions`.
        sql: the statement.
        parameters: values for the placeholders (`?`) of the statement.
        limits: limits on memory, threads and temporary disk space.

    Raises:
        DatasetError: the folder is not a dataset.
        QueryError: see `SqlSession.stream`.
    """
    with open_sql(folder, limits=limits) as session:
        return session.query(sql, parameters)


def connect(limits: SqlLimits, spill: str) -> duckdb.DuckDBPyConnection:
    """Opens an isolated in-memory database that spills intermediate results to a folder.

    Raises:
        ConfigError: DuckDB rejects the limits.
    """
    config: dict[str, Any] = {**_ISOLATION, "memory_limit": limits.memory, "temp_directory": spill}
    if limits.threads is not None:
        config["threads"] = limits.threads
    try:
        connection = duckdb.connect(config=config)
        # DuckDB shows this setting but does not apply it if it is part of the initial configuration.
        connection.execute("SET max_temp_directory_size = ?", [limits.spill])
    except duckdb.Error as error:
        raise ConfigError(f"query limits: {error}") from error
    return connection


def lock_connection(connection: duckdb.DuckDBPyConnection, addresses: Sequence[str]) -> None:
    """Restricts a connection to files at these addresses and locks its settings."""
    connection.execute("SET allowed_paths = ?", [list(addresses)])
    connection.execute("SET enable_external_access = false")
    connection.execute("SET lock_configuration = true")


def _list_files(dataset: ShardedDataset) -> tuple[dict[str, str], dict[str, str]]:
    """Returns the names and paths of the data files and of the failure files of all complete shards."""
    done = range(dataset.shards) if dataset.is_complete() else sorted(dataset.read_markers())
    failure_files = set(dataset.folder.list(FAILURES_FOLDER))
    parts = {f"{dataset.kind}/{part_name(shard)}.parquet": dataset.part_path(shard) for shard in done}
    names = [name for shard in done if (name := f"{part_name(shard)}.parquet") in failure_files]
    return parts, {f"failures/{name}": dataset.folder.path(f"{FAILURES_FOLDER}/{name}") for name in names}


def _create_view(connection: duckdb.DuckDBPyConnection, name: str, addresses: Sequence[str], schema: pa.Schema) -> None:
    if addresses:
        connection.read_parquet(list(addresses)).create_view(name)
    else:
        connection.register(name, schema.empty_table())


@contextmanager
def _interrupt_on_ctrl_c(connection: duckdb.DuckDBPyConnection) -> Iterator[None]:
    """Makes Ctrl-C interrupt a running query; by default DuckDB completes the query first."""
    previous = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(previous):
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        connection.interrupt()
        previous(number, frame)

    signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


@contextmanager
def _raise_query_errors(view: str) -> Iterator[None]:
    """Converts DuckDB errors to QueryError, even if Arrow or the file system has wrapped them."""
    try:
        yield
    except duckdb.CatalogException as error:
        raise QueryError(f"{describe_error(error)} The dataset has the views {view} and failures.") from error
    except (duckdb.Error, pa.ArrowException, OSError) as error:
        raise describe_error(error) from error
    except RuntimeError as error:
        if "interrupted" in str(error):  # DuckDB's message after Ctrl-C
            raise KeyboardInterrupt from error
        raise
