"""Causes a fault at every access of every command to files; the result must be an error of one line or right.

An access fails once, or the disk is full or read-only from then on, or the output folder is removed.
"""

import argparse
import errno
import io
import mmap
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pyarrow.parquet as pq
import tenacity.nap

from benchmarks.bars import report, run_benchmark
from benchmarks.tiny_project import COMMANDS, Command, call, create_project, read_output, set_up
from captionlib.data.images.decoder_pool import DecoderPool
from captionlib.data.images.decoding import decode_image
from captionlib.data.shards.dataset import open_dataset
from captionlib.data.shards.markers import JOURNAL_FILE, SUCCESS_FILE

__all__ = ["FAULTS", "Fault", "FaultWalk", "Outcome", "Point", "find_message_problem"]

# Audit events of the interpreter for accesses to the file system. The first argument of each is a path.
_READ_EVENTS = {"os.listdir", "os.scandir"}
_WRITE_EVENTS = {"os.link", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "shutil.rmtree"}

_WRITE_FLAGS = os.O_WRONLY | os.O_RDWR | os.O_CREAT


@dataclass(frozen=True)
class Fault:
    """What happens at an access to a file.

    Attributes:
        code: number of the error that the access raises; 0 if it raises none.
        lasting: whether all later accesses that write raise the error too.
        output_only: whether only accesses to the output folder raise the error.
        removes_output: whether the output folder is removed before the access.
    """

    code: int
    lasting: bool = False
    output_only: bool = False
    removes_output: bool = False


FAULTS = {
    "EIO": Fault(errno.EIO),
    "EACCES": Fault(errno.EACCES),
    "ENOSPC": Fault(errno.ENOSPC),
    "ENOENT": Fault(errno.ENOENT),
    "ECONNRESET": Fault(errno.ECONNRESET),
    "full disk": Fault(errno.ENOSPC, lasting=True),
    "read-only output": Fault(errno.EROFS, lasting=True, output_only=True),
    "removed output": Fault(0, removes_output=True),
}

UNREACHED = "(not reached)"

Point = tuple[Command, str, int]
"""A command, the name of a fault, and the number of the access at which it happens."""


def _close_writer(_close: Callable[..., None], writer: pq.ParquetWriter) -> None:
    """Prevents a second attempt when the writer is deleted, as if PyArrow had raised the error."""
    writer.is_open = False


