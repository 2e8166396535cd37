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

from captionlib.data.selection import read_kept_images
from captionlib.data.shards.dataset import ShardedDataset, open_dataset
from captionlib.data.shards.markers import FAILURES_FOLDER, part_name
from captionlib.data.shards.schemas import FAILURES_SCHEMA
from captionlib.errors import ConfigError, QueryError
from captionlib.search.sql.file_system import DatasetFile, DatasetFileSystem
from captionlib.search.sql.statements import check_condition, check_reads_only, to_query_error
from captionlib.storage.folders import Addresses, list_addresses

__all__ = ["SqlLimits", "SqlSession", "connect", "open_sql", "query_sql", "restrict_connection"]

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
        memory: memory limit, such as `500MB` or `8GB`. Larger intermediate results are spilled to disk.
        threads: number of threads. If None, one thread per core is used.
        spill: maximum size of the intermediate results on disk.
    """

    memory: str = "2GB"
    threads: int | None = None
    spill: str = "20GB"

    @property
    def memory_bytes(self) -> int:
        try:
            return int(TypeAdapter(ByteSize).validate_python(self.memory))
        except ValidationError as error:
            raise ConfigError(f"memory: expected a size such as 500MB or 8GB, got {self.memory!r}") from error


class SqlSession:
    """One or more datasets of the same kind, opened for SQL by `open_sql`."""

    def __init__(self, connection: duckdb.DuckDBPyConnection, datasets: Sequence[ShardedDataset]) -> None:
        self.view = datasets[0].kind  # the name of the view over the rows is the kind, such as `captions`
        self.folders = " and ".join(dataset.folder.uri for dataset in datasets)  # for error messages
        self._connection = connection

    def stream(self, sql: str, parameters: Sequence[Any] = ()) -> pa.RecordBatchReader:
        """Runs one SELECT and streams its rows in batches. The rows must be read before the session ends.

        `?` and `$1` are placeholders for `parameters`. Parameter values are never parsed as SQL.

        Raises:
            QueryError: the statement is not a valid SELECT, or it fails. Reading the rows may also raise it.
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

    def find_matching(self, where: str) -> frozenset[str]:
        """Returns the ids of the images that match a SQL condition over the columns of the view."""
        view = self.view.replace('"', '""')
        try:
            with _raise_query_errors(self.view):
                check_condition(self._connection, where)
            # The condition is on its own line, so that a comment at its end does not hide the closing parenthesis.
            batches = self.stream(f'SELECT image_id FROM "{view}" WHERE (\n{where}\n)')
            return frozenset(image_id for batch in batches for image_id in batch["image_id"].to_pylist())
        except QueryError as error:
            message = str(error).removeprefix("query: ")
            raise QueryError(
                f"where: {message} Expected a condition over the columns of {self.folders}, such as: split = 'val'"
            ) from error


@contextmanager
def open_sql(
    folders: Addresses,
    kind: str | None = None,
    limits: SqlLimits = SqlLimits(),
    duplicates: str | os.PathLike[str] | None = None,
    mark_duplicates: bool = False,
) -> Iterator[SqlSession]:
    """Opens datasets of the same kind for SQL.

    A view with the name of the kind, such as `captions`, contains the rows of all datasets. The view `failures`
    contains the images that could not be processed. Both contain only finished shards (Parquet files).

    `kind` is the expected kind; None for any. `duplicates` is a dataset of groups of similar images: the view contains
    only the kept image of each group. With `mark_duplicates`, it contains all images, and a column `duplicate_of` with
    the id of the kept image, or null if the image is not a duplicate.

    Raises:
        DatasetError: a folder is not a dataset of the given kind, or the kinds differ.
        ConfigError: DuckDB rejects the limits.
    """
    first, *others = list_addresses(folders)
    datasets = [open_dataset(first, kind)]
    datasets += [open_dataset(folder, datasets[0].kind) for folder in others]
    data_files, failure_files = _list_files(datasets)
    with (
        tempfile.TemporaryDirectory(prefix="captionlib-") as spill_folder,
        closing(DatasetFileSystem({**data_files, **failure_files})) as files,
        closing(connect(limits, spill_folder)) as connection,
    ):
        connection.register_filesystem(files)
        restrict_connection(connection, [*data_files, *failure_files])
        schemas = [dataset.schema for dataset in datasets]
        with _raise_query_errors(datasets[0].kind):
            view = datasets[0].kind
            all_rows = view if duplicates is None else f"all_{view}"
            _create_view(connection, all_rows, list(data_files), schemas)
            if duplicates is not None:
                _join_duplicates(connection, all_rows, duplicates, mark_duplicates).create_view(view)
            _create_view(connection, "failures", list(failure_files), [FAILURES_SCHEMA])
        with _interrupt_on_ctrl_c(connection):
            yield SqlSession(connection, datasets)


