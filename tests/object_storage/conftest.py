from collections.abc import Iterator
from io import BytesIO

import fsspec
import pytest
from PIL import Image
from tenacity import stop_after_delay, wait_none

from benchmarks.s3_server import run_s3_server
from captionlib.storage import retries
from tests.object_storage.faults import FaultyProxy, never

COLORS = ["red", "green", "blue", "yellow", "purple", "orange", "black", "white"]


@pytest.fixture(scope="session")
def store() -> Iterator[str]:
    """The address of an S3 server in a separate process, with images in the bucket `bucket`."""
    pytest.importorskip("s3fs")
    with run_s3_server() as server:
        bucket = fsspec.filesystem("s3", **server.options)
        for color in COLORS:
            content = BytesIO()
            Image.new("RGB", (80, 60), color).save(content, "PNG")
            bucket.pipe_file(f"bucket/images/{color}.png", content.getvalue())
        bucket.pipe_file("bucket/images/broken.png", content.getvalue()[:40])
        yield server.url


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
