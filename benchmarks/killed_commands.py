"""Kills or suspends commands of all stages at random moments; run again, they must give the same output."""

import argparse
import contextlib
import hashlib
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

from benchmarks.bars import report
from benchmarks.tiny_project import COMMANDS, Command, call, create_project
from captionlib.search.index_folder import read_description
from captionlib.storage.folders import Folder

RUNS = 200
STAGES = (
    *("prepare", "extract-features", "train-captioner", "train-ranker", "generate-captions", "embed", "build-index"),
)


def count_identical_outputs(folder: Path, runs: int, seed: int = 0) -> int:
    """Kills or suspends `runs` commands and runs them again; returns how many gave the same output as undisturbed."""
    project = create_project(_make(folder / "project"))
    context = multiprocessing.get_context("forkserver")  # imports the modules once
    context.set_forkserver_preload([__name__])
    commands = [command for command in COMMANDS if command.name in STAGES]
    expected, seconds = {}, {}
    for command in commands:
        output = _make(folder / "undisturbed" / command.name)
        start_command(context, command, project, output).join()  # warms the file cache
        shutil.rmtree(output)
        started = time.monotonic()
        start_command(context, command, project, _make(output)).join()
        seconds[command.name] = time.monotonic() - started
        expected[command.name] = read_output(command, output)
        if not expected[command.name]:
            raise RuntimeError(f"{command.name} wrote nothing")
    generator = random.Random(seed)
    identical = 0
    for run in range(runs):
        command = commands[run % len(commands)]
        output = _make(folder / f"run{run}")
        process = start_command(context, command, project, output)
        moment = generator.uniform(0, seconds[command.name])
        action = generator.choice([kill, kill, suspend])
        time.sleep(moment)
        action(process)
        start_command(context, command, project, output).join()
        same = read_output(command, output) == expected[command.name]
        result = "identical" if same else "DIFFERENT"
        print(f"# {command.name}: {action.__name__} after {moment:.2f} s, {result}", flush=True)
        identical += same
    return identical


def kill(process: BaseProcess) -> None:
    """Kills a process."""
    process.kill()
    process.join()


def suspend(process: BaseProcess) -> None:
    """Suspends a process for a moment and waits until it finishes."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(process.pid or 0, signal.SIGSTOP)
        time.sleep(0.2)
        os.kill(process.pid or 0, signal.SIGCONT)
    process.join()


def start_command(context: ForkServerContext, command: Command, project: Path, output: Path) -> BaseProcess:
    """Starts a command in a separate process."""
    process = context.Process(target=_run, args=(command, project, output))
    process.start()
    return process


def read_output(command: Command, output: Path) -> dict[str, str]:
    """Returns hashes of the Parquet files, of the weights, and of what an index contains."""
    if command.name == "build-index":
        index = read_description(Folder(output / "index"))
        return {} if index is None else {"index": f"{index.captions_count} {index.vectors_count} {index.fingerprint}"}
    files = [*output.glob("*/*.parquet"), *output.glob("*/model.safetensors")]
    return {str(file.relative_to(output)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def _run(command: Command, project: Path, output: Path) -> None:
    with contextlib.redirect_stdout(io.StringIO()):
        sys.exit(call(command, project, output))


def _make(folder: Path) -> Path:
    folder.mkdir(parents=True)
    return folder


def main() -> None:
    """Reports the fraction of identical outputs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=RUNS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        identical = count_identical_outputs(Path(scratch), options.runs)
    sys.exit(not report("killed-commands-identical", identical / options.runs, 1.0))


if __name__ == "__main__":
    main()
