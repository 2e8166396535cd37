"""The engines that clusters can run."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from clusters.flink import FlinkCluster
from clusters.prism import PrismCluster
from clusters.processes import Processes
from clusters.spark import SparkCluster

__all__ = ["ENGINES", "Cluster"]


class Cluster(Protocol):
    """A cluster whose state is in a folder, whether it runs or not."""

    processes: Processes

    @property
    def beam_options(self) -> Mapping[str, Any]:
        """Beam options that submit jobs to the cluster."""

    @property
    def web_address(self) -> str:
        """Address of the web interface."""

    def start(self) -> None:
        """Starts all processes and waits until jobs can be submitted."""

    def stop(self) -> list[str]:
        """Stops all processes, including workers, and returns the names of those that ran."""


ENGINES: dict[str, Callable[[Path], Cluster]] = {"flink": FlinkCluster, "spark": SparkCluster, "prism": PrismCluster}
"""Creates the cluster of an engine in a folder."""
