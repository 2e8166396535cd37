"""Measures time and memory, and reports a measurement and whether it meets its bar, the required value."""

import multiprocessing
import resource
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import TypeVar

__all__ = [
    "measure_cpu",
    "measure_seconds",
    "read_peak_megabytes",
    "report",
    "run_benchmark",
    "run_in_new_process",
]

Result = TypeVar("Result")

_missed: list[str] = []


def run_benchmark(main: Callable[[], None]) -> None:
    """Runs a benchmark and exits; the status is not zero if a bar was missed."""
    main()
    sys.exit(bool(_missed))


def report(name: str, value: float, bar: float, at_least: bool = True) -> None:
    """Prints `NAME VALUE BAR ok|short`."""
    met = value >= bar if at_least else value <= bar
    print(f"{name} {value:.3f} {'>=' if at_least else '<='}{bar:g} {'ok' if met else 'short'}", flush=True)
    if not met:
        _missed.append(name)


def measure_seconds(run: Callable[[], object]) -> float:
    """Returns the wall time of a call."""
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def measure_cpu(run: Callable[[], object]) -> float:
    """Returns the CPU seconds of a call, including the processes that it starts and waits for."""
    began = _get_cpu_seconds()
    run()
    return _get_cpu_seconds() - began


def _get_cpu_seconds() -> float:
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def run_in_new_process(function: Callable[..., Result], *arguments: object) -> Result:
    """Returns the result of a function that runs in a new process, for example to measure its peak memory."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as executor:
        return executor.submit(function, *arguments).result()


def read_peak_megabytes(who: int = resource.RUSAGE_SELF) -> float:
    """Returns the peak memory of this process or, with `resource.RUSAGE_CHILDREN`, of its largest child."""
    return resource.getrusage(who).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)
