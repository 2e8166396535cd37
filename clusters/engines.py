"""The engines that a cluster can be of."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from clusters.flink import FlinkCluster
from clusters.prism import PrismCluster
from clusters.processes import Processes
from clusters.spark import SparkCluster

__all__ = ["ENGINES", "Cluster", "cluster_of"]


class Cluster(Protocol):
    """A cluster that belongs to a folder, whether it runs or not."""

    processes: Processes

    @property
    def beam_options(self) -> Mapping[str, Any]:
        """What Beam is told to submit to it."""

    @property
    def address(self) -> str | None:
        """Where a browser sees it; None where it shows nothing."""

    def start(self) -> None:
        """Starts everything and waits until jobs can be submitted."""

    def stop(self) -> list[str]:
        """Stops everything, workers included; returns what ran."""


ENGINES: dict[str, Callable[[Path], Cluster]] = {"flink": FlinkCluster, "spark": SparkCluster, "prism": PrismCluster}


def cluster_of(engine: str, folder: Path) -> Cluster:
    """The cluster of an engine in a folder."""
    return ENGINES[engine](folder)
