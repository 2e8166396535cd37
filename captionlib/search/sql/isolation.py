"""Runs a query in a child process that can be killed.

DuckDB applies its memory limit only to the memory that its buffer manager allocates, and checks for interrupts only
between batches. `SELECT repeat('a', 4000000000)` exceeds the limit and cannot be interrupted.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import BinaryIO

import pyarrow as pa

from captionlib.errors import QueryError
from captionlib.isolation import ProcessLimits, run_isolated

__all__ = ["OpenRows", "run_query"]

OpenRows = Callable[[], AbstractContextManager[pa.RecordBatchReader]]
"""A function that starts a query. Its rows can be read until the context exits."""

_UNTRACKED_BYTES = 2**29  # memory that DuckDB does not count, such as Arrow batches; a sort needs about 200 MB


@contextmanager
def run_query(open_rows: OpenRows, memory_bytes: int, timeout_seconds: float) -> Iterator[pa.RecordBatchReader]:
    """Runs a query in a child process and streams its rows.

    The child is killed if it allocates 512 MiB more than `memory_bytes`, which is the limit on DuckDB's memory, or if
    this process waits for rows longer than `timeout_seconds` in total.

    Raises:
        QueryError: the query exceeds a limit. Reading the rows may also raise it.
        SubprocessError: the child process crashes.
        Exception: any exception that the query raises in the child process.
    """

    def write_rows(sink: BinaryIO) -> None:
        with open_rows() as rows:
            writer = pa.ipc.new_stream(sink, rows.schema)
            for batch in rows:
                writer.write_batch(batch)
                sink.flush()
            # Closed only after success: without the end marker that `close` writes, the parent reads to the end of the
            # output, where the child's error is raised.
            writer.close()

    limits = ProcessLimits(
        memory_bytes + _UNTRACKED_BYTES,
        timeout_seconds,
        QueryError(f"query: needs more than {memory_bytes / 1e9:.3g} GB of memory; simplify it or raise --memory"),
        QueryError(f"query: stopped after {timeout_seconds:g} seconds; simplify it or raise --timeout"),
    )
    with run_isolated(write_rows, limits) as output:
        yield pa.ipc.open_stream(output)