def _write_half(write_bytes: Callable[[Path, bytes], int], path: Path, content: bytes) -> None:
    """Writes the first half of the content, like a disk that becomes full."""
    write_bytes(path, content[: len(content) // 2])


def _write_nothing(*_arguments: Any) -> None:
    """Leaves the file as it is."""


# Functions that access files without audit events. If one that writes must fail, the last function is called first.
_READ_FUNCTIONS = ((pq.ParquetFile, "iter_batches"), (pq.ParquetFile, "read"))
_WRITE_FUNCTIONS: tuple[tuple[Any, str, Callable[..., None]], ...] = (
    (pq.ParquetWriter, "write_table", _write_nothing),
    (pq.ParquetWriter, "close", _close_writer),
    (os, "fsync", _write_nothing),
    (Path, "write_bytes", _write_half),
)


@dataclass(frozen=True)
class _Access:
    name: str
    path: str
    writes: bool


class _Accesses:
    """Counts the accesses to files of a folder, and causes a fault at one of them.

    The accesses of forked child processes are counted too.
    """

    def __init__(self, folder: Path, output: Path) -> None:
        self._root, self._output = str(folder), str(output)
        self._counts = False
        self._position = -1
        self._fault = Fault(0)
        self._count = memoryview(mmap.mmap(-1, 8)).cast("Q")  # shared with child processes
        self._log = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115  # shared too
        sys.addaudithook(self._audit)  # cannot be removed

    @property
    def names(self) -> list[str]:
        """The accesses since the last call of `fail_at`. Those that write begin with `write: `."""
        self._log.seek(0)
        return self._log.read().decode().splitlines()

    @contextmanager
    def fail_at(self, position: int, fault: Fault) -> Iterator[None]:
        """Causes a fault at the access with this number. If it is -1, the accesses are only counted."""
        self._count[0], self._position, self._fault = 0, position, fault
        self._log.seek(0)
        self._log.truncate()
        with ExitStack() as patches:
            for owner, name in _READ_FUNCTIONS:
                patches.enter_context(self._count_calls(owner, name))
            for owner, name, fail in _WRITE_FUNCTIONS:
                patches.enter_context(self._count_calls(owner, name, fail))
            self._counts = True
            try:
                yield
            finally:
                self._counts = False

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self._counts or event not in {"open", *_READ_EVENTS, *_WRITE_EVENTS}:
            return
        if not isinstance(arguments[0], str | bytes | os.PathLike):  # a file descriptor
            return
        path = os.fsdecode(arguments[0])
        if path.startswith(self._root):
            writes = event in _WRITE_EVENTS or (event == "open" and bool(arguments[2] & _WRITE_FLAGS))
            self._handle(_Access(f"{event} {path.removeprefix(self._root)}", path, writes))

    def _count_calls(
        self, owner: Any, name: str, fail: Callable[..., None] | None = None
    ) -> AbstractContextManager[Any]:
        """Counts the calls of a function that accesses files without audit events.

        If it writes, and must fail, `fail` is called first with its arguments.
        """
        function = getattr(owner, name)
        access = _Access(f"{owner.__name__}.{name}", "", writes=fail is not None)

        def count(*args: Any, **kwargs: Any) -> Any:
            if self._counts:
                self._handle(access, lambda: fail and fail(function, *args))
            return function(*args, **kwargs)

        return patch.object(owner, name, count)

    def _handle(self, access: _Access, fail: Callable[[], None] = lambda: None) -> None:
        position = self._count[0]
        self._count[0] = position + 1
        self._log.write(f"{'write: ' if access.writes else ''}{access.name!r}\n".encode())
        if self._position == -1 or not self._is_affected(access, position):
            return
        if self._fault.removes_output:
            self._counts = False
            shutil.rmtree(self._output, ignore_errors=True)
            self._counts = True
        else:
            fail()
            raise OSError(self._fault.code, os.strerror(self._fault.code))

    def _is_affected(self, access: _Access, position: int) -> bool:
        if self._fault.output_only and not access.path.startswith(self._output):
            return False
        return position == self._position or (self._fault.lasting and access.writes and position > self._position)


@dataclass(frozen=True)
class Outcome:
    """The result of a command with one fault. `problem` is empty if the result is acceptable."""

    command: str
    fault: str
    access: str
    problem: str


class FaultWalk:
    """Runs the commands with one fault each.

    A fault is acceptable if the command fails with one line and the same command then succeeds, or if it succeeds with
    the right output. An output that looks complete must be right in any case.

    For speed, images are decoded in this process, and nothing waits before it retries an access.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "walk"
        self._clean = create_project(folder / "clean")
        self._setups, self._temporary = folder / "setups", folder / "temporary"
        self._setups.mkdir()
        self._temporary.mkdir()
        self._output = self._folder / "output"
        self._accesses = _Accesses(folder, self._output)
        self._expected: dict[Command, dict[str, str]] = {}
        self._images: dict[Command, dict[str, int]] = {}

    def list_points(self, commands: Sequence[Command] = COMMANDS) -> list[Point]:
        """Runs each command without a fault. Returns all pairs of a fault and an access of a command."""
        points = []
        for command in commands:
            shutil.rmtree(self._folder, ignore_errors=True)
            set_up(command, self._clean, self._output)
            self._folder.rename(self._get_setup(command))
            for _ in range(2):  # the first run also accesses files that are cached in this process afterwards
                self._reset(command)
                code, _, errors = self._run(command, -1, Fault(0))
            if code != 0:
                raise RuntimeError(f"{command.name} failed without a fault: {errors}")
            self._expected[command] = read_output(command, self._output)
            self._images[command] = self._count_images()
            points += [
                (command, name, position)
                for position, access in enumerate(self._accesses.names)
                for name, fault in FAULTS.items()
                if access.startswith("write: ") or not fault.lasting  # it would affect the next access that writes
            ]
        return points

    def run(self, command: Command, fault: str, position: int) -> Outcome:
        """Runs a command with a fault at one access, and then without a fault."""
        self._reset(command)
        before = read_output(command, self._output)
        code, output, errors = self._run(command, position, FAULTS[fault])
        names = self._accesses.names
        access = names[position] if position < len(names) else UNREACHED
        problem = find_message_problem(code, output, errors)
        if not problem:
            problem = self._find_output_problem(command, code, before, access, FAULTS[fault])
        if not problem and code != 0 and self._expected[command]:
            if FAULTS[fault].removes_output:
                self._reset(command)
            again, _, errors = self._run(command, -1, Fault(0))
            if again != 0 or read_output(command, self._output) != self._expected[command]:
                problem = f"not resumed: exit code {again}: {errors}"
        return Outcome(command.arguments, fault, access, problem)

    def _find_output_problem(
        self, command: Command, code: int, before: dict[str, str], access: str, fault: Fault
    ) -> str:
        images = self._count_images() if code == 0 else {}  # completes an update that another process could complete
        result = read_output(command, self._output)
        if code == 0 and fault.removes_output and not result:  # removed after the command had written everything
            return ""
        folders = [file.parent for file in self._output.rglob("_dataset.json")]
        complete = [folder for folder in folders if _is_complete(folder)]
        if code == 0 and command.dataset and (not folders or folders != complete):
            return "exit code 0, but the output is not complete"
        if code == 0 and images != self._images[command]:
            return f"expected {self._images[command]} rows and failures, got {images}"
        if "/images/" in access:
            return ""
        names = [str(folder.relative_to(self._output)) for folder in complete]
        return _find_difference(code, names, result, self._expected[command], before)

    def _count_images(self) -> dict[str, int]:
        folders = [file.parent for file in self._output.rglob("_dataset.json")]
        return {str(folder): open_dataset(folder).compute_totals().images for folder in folders}

    def _get_setup(self, command: Command) -> Path:
        return self._setups / str(COMMANDS.index(command))

    def _reset(self, command: Command) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)
        shutil.copytree(self._get_setup(command), self._folder)

    def _run(self, command: Command, position: int, fault: Fault) -> tuple[int, str, str]:
        output, errors = io.TextIOWrapper(io.BytesIO()), io.StringIO()
        with (
            redirect_stdout(output),
            redirect_stderr(errors),
            patch.object(tempfile, "tempdir", str(self._temporary)),
            patch.object(tenacity.nap, "time"),
            patch.object(DecoderPool, "decode", _decode),
            self._accesses.fail_at(position, fault),
        ):
            code = call(command, self._clean, self._output)
        output.flush()
        return code, output.buffer.getvalue().decode(), errors.getvalue()


def _find_difference(
    code: int, complete: Sequence[str], result: dict[str, str], expected: dict[str, str], before: dict[str, str]
) -> str:
    """Returns whether a command that succeeded, or the dataset of a complete folder, has an unexpected result."""
    if code == 0 and result != expected:
        return "exit code 0, but the output differs"
    for name in complete:
        if _select(result, name) not in (_select(expected, name), _select(before, name)):
            return f"exit code {code}, and {name} looks complete, but differs"
    return ""


def _select(output: dict[str, str], folder: str) -> dict[str, str]:
    return {name: digest for name, digest in output.items() if name.startswith(f"{folder}/")}


def _is_complete(folder: Path) -> bool:
    """Returns whether other programs may read a dataset: it is complete, and no update of it is unfinished."""
    return (folder / SUCCESS_FILE).exists() and not (folder / JOURNAL_FILE).exists()


def _decode(pool: DecoderPool, content: bytes) -> Any:
    return decode_image(content, pool._preprocessing, pool.config.max_image_pixels, pool.config.max_jpeg_scans)


def find_message_problem(code: int, output: str, errors: str) -> str:
    """Returns what is wrong with the messages of a command. An empty string means nothing."""
    if "Traceback" in output + errors:
        return f"stack trace: {errors}"
    lines = [line for line in errors.splitlines() if line.strip() and not line.startswith("Note: ")]
    reports = "Error: ", "/"  # `caption` names each image that it cannot read
    # `inspect` prints the problems that it finds.
    if code != 0 and "PROBLEMS" not in output and not any(line.startswith(reports) for line in lines):
        return f"exit code {code} without an error: {errors!r}"
    if any(line.startswith("Error: unexpected") for line in lines):
        return f"unclear error: {errors}"
    return ""


def choose_faults(points: Sequence[Point], faults_per_access: int, seed: int) -> list[Point]:
    """Returns some of the faults of each access, in random order."""
    generator = random.Random(seed)
    chosen: list[Point] = []
    for _, group in groupby(points, key=lambda point: (point[0], point[2])):
        faults = list(group)
        chosen += generator.sample(faults, min(faults_per_access, len(faults)))
    return generator.sample(chosen, len(chosen))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--faults-per-access", type=int, default=len(FAULTS), help="number of faults of each access")
    parser.add_argument("--sample", type=int, help="number of faults. [default: all]")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after this time")
    parser.add_argument("--command", action="append", help="walk only this command; can be repeated")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    os.environ["PATH"] = ""  # without Java, which takes seconds to start
    commands = [command for command in COMMANDS if options.command is None or command.name in options.command]
    outcomes = []
    with tempfile.TemporaryDirectory() as scratch:
        walk = FaultWalk(Path(scratch))
        points = walk.list_points(commands)
        end = time.monotonic() + options.seconds
        for point in choose_faults(points, options.faults_per_access, options.seed)[: options.sample]:
            if time.monotonic() > end:
                break
            outcomes.append(outcome := walk.run(*point))
            if outcome.problem:
                name = outcome.command.split()[0]
                print(f"# {name}, {outcome.fault} at {outcome.access}: {outcome.problem}", flush=True)
    unreached = sum(outcome.access == UNREACHED for outcome in outcomes)
    print(f"# {len(outcomes)} of {len(points)} faults, {unreached} of them {UNREACHED}")
    print(f"# {dict(Counter(outcome.command.split()[0] for outcome in outcomes))}", flush=True)
    report("storage-faults", sum(not outcome.problem for outcome in outcomes) / len(outcomes), 1.0)


if __name__ == "__main__":
    run_benchmark(main)
