import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from io import BytesIO
from urllib.error import URLError
from urllib.request import urlopen

import fsspec
import pytest
from PIL import Image
from tenacity import stop_after_delay, wait_none

from captionlib.storage import retries
from tests.object_storage.faults import FaultyProxy, never

COLORS = ["red", "green", "blue", "yellow", "purple", "orange", "black", "white"]


@pytest.fixture(scope="session")
def store() -> Iterator[str]:
    """The address of an S3 server in a separate process, with images in the bucket `bucket`."""
    pytest.importorskip("s3fs")
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        url = f"http://127.0.0.1:{port}"
        _wait_for(url, process)
        bucket = fsspec.filesystem("s3", **options(url))
        bucket.mkdir("bucket")
        for color in COLORS:
            content = BytesIO()
            Image.new("RGB", (80, 60), color).save(content, "PNG")
            bucket.pipe_file(f"bucket/images/{color}.png", content.getvalue())
        bucket.pipe_file("bucket/images/broken.png", content.getvalue()[:40])
        yield url
    finally:
        process.terminate()
        process.wait()


def _wait_for(url: str, process: "subprocess.Popen[bytes]") -> None:
    end = time.monotonic() + 60
    while time.monotonic() < end and process.poll() is None:
        try:
            urlopen(url).close()
            return
        except (URLError, ConnectionError):
            time.sleep(0.05)
    raise RuntimeError(f"the S3 server did not start; exit code {process.poll()}")


def options(url: str) -> dict[str, object]:
    """Returns options for s3fs: a server that checks no signatures, and no retries, so that every fault counts."""
    return {
        "key": "x",
        "secret": "x",
        "endpoint_url": url,
        "config_kwargs": {"retries": {"total_max_attempts": 1}, "read_timeout": 0.5},
    }


@pytest.fixture(scope="session")
def proxy_of_session(store: str) -> Iterator[FaultyProxy]:
    with FaultyProxy(store) as proxy:
        yield proxy


@pytest.fixture
def proxy(proxy_of_session: FaultyProxy, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    """A proxy for `s3://`. Clients do not retry, and captionlib retries without waiting."""
    import s3fs

    proxy_of_session.requests.clear()
    monkeypatch.setitem(fsspec.config.conf, "s3", options(proxy_of_session.url))
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
    monkeypatch.setattr(retries._retrying, "wait", wait_none())
    monkeypatch.setattr(retries._retrying, "stop", stop_after_delay(20))
    yield proxy_of_session
    proxy_of_session.choose = never
