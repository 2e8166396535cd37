"""Chooses the ports of a cluster on the loopback interface, and stores them in the cluster's folder."""

import json
import socket
from collections.abc import Mapping
from pathlib import Path

from clusters.processes import ClusterError

__all__ = ["choose_ports", "is_listening", "read_ports"]

_FILE = "ports.json"


def choose_ports(folder: Path, preferred: Mapping[str, int]) -> dict[str, int]:
    """Chooses and stores a free port for each name: the preferred one if it is free, otherwise a different one."""
    ports = {name: _free_port(port) for name, port in preferred.items()}
    (folder / _FILE).write_text(json.dumps(ports), encoding="utf-8")
    return ports


def read_ports(folder: Path) -> dict[str, int]:
    """Returns the stored ports of a cluster by name."""
    ports: dict[str, int] = json.loads((folder / _FILE).read_text(encoding="utf-8"))
    return ports


def _free_port(preferred: int) -> int:
    """Returns the preferred port if it is free, otherwise a different free port."""
    for port in (preferred, 0):
        with socket.socket() as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                listener.bind(("127.0.0.1", port))
            except OSError:
                continue
            free: int = listener.getsockname()[1]
            return free
    raise ClusterError("no port of 127.0.0.1 is free")


def is_listening(port: int) -> bool:
    """Returns whether a process listens on a port of the loopback interface."""
    with socket.socket() as client:
        client.settimeout(1)
        return client.connect_ex(("127.0.0.1", port)) == 0
