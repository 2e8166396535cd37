"""Measures the CPU time of `captionlib COMMAND --help`, relative to importing click and PyYAML."""

import resource
import statistics
import subprocess
import sys

from benchmarks.bars import report
from jobs.cli import COMMANDS

ROUNDS = 3


def measure_cpu(*arguments: str) -> float:
    """Returns the CPU seconds of a Python process."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *arguments], stdout=subprocess.DEVNULL, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    """Measures all commands and reports the slowest."""
    ratios = {}
    for name in (name for commands in COMMANDS.values() for name in commands):
        rounds = [
            (measure_cpu("-m", "captionlib", name, "--help"), measure_cpu("-c", "import click, yaml"))
            for _ in range(ROUNDS)
        ]
        ours, base = (statistics.median(values) for values in zip(*rounds, strict=True))
        ratios[name] = ours / base
        print(f"# {name} --help {1000 * ours:.0f} ms, click and PyYAML {1000 * base:.0f} ms")
    sys.exit(not report("command-help", max(ratios.values()), 3, at_least=False))


if __name__ == "__main__":
    main()
