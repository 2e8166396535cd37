"""Counts the CPUs that are available to this process."""

import os

__all__ = ["available_cpus"]


def available_cpus() -> int:
    """Returns the number of CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
