"""Measures the CPU time of `captionlib COMMAND --help`, relative to importing click and PyYAML."""

import statistics
import subprocess
import sys

from benchmarks.bars import measure_cpu, report, run_benchmark
from jobs.cli import COMMANDS

ROUNDS = 3


def measure_python(*arguments: str) -> float:
    return measure_cpu(lambda: subprocess.run([sys.executable, *arguments], stdout=subprocess.DEVNULL, check=True))


def main() -> None:
    """Measures all commands and reports the slowest."""
    ratios = {}
    for name in (name for commands in COMMANDS.values() for name in commands):
        rounds = [
            (measure_python("-m", "captionlib", name, "--help"), measure_python("-c", "import click, yaml"))
            for _ in range(ROUNDS)
        ]
        ours, base = (statistics.median(values) for values in zip(*rounds, strict=True))
        ratios[name] = ours / base
        print(f"# {name} --help {1000 * ours:.0f} ms, click and PyYAML {1000 * base:.0f} ms")
    report("command-help", max(ratios.values()), 3, at_least=False)


if __name__ == "__main__":
    run_benchmark(main)
