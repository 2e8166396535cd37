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


def draw(path: Path, size: tuple[int, int] = (300, 200)) -> str:
    Image.effect_noise(size, 90).convert("RGB").save(path)
    return str(path)


def test_the_ones_looked_at_last_are_kept(tmp_path: Path) -> None:
    uris = [draw(tmp_path / f"{number}.png") for number in range(6)]
    with Thumbnails(tmp_path / "kept", ServingConfig(thumbnail_bytes=1)) as thumbnails:
        sizes = [len(thumbnails.get(uri, "small")) for uri in uris]
        thumbnails._max_bytes = 2 * max(sizes) + 10
        thumbnails.get(uris[0], "small")
        thumbnails.prune()
    kept = list((tmp_path / "kept").rglob("*.jpg"))
    assert 1 <= len(kept) <= 2
    assert not list((tmp_path / "kept").rglob("*.partial"))


def test_failures_are_remembered_for_a_while(tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"no image at all")
    with Thumbnails(tmp_path / "kept", ServingConfig()) as thumbnails:
        with pytest.raises(FetchError):
            thumbnails.get(str(tmp_path / "nothing.png"), "small")
        with pytest.raises(DecodeError):
            thumbnails.get(str(tmp_path / "broken.png"), "small")
        uri = draw(tmp_path / "broken.png")
        with pytest.raises(DecodeError):
            thumbnails.get(uri, "small")
        thumbnails._failures.clear()
        assert thumbnails.get(uri, "small")


def test_more_than_are_fetched_at_a_time_are_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Thumbnails(tmp_path / "kept", ServingConfig(max_photos=1)) as thumbnails:
        real = thumbnails._slots.acquire
        monkeypatch.setattr(thumbnails._slots, "acquire", lambda timeout: real(timeout=0.01))
        assert real()
        with pytest.raises(BusyError):
            thumbnails.get(draw(tmp_path / "a.png"), "small")
        thumbnails._slots.release()
        assert thumbnails.get(str(tmp_path / "a.png"), "small")


def test_a_large_picture_is_the_whole_image(tmp_path: Path) -> None:
    sizes = {"wide": (400, 250), "high": (250, 400), "square": (300, 300)}
    with Thumbnails(tmp_path / "kept", ServingConfig()) as thumbnails:
        for name, (width, height) in sizes.items():
            path = tmp_path / f"{name}.jpg"
            Image.new("RGB", (width, height), "teal").save(path)
            content = thumbnails.get(str(path), "large")
            (tmp_path / "back.jpg").write_bytes(content)
            with Image.open(tmp_path / "back.jpg") as image:
                assert image.size[0] / image.size[1] == pytest.approx(width / height, abs=0.01)


class Counting(SimpleHTTPRequestHandler):
    """Serves a folder, and counts requests."""

    requests: ClassVar[list[str]] = []

    def log_message(self, *_: object) -> None:
        self.requests.append(self.path)


@pytest.fixture
def web(tmp_path: Path) -> Iterator[str]:
    Counting.requests.clear()
    draw(tmp_path / "a.png")
    handler = partial(Counting, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_private_hosts_are_not_shown_unless_they_are_allowed(tmp_path: Path, web: str) -> None:
    with Thumbnails(tmp_path / "kept", ServingConfig(allow_private_hosts=True)) as thumbnails:
        assert thumbnails.get(f"{web}/a.png", "small")
    Counting.requests.clear()
    with (
        Thumbnails(tmp_path / "kept", ServingConfig()) as thumbnails,  # the kept picture is not shown either
        pytest.raises(FetchError) as caught,
    ):
        thumbnails.get(f"{web}/a.png", "small")
    assert caught.value.reason == "ForbiddenHost"
    assert Counting.requests == []


@pytest.mark.parametrize("chain", ["simplecache::{web}/a.png", "reference://x::{web}/a.png", "zip://a::{web}/a.png"])
def test_chained_addresses_are_not_downloaded(tmp_path: Path, web: str, chain: str) -> None:
    with (
        Thumbnails(tmp_path / "kept", ServingConfig(allow_private_hosts=True)) as thumbnails,
        pytest.raises(FetchError) as caught,
    ):
        thumbnails.get(chain.format(web=web), "small")
    assert caught.value.reason == "BadAddress"
    assert Counting.requests == []


def test_many_threads_get_the_same_picture(tmp_path: Path) -> None:
    uri = draw(tmp_path / "a.png")
    pictures: list[bytes] = []
    with Thumbnails(tmp_path / "kept", ServingConfig()) as thumbnails:
        threads = [threading.Thread(target=lambda: pictures.append(thumbnails.get(uri, "small"))) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(pictures) == 8
    assert len(set(pictures)) == 1
