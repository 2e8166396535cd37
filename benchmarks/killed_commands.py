"""Kills or suspends commands of all stages at random moments; run again, they must give the same output.

No process may be left a few seconds after a command was killed, and none may print a stack trace.
"""

import argparse
import contextlib
import io
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path

from benchmarks.bars import report, run_benchmark
from benchmarks.tiny_project import COMMANDS, Command, call, create_project, read_output, set_up

RUNS = 200
STAGES = (
    *("prepare", "extract-features", "train-captioner", "train-ranker", "generate-captions", "embed", "build-index"),
    *("deduplicate", "update", "remove", "compact", "export"),
)
# The commands import these modules when they run. Loaded beforehand, they do not dominate the time of a command.
PRELOADED = (
    *("captionlib.data.ingestion.prepare", "captionlib.training.captioning", "captionlib.training.ranking"),
    *("pipelines.build_index", "pipelines.embed_images", "pipelines.extract_features", "pipelines.generate_captions"),
)
PROCESS_END_SECONDS = 5


def count_identical_outputs(folder: Path, runs: int, seed: int = 0) -> int:
    """Kills or suspends `runs` commands and runs them again; returns how many gave the same output as undisturbed."""
    project = create_project(folder / "project")
    context = multiprocessing.get_context("forkserver")  # imports the modules once
    context.set_forkserver_preload([__name__, *PRELOADED])
    commands = [command for command in COMMANDS if command.name in STAGES]
    expected, seconds = {}, {}
    for command in commands:
        output = folder / "undisturbed"
        for _ in range(2):  # the first run warms the file cache
            shutil.rmtree(output, ignore_errors=True)
            set_up(command, project, output)
            started = time.monotonic()
            start_command(context, command, project, output).join()
            seconds[command] = time.monotonic() - started
        expected[command] = read_output(command, output)
        if not expected[command]:
            raise RuntimeError(f"{command.name} wrote nothing")
    generator = random.Random(seed)
    identical = 0
    for run in range(runs):
        command = commands[run % len(commands)]
        output = folder / f"run{run}"
        set_up(command, project, output)
        process = start_command(context, command, project, output)
        moment = generator.uniform(0, seconds[command])
        action = generator.choice([kill, kill, suspend])
        time.sleep(moment)
        action(process)
        left = wait_for_processes(process.pid or 0)
        start_command(context, command, project, output).join()
        same = read_output(command, output) == expected[command]
        errors = _error_file(output).read_text()
        result = f"{'identical' if same else 'DIFFERENT'}{', PROCESSES LEFT: ' if left else ''}{', '.join(left)}"
        print(f"# {command.name}: {action.__name__} after {moment:.2f} s, {result}", flush=True)
        print(errors if not same or "Traceback" in errors else "", end="", flush=True)
        identical += same and not left and "Traceback" not in errors
    return identical


def kill(process: BaseProcess) -> None:
    process.kill()
    process.join()


def suspend(process: BaseProcess) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(process.pid or 0, signal.SIGSTOP)
        time.sleep(0.2)
        os.kill(process.pid or 0, signal.SIGCONT)
    process.join()


def wait_for_processes(session: int) -> list[str]:
    """Waits until the processes of a session end. Returns the names of those that are left after some seconds."""
    deadline = time.monotonic() + PROCESS_END_SECONDS
    while (left := list_processes(session)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return left


def list_processes(session: int) -> list[str]:
    """Returns the names of the running processes of a session, from Linux's /proc."""
    names = []
    for file in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # the process has ended since
            name, _, fields = file.read_text().rpartition(")")
            state, _, _, session_id = fields.split()[:4]
            names += [name.partition("(")[2]] if int(session_id) == session and state != "Z" else []
    return names


def start_command(context: ForkServerContext, command: Command, project: Path, output: Path) -> BaseProcess:
    """Starts a command in a separate process. Its errors, and those of its processes, are appended to a file."""
    process = context.Process(target=_run, args=(command, project, output))
    process.start()
    return process


def _run(command: Command, project: Path, output: Path) -> None:
    os.setsid()  # identifies the processes that the command starts
    with _error_file(output).open("ab") as errors:
        os.dup2(errors.fileno(), 2)
    with contextlib.redirect_stdout(io.StringIO()):
        sys.exit(call(command, project, output))


def _error_file(output: Path) -> Path:
    return output.with_name(f"{output.name}.err")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=RUNS)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        identical = count_identical_outputs(Path(scratch), options.runs, options.seed)
    report("killed-commands-identical", identical / options.runs, 1.0)


if __name__ == "__main__":
    run_benchmark(main)