def query_sql(folder: Addresses, sql: str, parameters: Sequence[Any] = (), limits: SqlLimits = SqlLimits()) -> pa.Table:
    """Runs one SELECT over a dataset, or over several of the same kind, and returns all its rows.

    The query runs in this process, without a time limit, and some of DuckDB's functions exceed the memory limit. For
    untrusted SQL, use the command `captionlib query`. It runs SQL in a child process, and kills the process if it
    exceeds a limit.

    Example:
        >>> captionlib.query_sql("captions", "SELECT count(*) AS images FROM captions").to_pylist()
        [{'images': 26}]

    Args:
        folder: the dataset, or several datasets of the same kind. The view to query has the name of the kind, such as
            `captions`.
        sql: the statement.
        parameters: values for the placeholders (`?`) of the statement.
        limits: limits on memory, threads and temporary disk space.

    Raises:
        DatasetError: the folder is not a dataset.
        QueryError: see `SqlSession.stream`.
    """
    with open_sql(folder, limits=limits) as session:
        return session.query(sql, parameters)


def connect(limits: SqlLimits, spill_folder: str) -> duckdb.DuckDBPyConnection:
    """Opens an isolated in-memory database that spills large intermediate results to a folder."""
    config: dict[str, Any] = {**_ISOLATION, "memory_limit": limits.memory, "temp_directory": spill_folder}
    if limits.threads is not None:
        config["threads"] = limits.threads
    try:
        connection = duckdb.connect(config=config)
        # DuckDB shows this setting but does not apply it if it is part of the initial configuration.
        connection.execute("SET max_temp_directory_size = ?", [limits.spill])
    except duckdb.Error as error:
        raise ConfigError(f"query limits: {error}") from error
    return connection


def restrict_connection(connection: duckdb.DuckDBPyConnection, addresses: Sequence[str]) -> None:
    """Restricts a connection to files at these addresses and locks its settings."""
    connection.execute("SET allowed_paths = ?", [list(addresses)])
    connection.execute("SET enable_external_access = false")
    connection.execute("SET lock_configuration = true")


def _list_files(datasets: Sequence[ShardedDataset]) -> tuple[dict[str, DatasetFile], dict[str, DatasetFile]]:
    """Returns the data files and failure files of all finished shards, by the addresses at which DuckDB opens them."""
    data: dict[str, DatasetFile] = {}
    failures: dict[str, DatasetFile] = {}
    for index, dataset in enumerate(datasets):
        folder = dataset.folder
        prefix = f"{index}/" if len(datasets) > 1 else ""
        finished = range(dataset.shards) if dataset.is_complete() else sorted(dataset.read_markers())
        failure_files = set(folder.list(FAILURES_FOLDER))  # listed last, to include those of all finished shards
        for shard in finished:
            name = f"{part_name(shard)}.parquet"
            data[f"dataset://{dataset.kind}/{prefix}{name}"] = DatasetFile(folder.fs, folder.path(name))
            if name in failure_files:
                path = folder.path(f"{FAILURES_FOLDER}/{name}")
                failures[f"dataset://failures/{prefix}{name}"] = DatasetFile(folder.fs, path)
    return data, failures


def _create_view(
    connection: duckdb.DuckDBPyConnection, name: str, addresses: Sequence[str], schemas: Sequence[pa.Schema]
) -> None:
    if addresses:
        # If the columns of the datasets differ, DuckDB must read the schemas of all files to match columns by name.
        has_same_columns = all(schema.names == schemas[0].names for schema in schemas)
        connection.read_parquet(list(addresses), union_by_name=not has_same_columns).create_view(name)
    else:
        connection.register(name, schemas[0].empty_table())


def _join_duplicates(
    connection: duckdb.DuckDBPyConnection, all_rows: str, address: str | os.PathLike[str], mark: bool
) -> duckdb.DuckDBPyRelation:
    """Leaves out the duplicates of kept images or, if `mark` is set, adds the column `duplicate_of`."""
    kept_by_duplicate = read_kept_images(open_dataset(address, "duplicates").require_complete())
    columns = {"image_id": kept_by_duplicate.keys(), "duplicate_of": kept_by_duplicate.values()}
    table = pa.table({name: pa.array(ids, pa.string()) for name, ids in columns.items()})
    connection.register("duplicate_images", table)
    how = "left" if mark else "anti"
    return connection.table(all_rows).join(connection.table("duplicate_images"), "image_id", how=how)


@contextmanager
def _interrupt_on_ctrl_c(connection: duckdb.DuckDBPyConnection) -> Iterator[None]:
    """Makes Ctrl-C interrupt a running query. By default, DuckDB completes it first."""
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
        raise QueryError(f"{to_query_error(error)} The dataset has the views {view} and failures.") from error
    except (duckdb.Error, pa.ArrowException, OSError) as error:
        raise to_query_error(error) from error
    except RuntimeError as error:
        if "interrupted" in str(error):  # DuckDB's message after Ctrl-C
            raise KeyboardInterrupt from error
        raise
