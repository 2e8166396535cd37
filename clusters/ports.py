"""The ports of a cluster on the loopback interface: chosen when it starts, and kept where others look them up."""

import json
import socket
from collections.abc import Mapping
from pathlib import Path

from clusters.processes import ClusterError

__all__ = ["answers", "choose_ports", "read_ports"]

_FILE = "ports.json"


def choose_ports(folder: Path, preferred: Mapping[str, int]) -> dict[str, int]:
    """The preferred port of each name, or another one where it is taken; kept in the cluster's folder."""
    ports = {name: _free_port(port) for name, port in preferred.items()}
    (folder / _FILE).write_text(json.dumps(ports), encoding="utf-8")
    return ports


def read_ports(folder: Path) -> dict[str, int]:
    """The ports of the cluster of a folder, by their names."""
    ports: dict[str, int] = json.loads((folder / _FILE).read_text(encoding="utf-8"))
    return ports


def _free_port(preferred: int) -> int:
    """The preferred port of the loopback interface, or another one where it is taken."""
    for port in (preferred, 0):
        with socket.socket() as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                listener.bind(("127.0.0.1", port))
            except OSError:
                continue
            found: int = listener.getsockname()[1]
            return found
    raise ClusterError("no port of 127.0.0.1 is free")


def answers(port: int) -> bool:
    """Whether something listens at a port of the loopback interface."""
    with socket.socket() as caller:
        caller.settimeout(1)
        return caller.connect_ex(("127.0.0.1", port)) == 0
