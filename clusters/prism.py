"""Prism, Beam's single-process engine. The submitting command starts the workers."""

from pathlib import Path
from typing import Any

from clusters.packages import fetch_prism
from clusters.ports import choose_ports, is_listening, read_ports
from clusters.processes import Processes

__all__ = ["PrismCluster"]


class PrismCluster:
    """A Prism process. Its state is stored in a folder, so that other processes can stop it.

    Args:
        folder: folder for the pid file and the log.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.processes = Processes(folder)

    @property
    def beam_options(self) -> dict[str, Any]:
        """Beam options that submit jobs to Prism. LOOPBACK workers run in the submitting process."""
        return {
            "runner": "PortableRunner",
            "job_endpoint": f"127.0.0.1:{self._ports['job']}",
            "environment_type": "LOOPBACK",
        }

    @property
    def web_address(self) -> str:
        """Address of the web interface."""
        return f"http://127.0.0.1:{self._ports['web']}"

    def start(self) -> None:
        """Starts the process and waits until jobs can be submitted."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.processes.require_none()
        ports = choose_ports(self.folder, {"job": 8073, "web": 8074})
        command = [str(fetch_prism()), f"--job_port={ports['job']}", f"--web_port={ports['web']}"]
        self.processes.start("prism", command)
        self.processes.wait_ready("prism", lambda: is_listening(ports["job"]))

    def stop(self) -> list[str]:
        """Stops the process and returns its name if it was running."""
        return self.processes.stop()

    @property
    def _ports(self) -> dict[str, int]:
        return read_ports(self.folder)
