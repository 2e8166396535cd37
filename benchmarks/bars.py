"""Measures CPU time, and reports a measurement and whether it meets its bar, the required value."""

import resource
from collections.abc import Callable

__all__ = ["measure_cpu", "report"]


def measure_cpu(run: Callable[[], object]) -> float:
    """Returns the CPU seconds of a call, including the processes that it starts and waits for."""
    began = _get_cpu_seconds()
    run()
    return _get_cpu_seconds() - began


def report(name: str, value: float, bar: float, at_least: bool = True) -> bool:
    """Prints `NAME VALUE BAR ok|short` and returns whether the bar is met."""
    met = value >= bar if at_least else value <= bar
    print(f"{name} {value:.3f} {'>=' if at_least else '<='}{bar:g} {'ok' if met else 'short'}", flush=True)
    return met


def _get_cpu_seconds() -> float:
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)
