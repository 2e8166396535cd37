"""Lists the available engines."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from clusters.flink import FlinkCluster
from clusters.prism import PrismCluster
from clusters.processes import Processes
from clusters.spark import SparkCluster

__all__ = ["ENGINES", "Cluster"]


class Cluster(Protocol):
    """A cluster of local processes. Its state is stored in a folder, so that other processes can stop it."""

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
        """Stops all processes, including workers, and returns the names of those that were running."""


ENGINES: dict[str, Callable[[Path], Cluster]] = {"flink": FlinkCluster, "spark": SparkCluster, "prism": PrismCluster}
"""Classes of clusters by engine. Each takes the folder of its state."""
