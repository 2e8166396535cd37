"""Queries in a process of their own: limits, errors, and what they leave behind."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from captionlib.errors import DatasetError, FetchError, QueryError, SubprocessError
from captionlib.search.sql.isolation import OpenRows, run_query
from captionlib.search.sql.session import SqlLimits, open_sql

ENDLESS = "SELECT sum(hash(range)) FROM range(1000000000000)"
SCHEMA = pa.schema([("n", pa.int64())])


@contextmanager
def select(folder: str, sql: str) -> Iterator[pa.RecordBatchReader]:
    with open_sql(folder, limits=SqlLimits("100MB", 1)) as session:
        yield session.stream(sql)


def run(query: OpenRows, memory_bytes: int = 2**32, timeout_seconds: float = 30) -> pa.Table:
    with run_query(query, memory_bytes, timeout_seconds) as rows:
        return rows.read_all()


def list_children() -> set[str]:
    """Returns the ids of the child processes of this process, which other tests may have started too."""
    return {child for path in Path("/proc/self/task").glob("*/children") for child in path.read_text().split()}


@pytest.fixture(autouse=True)
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Checks that no test leaves a temporary file or a child process."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    before = list_children()
    yield folder
    assert list(folder.iterdir()) == []
    assert list_children() <= before


def test_rows_are_the_same_as_in_this_process(captions: str) -> None:
    sql = "SELECT *, split::ENUM('test') AS e FROM captions ORDER BY image_id"
    with select(captions, sql) as rows:
        assert run(partial(select, captions, sql)).equals(rows.read_all())


def test_query_without_rows_keeps_its_schema(captions: str) -> None:
    table = run(partial(select, captions, "SELECT image_id, tokens FROM captions WHERE false"))
    assert table.schema == pa.schema([("image_id", pa.string()), ("tokens", pa.int32())])


def test_errors_of_the_query_are_raised(local: str, tmp_path: Path) -> None:
    with pytest.raises(QueryError, match=r'^query: Binder Error: Referenced column "nothing" not found'):
        run(partial(select, local, "SELECT nothing FROM captions"))
    with pytest.raises(DatasetError, match="missing"):
        run(partial(select, str(tmp_path / "missing"), "SELECT 1"))


def test_error_between_batches_is_raised(local: str) -> None:
    sql = "SELECT CASE WHEN i = 90000 THEN error('late') ELSE 'x' END FROM range(100000) t(i)"
    with pytest.raises(QueryError, match=r"^query: Invalid Input Error: late$"):
        run(partial(select, local, sql))


class UnpicklableError(Exception):
    def __init__(self, first: str, second: str) -> None:
        super().__init__(f"{first} {second}")


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ZeroDivisionError("by zero"), ZeroDivisionError("by zero")),
        (FetchError("NotFound", "no such file"), FetchError("NotFound", "no such file")),
        (QueryError("long" * 100_000), QueryError("long" * 100_000)),
        (UnpicklableError("a", "b"), SubprocessError("UnpicklableError: a b")),
    ],
)
def test_every_exception_reaches_this_process(error: Exception, expected: Exception) -> None:
    def fail() -> AbstractContextManager[pa.RecordBatchReader]:
        raise error

    with pytest.raises(type(expected)) as raised:
        run(fail)
    assert (raised.value.args, vars(raised.value)) == (expected.args, vars(expected))


@pytest.mark.parametrize(
    ("sent", "message"),
    [
        (signal.SIGKILL, "a child process was killed, possibly because the system ran out of memory"),
        (signal.SIGSEGV, "a child process crashed with SIGSEGV"),
    ],
)
def test_crash_is_one_error(sent: signal.Signals, message: str, capfd: pytest.CaptureFixture[str]) -> None:
    def crash() -> AbstractContextManager[pa.RecordBatchReader]:
        os.write(2, b"free(): invalid pointer")  # as the C library does
        os.kill(os.getpid(), sent)
        raise AssertionError

    with pytest.raises(SubprocessError, match=f"^{re.escape(message)}$"):
        run(crash)
    assert capfd.readouterr().err == ""


@pytest.mark.timeout(60)
def test_endless_query_is_stopped(local: str) -> None:
    start = time.monotonic()
    with pytest.raises(QueryError, match=r"^query: stopped after 0.2 seconds; simplify it or raise --timeout$"):
        run(partial(select, local, ENDLESS), timeout_seconds=0.2)
    assert time.monotonic() - start < 30


def test_time_of_the_reader_does_not_count() -> None:
    """The pipe holds less than one batch, so that the process waits until this one reads."""
    batch = pa.RecordBatch.from_pydict({"n": [1] * 100_000}, SCHEMA)
    query = partial(nullcontext, pa.RecordBatchReader.from_batches(SCHEMA, [batch] * 3))
    with run_query(query, 2**32, 1.0) as rows:
        for _ in range(3):
            time.sleep(0.4)
            assert rows.read_next_batch().num_rows == 100_000


def test_function_that_ignores_the_memory_limit_is_stopped(local: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("captionlib.search.sql.isolation._UNTRACKED_BYTES", 2**25)
    sql = "SELECT length(repeat('a', 2000000000))"
    with pytest.raises(QueryError, match=r"^query: needs more than 0.1 GB of memory; simplify it or raise --memory$"):
        run(partial(select, local, sql), memory_bytes=SqlLimits("100MB").memory_bytes)


def test_mapped_files_do_not_count_as_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("captionlib.search.sql.isolation._UNTRACKED_BYTES", 2**25)
    path = tmp_path / "mapped"
    with path.open("wb") as file:
        file.truncate(2**28)

    @contextmanager
    def read_mapped() -> Iterator[pa.RecordBatchReader]:
        total = int(np.memmap(path, np.uint8, "r").sum())
        time.sleep(0.1)  # several checks
        yield pa.table({"n": [total]}, SCHEMA).to_reader()

    assert run(read_mapped, memory_bytes=0).to_pylist() == [{"n": 0}]


def test_rows_are_streamed_in_bounded_memory() -> None:
    """The process would produce rows forever, and is stopped after the first ones."""

    def yield_batches() -> Iterator[pa.RecordBatch]:
        while True:
            yield pa.RecordBatch.from_pydict({"n": [1] * 1000}, SCHEMA)

    query = partial(nullcontext, pa.RecordBatchReader.from_batches(SCHEMA, yield_batches()))
    with run_query(query, 2**32, 30) as rows:
        assert rows.read_next_batch().num_rows == 1000


@pytest.mark.timeout(60)
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGKILL])
def test_end_of_the_parent_ends_the_query(local: str, scratch: Path, sent: signal.Signals) -> None:
    """Covers Ctrl-C and a parent that cannot clean up. The query writes its process id before it runs forever."""
    code = f"""
import os, signal, tempfile
from tests.search.sql.test_isolation import ENDLESS, run, select
signal.signal(signal.SIGINT, signal.default_int_handler)
tempfile.tempdir = {str(scratch)!r}
def query():
    print(os.getpid(), flush=True)
    return select({local!r}, ENDLESS)
run(query, timeout_seconds=50)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        parent.send_signal(sent)
    while is_running(child):
        time.sleep(0.01)


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return not re.search(r"^State:\tZ", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
