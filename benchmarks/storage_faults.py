"""Makes every access of every command to files fail in turn; the result must be an error of one line or right."""

import argparse
import errno
import io
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from benchmarks.bars import report
from benchmarks.tiny_project import COMMANDS, Command, call, create_project, read_outputs, set_up
from captionlib.data.shards.dataset import open_dataset

__all__ = ["FAULTS", "FaultWalk", "Outcome"]

# Audit events of the interpreter for accesses to the file system. The first argument of each is a path.
_EVENTS = {"open", "os.listdir", "os.scandir", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"}

FAULTS: dict[str, Callable[[], OSError]] = {
    "EIO": lambda: OSError(errno.EIO, os.strerror(errno.EIO)),
    "EACCES": lambda: PermissionError(errno.EACCES, os.strerror(errno.EACCES)),
    "ENOSPC": lambda: OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
    "ENOENT": lambda: FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT)),
    "ECONNRESET": lambda: ConnectionResetError(errno.ECONNRESET, os.strerror(errno.ECONNRESET)),
}


class _Accesses:
    """Counts the accesses to files of a folder, and raises an error at one of them."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self._root: str | None = None
        self._position = -1
        self._make_error: Callable[[], OSError] = FAULTS["EIO"]
        sys.addaudithook(self._audit)  # cannot be removed, but does nothing without a folder
        self._wrap(pq.ParquetWriter, "write_table")
        self._wrap(pq.ParquetWriter, "close")
        self._wrap(pq.ParquetFile, "iter_batches")
        self._wrap(pq.ParquetFile, "read")

    @contextmanager
    def fail_at(self, root: Path, position: int, make_error: Callable[[], OSError]) -> Iterator[None]:
        """Raises an error at the access with this number. If it is -1, the accesses are only counted."""
        self.names, self._position, self._make_error = [], position, make_error
        self._root = str(root)
        try:
            yield
        finally:
            self._root = None

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self._root is not None and event in _EVENTS and isinstance(arguments[0], str | bytes | os.PathLike):
            path = os.fsdecode(arguments[0])
            if path.startswith(self._root):
                mode = f" {arguments[1]}" if event == "open" else ""
                self._access(f"{event}{mode} {path.removeprefix(self._root)}")

    def _wrap(self, cls: type, method: str) -> None:
        """Counts a method of PyArrow, which accesses files without audit events."""
        call_method = getattr(cls, method)

        def wrapped(instance: Any, *args: Any, **kwargs: Any) -> Any:
            if self._root is not None:
                self._access(f"{cls.__name__}.{method}")
            return call_method(instance, *args, **kwargs)

        setattr(cls, method, wrapped)

    def _access(self, name: str) -> None:
        self.names.append(name)
        if len(self.names) - 1 == self._position:
            raise self._make_error()


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
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "walk"
        self._clean = create_project(_make(folder / "clean"))
        self._accesses = _Accesses()
        self._output = self._folder / "output"
        self._before: dict[str, dict[str, str]] = {}
        self._expected: dict[str, dict[str, str]] = {}
        self._images: dict[str, dict[str, int]] = {}

    def list_points(self, commands: Sequence[Command] = COMMANDS) -> list[tuple[Command, str, int]]:
        """Runs each command without a fault. Returns all pairs of a fault and an access of a command."""
        points = []
        for command in commands:
            self._reset(command)
            self._before[command.arguments] = read_outputs(self._output)
            code, _, errors = self._run(command, -1, "EIO")
            if code != 0:
                raise RuntimeError(f"{command.name} failed without a fault: {errors}")
            self._expected[command.arguments] = read_outputs(self._output)
            self._images[command.arguments] = self._count_images()
            points += [(command, fault, position) for fault in FAULTS for position in range(len(self._accesses.names))]
        return points

    def run(self, command: Command, fault: str, position: int) -> Outcome:
        """Runs a command with a fault at one access, and then without a fault."""
        expected = self._expected[command.arguments]
        self._reset(command)
        code, output, errors = self._run(command, position, fault)
        access = self._accesses.names[position] if position < len(self._accesses.names) else "(not reached)"
        problem = _find_message_problem(code, output, errors)
        if not problem:
            problem = self._find_output_problem(command, code, {} if "/images/" in access else expected)
        if not problem and command.dataset and code != 0:
            again, _, errors = self._run(command, -1, fault)
            if again != 0 or read_outputs(self._output) != expected:
                problem = f"not resumed: exit code {again}: {errors}"
        return Outcome(command.arguments, fault, access, problem)

    def _find_output_problem(self, command: Command, code: int, expected: dict[str, str]) -> str:
        if not command.dataset:
            return ""
        folders = [file.parent for file in self._output.rglob("_dataset.json")]
        complete = bool(folders) and all((folder / "_SUCCESS").exists() for folder in folders)
        if code == 0 and not complete:
            return "exit code 0, but the output is not complete"
        if code == 0 and self._count_images() != self._images[command.arguments]:
            return f"expected {self._images[command.arguments]} rows and failures, got {self._count_images()}"
        acceptable = [expected] if code == 0 else [expected, self._before[command.arguments]]
        if (code == 0 or complete) and expected and read_outputs(self._output) not in acceptable:
            return f"exit code {code}, and the output looks complete, but differs"
        return ""

    def _count_images(self) -> dict[str, int]:
        """Returns the number of rows and failures of each dataset."""
        folders = [file.parent for file in self._output.rglob("_dataset.json")]
        return {str(folder): open_dataset(folder).compute_totals().images for folder in folders}

    def _reset(self, command: Command) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)
        set_up(command, self._clean, self._output)

    def _run(self, command: Command, position: int, fault: str) -> tuple[int, str, str]:
        """Returns the exit code, the output and the errors of a command."""
        output, errors = io.TextIOWrapper(io.BytesIO()), io.StringIO()
        with (
            redirect_stdout(output),
            redirect_stderr(errors),
            self._accesses.fail_at(self._folder.parent, position, FAULTS[fault]),
        ):
            code = call(command, self._clean, self._output)
        output.flush()
        return code, output.buffer.getvalue().decode(), errors.getvalue()


def _find_message_problem(code: int, output: str, errors: str) -> str:
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


def _make(folder: Path) -> Path:
    folder.mkdir(parents=True)
    return folder


def main() -> None:
    """Reports the fraction of faults with an acceptable result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sample", type=int, help="number of faults. [default: all]")
    parser.add_argument("--command", help="walk only this command")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    os.environ["PATH"] = ""  # without Java, which takes seconds to start
    commands = [command for command in COMMANDS if options.command in (None, command.name)]
    with tempfile.TemporaryDirectory() as scratch:
        walk = FaultWalk(Path(scratch))
        points = walk.list_points(commands)
        count = len(points) if options.sample is None else min(options.sample, len(points))
        chosen = random.Random(options.seed).sample(points, count)
        outcomes = [walk.run(*point) for point in chosen]
    for outcome in outcomes:
        if outcome.problem:
            print(f"# {outcome.command.split()[0]}, {outcome.fault} at {outcome.access}: {outcome.problem}", flush=True)
    print(f"# {len(outcomes)} of {len(points)} faults", flush=True)
    sys.exit(not report("storage-faults", sum(not outcome.problem for outcome in outcomes) / len(outcomes), 1.0))


if __name__ == "__main__":
    main()
