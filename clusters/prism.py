"""Prism, Beam's own engine of one process; its workers are started by the command that submits."""

from pathlib import Path
from typing import Any

from clusters.packages import fetch_prism
from clusters.ports import answers, choose_ports, read_ports
from clusters.processes import Processes

__all__ = ["PrismCluster"]


class PrismCluster:
    """The engine of a folder, whether it runs or not.

    Args:
        folder: for its pid and log.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.processes = Processes(folder)

    @property
    def beam_options(self) -> dict[str, Any]:
        """What Beam is told to submit to it; Prism starts no worker processes of its own."""
        return {
            "runner": "PortableRunner",
            "job_endpoint": f"127.0.0.1:{self._ports['job']}",
            "environment_type": "LOOPBACK",
        }

    @property
    def address(self) -> str:
        """Where a browser sees it."""
        return f"http://127.0.0.1:{self._ports['web']}"

    def start(self) -> None:
        """Starts it and waits until jobs can be submitted."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.processes.require_none()
        ports = choose_ports(self.folder, {"job": 8073, "web": 8074})
        command = [str(fetch_prism()), f"--job_port={ports['job']}", f"--web_port={ports['web']}"]
        self.processes.start("prism", command)
        self.processes.wait_ready("prism", lambda: answers(ports["job"]))

    def stop(self) -> list[str]:
        """Stops it; returns what ran."""
        return self.processes.stop()

    @property
    def _ports(self) -> dict[str, int]:
        return read_ports(self.folder)
