"""Runs two different commands on the same folder at once; each must succeed or print an error of one line.

Afterwards, the complete datasets must contain the images that they contain if only the commands that succeeded had run,
one after the other.
"""

import argparse
import contextlib
import multiprocessing
import random
import shutil
import sys
import tempfile
import time
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path

from benchmarks.bars import report, run_benchmark
from benchmarks.killed_commands import PRELOADED
from benchmarks.storage_faults import find_message_problem
from benchmarks.tiny_project import COMMANDS, Command, call, create_project, set_up
from captionlib.data.shards.dataset import open_dataset

RUNS = 42
_PREPARE, _UPDATE, _EXTRACT = COMMANDS[:3]
_REMOVE, _COMPACT = (
    Command(arguments, True, _PREPARE.arguments)
    for arguments in ("remove {output}/manifest --id 1", "compact {output}/manifest --shard-size 3 --no-progress")
)
_EXTRACT_UPDATED = Command(_EXTRACT.arguments.replace("{project}/manifest", "{output}/manifest"), True)
_EXTRACT_OTHERWISE = Command(_EXTRACT_UPDATED.arguments.replace("random:0", "random:1"), True)
PAIRS = [
    (_UPDATE, _REMOVE),
    (_UPDATE, _COMPACT),
    (_REMOVE, _COMPACT),
    (_UPDATE, _EXTRACT_UPDATED),
    (_REMOVE, _EXTRACT_UPDATED),
    (_COMPACT, _EXTRACT_UPDATED),
    (_EXTRACT_UPDATED, _EXTRACT_OTHERWISE),
]

Images = dict[str, list[str]]
"""The sorted ids of the images of each complete dataset, with the fingerprint of the dataset."""


def read_images(output: Path) -> Images:
    images = {}
    for file in output.rglob("_dataset.json"):
        dataset = open_dataset(file.parent)
        if dataset.is_complete():
            ids = [name for shard in range(dataset.shards) for name in dataset.read(shard)["image_id"].to_pylist()]
            images[f"{file.parent.name} {dataset.config}"] = sorted(ids)
    return images


def run_in_order(commands: list[Command], project: Path, output: Path) -> Images:
    """Runs commands one after the other on a new folder, and returns the images of its complete datasets."""
    shutil.rmtree(output, ignore_errors=True)
    set_up(_COMPACT, project, output)
    for command in commands:
        call(command, project, output)
    return read_images(output)


def run_at_once(
    context: ForkServerContext, pair: tuple[Command, Command], delay: float, project: Path, output: Path
) -> tuple[list[Command], list[str]]:
    """Runs two commands at once. Returns those that succeeded, and the problems of their messages."""
    shutil.rmtree(output, ignore_errors=True)
    set_up(_COMPACT, project, output)
    logs = [output.parent / f"{number}.log" for number in range(2)]
    processes: list[BaseProcess] = []
    for command, log in zip(pair, logs, strict=True):
        processes.append(context.Process(target=_run, args=(command, project, output, log)))
        processes[-1].start()
        time.sleep(delay)
    for process in processes:
        process.join()
    problems = [
        find_message_problem(process.exitcode or 0, "", log.read_text())
        for process, log in zip(processes, logs, strict=True)
    ]
    succeeded = [command for command, process in zip(pair, processes, strict=True) if process.exitcode == 0]
    return succeeded, [problem for problem in problems if problem]


def _run(command: Command, project: Path, output: Path, log: Path) -> None:
    with log.open("w") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        sys.exit(call(command, project, output))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=RUNS)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    context = multiprocessing.get_context("forkserver")  # imports the modules once
    context.set_forkserver_preload([__name__, *PRELOADED])
    generator = random.Random(options.seed)
    acceptable_runs = 0
    with tempfile.TemporaryDirectory() as scratch:
        project, output = create_project(Path(scratch) / "project"), Path(scratch) / "output"
        run_at_once(context, PAIRS[-1], 0, project, output)  # warms the forkserver
        for run in range(options.runs):
            pair = PAIRS[run % len(PAIRS)]
            succeeded, problems = run_at_once(context, pair, generator.uniform(0, 0.4), project, output)
            images = read_images(output)
            orders = [succeeded, succeeded[::-1]]
            if images not in [run_in_order(order, project, output) for order in orders]:
                problems.append(f"unexpected images: {images}")
            names = " and ".join(command.name for command in pair)
            print(f"# {names}: {len(succeeded)} succeeded; {'; '.join(problems) or 'ok'}", flush=True)
            acceptable_runs += not problems
    report("concurrent-commands", acceptable_runs / options.runs, 1.0)


if __name__ == "__main__":
    run_benchmark(main)
