"""Runs a function in a child process that is killed if it takes too long, uses too much memory, or loses its parent.

Libraries that read untrusted input can run forever, exceed their own limits, or crash.
"""

import faulthandler
import io
import os
import pickle
import resource
import select
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NoReturn

from captionlib.errors import CaptionlibError, SubprocessError

__all__ = ["ProcessLimits", "run_isolated"]

_WATCH_MILLISECONDS = 20  # interval between checks of the memory limit


@dataclass(frozen=True)
class ProcessLimits:
    """Limits on a child process, and the errors to raise if it exceeds them."""

    memory_bytes: int  # without mapped files, and without memory that is shared with the parent
    timeout_seconds: float  # the total time that the parent waits for output
    memory_error: CaptionlibError
    timeout_error: CaptionlibError


@contextmanager
def run_isolated(program: Callable[[BinaryIO], None], limits: ProcessLimits) -> Iterator[BinaryIO]:
    """Runs a function in a child process, and yields a file that reads what the function writes.

    When the context exits, the child process is killed and its temporary files are removed. Reading the end of the file
    raises the exception that the function raised, or SubprocessError if the process crashed. The child is a fork. If
    other threads hold locks at the fork, it may wait for them until its timeout.
    """
    with tempfile.TemporaryDirectory(prefix="captionlib-") as scratch:
        child = _Child(program, limits, scratch)
        try:
            yield io.BufferedReader(child, 2**16)
        finally:
            child.kill()


class _Child(io.RawIOBase):
    """A file object that reads the output of a child process."""

    def __init__(self, program: Callable[[BinaryIO], None], limits: ProcessLimits, scratch: str) -> None:
        super().__init__()
        self._limits = limits
        self._remaining_seconds = limits.timeout_seconds
        self._output, output_sink = os.pipe()
        self._error, error_sink = os.pipe()
        self._pid = os.fork()
        if self._pid == 0:
            os.close(self._output)
            os.close(self._error)
            _run(program, output_sink, error_sink, limits, scratch)
        os.close(output_sink)
        os.close(error_sink)
        self._poll = select.poll()
        self._poll.register(self._output, select.POLLIN)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        start = time.monotonic()
        if not self._poll.poll(1000 * self._remaining_seconds):
            raise self._limits.timeout_error
        self._remaining_seconds = max(0.0, self._remaining_seconds - (time.monotonic() - start))
        count = os.readv(self._output, [buffer])
        if not count and self._pid:
            self._check_end()
        return count

    def kill(self) -> None:
        if self._pid:
            os.kill(self._pid, signal.SIGKILL)
            self._wait()
        os.close(self._output)
        os.close(self._error)

    def _wait(self) -> int:
        pid, self._pid = self._pid, 0
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    def _check_end(self) -> None:
        """Raises the error of the process, whose output has ended, if it failed."""
        with os.fdopen(self._error, "rb", closefd=False) as error:
            content = error.read()
        status = self._wait()
        if content:
            raise pickle.loads(content)  # the child runs the same program, so its errors are trusted
        if status == -signal.SIGKILL:
            raise SubprocessError("a child process was killed, possibly because the system ran out of memory")
        if status:
            reason = signal.Signals(-status).name if status < 0 else f"exit status {status}"
            raise SubprocessError(f"a child process crashed with {reason}")


def _run(
    program: Callable[[BinaryIO], None], output_sink: int, error_sink: int, limits: ProcessLimits, scratch: str
) -> NoReturn:
    status = 1
    try:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches both processes; the parent kills this one
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        _silence_crashes()
        tempfile.tempdir = scratch
        threading.Thread(target=_watch, args=(error_sink, limits, scratch), daemon=True).start()
        with os.fdopen(output_sink, "wb") as sink:
            program(sink)
        status = 0
    except BrokenPipeError:  # the parent needs no more output
        pass
    except BaseException as error:
        _send_error(error_sink, error)
    finally:
        os._exit(status)


def _silence_crashes() -> None:
    """Prevents core dumps, stack traces and messages of the C library, because the parent reports the crash."""
    faulthandler.disable()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def _watch(error_sink: int, limits: ProcessLimits, scratch: str) -> None:
    """Ends this process if it uses too much memory, or if the parent closes the pipe or dies."""
    pipe = select.poll()
    pipe.register(error_sink, 0)  # reports only that the other end was closed
    # RLIMIT_AS would also limit address space, of which DuckDB reserves far more than it uses.
    initial_bytes = _read_allocated_bytes()
    while not pipe.poll(_WATCH_MILLISECONDS):
        if _read_allocated_bytes() - initial_bytes > limits.memory_bytes:
            _send_error(error_sink, limits.memory_error)
            os._exit(1)
    shutil.rmtree(scratch, ignore_errors=True)
    os._exit(1)


def _read_allocated_bytes() -> int:
    """Returns the memory in use, without mapped files. On macOS, returns the peak, including mapped files."""
    if sys.platform == "darwin":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    _, _, rest = Path("/proc/self/status").read_text().partition("\nRssAnon:")
    return int(rest.split(maxsplit=1)[0]) * 1024


def _send_error(error_sink: int, error: BaseException) -> None:
    try:
        content = pickle.dumps(error)
        pickle.loads(content)
    except Exception:  # not every exception can be pickled
        content = pickle.dumps(SubprocessError(f"{type(error).__name__}: {error}"))
    with os.fdopen(error_sink, "wb", closefd=False) as sink:
        sink.write(content)
