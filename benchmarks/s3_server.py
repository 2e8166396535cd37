"""Runs a local S3 server for benchmarks and tests."""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest import mock
from urllib.error import URLError
from urllib.request import urlopen

import fsspec

from benchmarks.server import find_free_port

__all__ = ["S3Server", "run_s3_server"]

_START_SECONDS = 60


@dataclass(frozen=True)
class S3Server:
    """A running server with a bucket, `bucket`.

    Attributes:
        url: address of the server.
        log: a file with a line for each request, such as `"GET /bucket/a.jpg HTTP/1.1" 200`.
    """

    url: str
    log: Path

    @property
    def options(self) -> dict[str, str]:
        """Options for s3fs. The server checks no signatures."""
        return {"key": "x", "secret": "x", "endpoint_url": self.url}

    @contextmanager
    def as_default(self) -> Iterator[None]:
        """Makes this process and its children use the server for `s3://`."""
        variables = {f"FSSPEC_S3_{name.upper()}": value for name, value in self.options.items()}
        with mock.patch.dict(os.environ, variables), mock.patch.dict(fsspec.config.conf, s3=self.options):
            yield


@contextmanager
def run_s3_server() -> Iterator[S3Server]:
    port = find_free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with (
        tempfile.NamedTemporaryFile(prefix="s3-server-", suffix=".log") as log,
        subprocess.Popen(command, stdout=log, stderr=log) as process,
    ):
        try:
            server = S3Server(f"http://127.0.0.1:{port}", Path(log.name))
            _wait_for(server.url, process)
            fsspec.filesystem("s3", **server.options).mkdir("bucket")
            yield server
        finally:
            process.terminate()


def _wait_for(url: str, process: "subprocess.Popen[bytes]") -> None:
    end = time.monotonic() + _START_SECONDS
    while time.monotonic() < end and process.poll() is None:
        try:
            urlopen(url).close()
            return
        except (URLError, ConnectionError):
            time.sleep(0.05)
    raise RuntimeError(f"the S3 server did not start; exit code {process.poll()}")
