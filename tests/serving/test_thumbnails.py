import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest
from PIL import Image

from captionlib.errors import BusyError, DecodeError, FetchError
from captionlib.serving.config import ServingConfig
from captionlib.serving.thumbnails import Thumbnails


def write_image(path: Path, size: tuple[int, int] = (300, 200)) -> str:
    Image.effect_noise(size, 90).convert("RGB").save(path)
    return str(path)


def test_prune_keeps_recently_used_thumbnails(tmp_path: Path) -> None:
    uris = [write_image(tmp_path / f"{number}.png") for number in range(6)]
    with Thumbnails(tmp_path / "thumbnails", ServingConfig(max_thumbnail_bytes=1)) as thumbnails:
        sizes = [len(thumbnails.get(uri, "small")) for uri in uris]
        thumbnails._max_bytes = 2 * max(sizes) + 10
        thumbnails.get(uris[0], "small")
        thumbnails.prune()
    stored = list((tmp_path / "thumbnails").rglob("*.jpg"))
    assert 1 <= len(stored) <= 2
    assert not list((tmp_path / "thumbnails").rglob("*.partial"))


def test_failures_are_cached(tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"not an image")
    with Thumbnails(tmp_path / "thumbnails", ServingConfig()) as thumbnails:
        with pytest.raises(FetchError):
            thumbnails.get(str(tmp_path / "nothing.png"), "small")
        with pytest.raises(DecodeError):
            thumbnails.get(str(tmp_path / "broken.png"), "small")
        uri = write_image(tmp_path / "broken.png")
        with pytest.raises(DecodeError):
            thumbnails.get(uri, "small")
        thumbnails._failures.clear()
        assert thumbnails.get(uri, "small")


def test_too_many_concurrent_images_raise_busy_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Thumbnails(tmp_path / "thumbnails", ServingConfig(max_concurrent_images=1)) as thumbnails:
        real = thumbnails._slots.acquire
        monkeypatch.setattr(thumbnails._slots, "acquire", lambda timeout: real(timeout=0.01))
        assert real()
        with pytest.raises(BusyError):
            thumbnails.get(write_image(tmp_path / "a.png"), "small")
        thumbnails._slots.release()
        assert thumbnails.get(str(tmp_path / "a.png"), "small")


def test_large_thumbnail_shows_the_whole_image(tmp_path: Path) -> None:
    sizes = {"wide": (400, 250), "high": (250, 400), "square": (300, 300)}
    with Thumbnails(tmp_path / "thumbnails", ServingConfig()) as thumbnails:
        for name, (width, height) in sizes.items():
            path = tmp_path / f"{name}.jpg"
            Image.new("RGB", (width, height), "teal").save(path)
            content = thumbnails.get(str(path), "large")
            (tmp_path / "back.jpg").write_bytes(content)
            with Image.open(tmp_path / "back.jpg") as image:
                assert image.size[0] / image.size[1] == pytest.approx(width / height, abs=0.01)


class CountingHandler(SimpleHTTPRequestHandler):
    """Serves a folder and records the requests."""

    requests: ClassVar[list[str]] = []

    def log_message(self, *_: object) -> None:
        self.requests.append(self.path)


@pytest.fixture
def web(tmp_path: Path) -> Iterator[str]:
    CountingHandler.requests.clear()
    write_image(tmp_path / "a.png")
    handler = partial(CountingHandler, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_private_hosts_are_rejected_unless_allowed(tmp_path: Path, web: str) -> None:
    with Thumbnails(tmp_path / "thumbnails", ServingConfig(allow_private_hosts=True)) as thumbnails:
        assert thumbnails.get(f"{web}/a.png", "small")
    CountingHandler.requests.clear()
    with (
        Thumbnails(tmp_path / "thumbnails", ServingConfig()) as thumbnails,  # nor is the stored thumbnail returned
        pytest.raises(FetchError) as caught,
    ):
        thumbnails.get(f"{web}/a.png", "small")
    assert caught.value.reason == "ForbiddenHost"
    assert CountingHandler.requests == []


@pytest.mark.parametrize("chain", ["simplecache::{web}/a.png", "reference://x::{web}/a.png", "zip://a::{web}/a.png"])
def test_chained_addresses_are_not_downloaded(tmp_path: Path, web: str, chain: str) -> None:
    with (
        Thumbnails(tmp_path / "thumbnails", ServingConfig(allow_private_hosts=True)) as thumbnails,
        pytest.raises(FetchError) as caught,
    ):
        thumbnails.get(chain.format(web=web), "small")
    assert caught.value.reason == "BadAddress"
    assert CountingHandler.requests == []


def test_threads_get_the_same_thumbnail(tmp_path: Path) -> None:
    uri = write_image(tmp_path / "a.png")
    contents: list[bytes] = []
    with Thumbnails(tmp_path / "thumbnails", ServingConfig()) as thumbnails:
        threads = [threading.Thread(target=lambda: contents.append(thumbnails.get(uri, "small"))) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(contents) == 8
    assert len(set(contents)) == 1
