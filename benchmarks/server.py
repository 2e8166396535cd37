"""Runs `captionlib serve` for benchmarks."""

import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

__all__ = ["find_free_port", "get_json", "serve"]

_START_SECONDS = 300


@contextmanager
def serve(folder: str | Path, thumbnails: Path, *options: str) -> Iterator[tuple[int, "subprocess.Popen[bytes]"]]:
    """Serves an index or a collection with a new process until the block ends.

    Yields the port and the process when the server responds.
    """
    port = find_free_port()
    command = [sys.executable, "-m", "captionlib", "serve", str(folder), "--port", str(port)]
    command += ["--thumbnails", str(thumbnails), *options]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        try:
            _wait_for_server(port, process)
            yield port, process
        finally:
            process.terminate()


def get_json(port: int, path: str) -> tuple[int, Any]:
    """Requests a path. Returns the status and the content of the response."""
    connection = HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, json.loads(response.read())
    finally:
        connection.close()


def find_free_port() -> int:
    """Returns a port on which no program listens."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
    return port


def _wait_for_server(port: int, process: "subprocess.Popen[bytes]") -> None:
    end = time.monotonic() + _START_SECONDS
    while time.monotonic() < end and process.poll() is None:
        try:
            urlopen(f"http://127.0.0.1:{port}/health").close()
            return
        except (URLError, ConnectionError):
            time.sleep(0.1)
    sys.exit("the server did not start")
