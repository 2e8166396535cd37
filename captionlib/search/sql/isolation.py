"""Runs a query in a child process that is killed if it takes too long, uses too much memory, or loses its parent.

DuckDB applies its memory limit only to the memory that its buffer manager allocates, and checks for interrupts only
between batches: `SELECT repeat('a', 4000000000)` ignores both. The child is a fork, so it starts in milliseconds.
A limit on the address space does not work: DuckDB reserves far more than it uses, and fails or crashes.
"""

import io
import json
import os
import resource
import select
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import NoReturn

import pyarrow as pa

from captionlib import errors
from captionlib.errors import QueryError, SubprocessError

__all__ = ["Query", "run_isolated"]

Query = Callable[[], AbstractContextManager[pa.RecordBatchReader]]
"""Opens a query. The rows are valid until the context exits."""

_UNTRACKED_BYTES = 2**29  # memory that DuckDB does not count, such as Arrow batches; a sort needs about 200 MB
_WATCH_MILLISECONDS = 20
_PEAK_UNIT = 1 if sys.platform == "darwin" else 1024


@contextmanager
def run_isolated(query: Query, memory_bytes: int | None, timeout_seconds: float) -> Iterator[pa.RecordBatchReader]:
    """Runs a query in a child process and streams its rows. On exit, no process and no temporary file is left.

    The child is a fork, so call this function only in a process that runs no other threads.

    Args:
        query: opens the query. The child process calls it.
        memory_bytes: the limit on DuckDB's memory. The child is killed if it uses 512 MiB more. If None, there is no
            limit.
        timeout_seconds: the limit on the total time that this process waits for rows.

    Raises:
        QueryError: the query exceeds a limit; possibly while its rows are read.
        CaptionlibError: the query raises it in the child process.
        SubprocessError: the child process fails for another reason.
    """
    with tempfile.TemporaryDirectory(prefix="captionlib-") as scratch:
        child = _Child(query, memory_bytes, timeout_seconds, scratch)
        try:
            yield child.read_rows()
        finally:
            child.kill()


class _Child:
    """A child process, and the pipes that its rows and its error arrive in."""

    def __init__(self, query: Query, memory_bytes: int | None, timeout_seconds: float, scratch: str) -> None:
        rows, rows_sink = os.pipe()
        error, error_sink = os.pipe()
        self._pid = os.fork()
        if self._pid == 0:
            os.close(rows)
            os.close(error)
            _run(query, rows_sink, error_sink, memory_bytes, scratch)
        os.close(rows_sink)
        os.close(error_sink)
        self._rows = io.BufferedReader(_TimedPipe(rows, timeout_seconds), 2**16)
        self._error = os.fdopen(error, "rb")

    def read_rows(self) -> pa.RecordBatchReader:
        try:
            reader = pa.ipc.open_stream(self._rows)
        except pa.ArrowInvalid:  # the pipe ends before the schema
            self._raise_error()
            raise

        def read_batches() -> Iterator[pa.RecordBatch]:
            with suppress(pa.ArrowInvalid):  # the pipe ends within a batch
                yield from reader
            self._raise_error()

        return pa.RecordBatchReader.from_batches(reader.schema, read_batches())

    def kill(self) -> None:
        """Kills the process if it is running, and closes the pipes."""
        if self._pid:
            os.kill(self._pid, signal.SIGKILL)
            self._wait()
        self._rows.close()
        self._error.close()

    def _wait(self) -> int:
        pid, self._pid = self._pid, 0
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    def _raise_error(self) -> None:
        """Raises the error of the process. Call only if the pipe of the rows has ended."""
        content = self._error.read()
        status = self._wait()
        if content:
            name, message = json.loads(content)
            error = getattr(errors, name, None)
            if error is None:
                raise SubprocessError(f"the process of the query failed: {name}: {message}")
            raise error(message)
        if status:
            reason = f"signal {-status}; did the system run out of memory?" if status < 0 else f"exit status {status}"
            raise SubprocessError(f"the process of the query ended with {reason}")


class _TimedPipe(io.RawIOBase):
    """The readable end of a pipe that limits the total time of waiting for data."""

    def __init__(self, descriptor: int, timeout_seconds: float) -> None:
        super().__init__()
        self._descriptor = descriptor
        self._timeout_seconds = self._remaining_seconds = timeout_seconds
        self._poll = select.poll()
        self._poll.register(descriptor, select.POLLIN)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        start = time.monotonic()
        if not self._poll.poll(1000 * self._remaining_seconds):
            raise QueryError(f"query: stopped after {self._timeout_seconds:g} seconds; simplify it or raise --timeout")
        self._remaining_seconds = max(0.0, self._remaining_seconds - (time.monotonic() - start))
        return os.readv(self._descriptor, [buffer])

    def close(self) -> None:
        if not self.closed:
            os.close(self._descriptor)
        super().close()


def _run(query: Query, rows_sink: int, error_sink: int, memory_bytes: int | None, scratch: str) -> NoReturn:
    """Is the program of the child process."""
    status = 1
    try:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches both processes; the parent kills this one
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        tempfile.tempdir = scratch
        watch = threading.Thread(target=_watch, args=(rows_sink, error_sink, memory_bytes, scratch), daemon=True)
        watch.start()
        sink = os.fdopen(rows_sink, "wb")
        with query() as rows:
            writer = pa.ipc.new_stream(sink, rows.schema)
            for batch in rows:
                writer.write_batch(batch)
                sink.flush()
        writer.close()
        sink.flush()
        status = 0
    except BrokenPipeError:  # the parent needs no more rows
        pass
    except BaseException as error:
        _send_error(error_sink, error)
    finally:
        os._exit(status)


def _watch(rows_sink: int, error_sink: int, memory_bytes: int | None, scratch: str) -> None:
    """Ends this process if it uses too much memory or the parent closes the pipe, by its death for example."""
    pipe = select.poll()
    pipe.register(rows_sink, 0)  # an error is always reported
    start = _read_peak_bytes()  # includes the memory that is shared with the parent
    while not pipe.poll(_WATCH_MILLISECONDS):
        if memory_bytes is not None and _read_peak_bytes() - start > memory_bytes + _UNTRACKED_BYTES:
            limit = f"{memory_bytes / 1e9:.3g} GB"
            _send_error(
                error_sink, QueryError(f"query: needs more than {limit} of memory; simplify it or raise --memory")
            )
            os._exit(1)
    shutil.rmtree(scratch, ignore_errors=True)
    os._exit(1)


def _read_peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _PEAK_UNIT


def _send_error(error_sink: int, error: BaseException) -> None:
    os.write(error_sink, json.dumps([type(error).__name__, str(error)]).encode()[: 2**16])
