import asyncio
import io
import os
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from PIL import Image

from captionlib.errors import BusyError, DecodeError, FetchError
from captionlib.serving.config import ServingConfig
from captionlib.serving.thumbnails import Thumbnails, ThumbnailSize, create_thumbnails, remove_thumbnails


def get(thumbnails: Thumbnails, uri: str, size: ThumbnailSize = "small") -> bytes:
    return asyncio.run(thumbnails.get(uri, size))


def write_image(path: Path, size: tuple[int, int] = (300, 200)) -> str:
    Image.effect_noise(size, 90).convert("RGB").save(path)
    return str(path)


def test_prune_removes_the_least_recently_used_thumbnails(tmp_path: Path) -> None:
    with Thumbnails(tmp_path / "thumbnails", ServingConfig(max_thumbnail_bytes=1)) as thumbnails:
        paths = []
        for number in range(4):
            uri = write_image(tmp_path / f"{number}.png")
            get(thumbnails, uri)
            (path,) = set((tmp_path / "thumbnails").rglob("*.jpg")) - set(paths)
            os.utime(path, (number, number))
            paths.append(path)
        get(thumbnails, str(tmp_path / "0.png"))
        thumbnails._max_bytes = paths[0].stat().st_size + paths[3].stat().st_size
        thumbnails.prune()
        assert set((tmp_path / "thumbnails").rglob("*.jpg")) == {paths[0], paths[3]}, "reading 0 has made it recent"
        thumbnails._max_bytes -= 1
        thumbnails.prune()
        assert list((tmp_path / "thumbnails").rglob("*.jpg")) == [paths[0]]
    assert not list((tmp_path / "thumbnails").rglob("*.partial"))


def test_thumbnails_are_pruned_after_a_number_of_new_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("captionlib.serving.thumbnails._PRUNE_EVERY", 3)
    with Thumbnails(tmp_path / "thumbnails", ServingConfig(max_thumbnail_bytes=1)) as thumbnails:
        counts = []
        for number in range(4):
            get(thumbnails, write_image(tmp_path / f"{number}.png"))
            counts.append(len(list((tmp_path / "thumbnails").rglob("*.jpg"))))
    assert counts == [1, 2, 0, 1]


def test_failures_are_cached_for_a_short_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr("captionlib.serving.thumbnails.monotonic", lambda: now)
    uri = str(tmp_path / "late.png")
    with Thumbnails(tmp_path / "thumbnails", ServingConfig()) as thumbnails:
        with pytest.raises(FetchError):
            get(thumbnails, uri)
        Path(uri).write_bytes(b"not an image")
        now += 29
        with pytest.raises(FetchError):
            get(thumbnails, uri)
        now += 2
        with pytest.raises(DecodeError):
            get(thumbnails, uri)
        write_image(Path(uri))
        with pytest.raises(DecodeError):
            get(thumbnails, uri)
        now += 31
        assert get(thumbnails, uri)


def test_cached_failure_keeps_no_traceback(tmp_path: Path) -> None:
    with Thumbnails(tmp_path / "thumbnails", ServingConfig()) as thumbnails:
        for _ in range(3):
            with pytest.raises(FetchError) as caught:
                get(thumbnails, str(tmp_path / "nothing.png"))
        assert caught.value.reason == "NotFound"
        (cached,) = thumbnails._failures.values()
        assert (cached.__traceback__, cached.__cause__) == (None, None)


class SlowFetcher:
    """Stands in for a fetcher of images on slow hosts."""

    def __init__(self, content: bytes) -> None:
        self.content = content
        self.fetched: list[str] = []
        self.gate = threading.Semaphore(0)

    def fetch(self, uri: str) -> bytes:
        self.fetched.append(uri)
        if "fast" not in uri:
            assert self.gate.acquire(timeout=10)
        return self.content


@pytest.fixture
def slow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Thumbnails, SlowFetcher]]:
    content = Path(write_image(tmp_path / "a.png")).read_bytes()
    fetcher = SlowFetcher(content)
    with Thumbnails(tmp_path / "thumbnails", ServingConfig(max_concurrent_fetches=4)) as thumbnails:
        monkeypatch.setattr(thumbnails, "_fetcher", fetcher)
        yield thumbnails, fetcher
        fetcher.gate.release(1000)


async def let_wait(thumbnails: Thumbnails, *uris: str) -> list[asyncio.Task[bytes]]:
    tasks = [asyncio.ensure_future(thumbnails.get(uri, "small")) for uri in uris]
    await asyncio.sleep(0.1)  # reading stored thumbnails takes a moment
    return tasks


def test_concurrent_requests_for_a_thumbnail_fetch_its_image_once(slow: tuple[Thumbnails, SlowFetcher]) -> None:
    thumbnails, fetcher = slow

    async def test() -> None:
        tasks = await let_wait(thumbnails, *["http://slow/a"] * 8)
        tasks[0].cancel()  # a client that disconnects does not end the fetch for the others
        fetcher.gate.release()
        contents = await asyncio.gather(*tasks[1:])
        assert len(set(contents)) == 1
        assert fetcher.fetched == ["http://slow/a"]
        assert await thumbnails.get("http://slow/a", "small") == contents[0]
        assert len(fetcher.fetched) == 1
        assert not thumbnails._in_progress

    asyncio.run(test())


def test_slow_host_does_not_delay_images_on_other_hosts(slow: tuple[Thumbnails, SlowFetcher]) -> None:
    thumbnails, fetcher = slow

    async def test() -> None:
        tasks = await let_wait(thumbnails, *(f"http://slow/{number}" for number in range(10)))
        assert await asyncio.wait_for(thumbnails.get("http://fast/a", "small"), 5)
        hosts = sorted(uri.split("/")[2] for uri in fetcher.fetched)
        assert hosts == ["fast", "slow"], "a host gets a quarter of the threads"
        fetcher.gate.release(100)
        assert len(await asyncio.gather(*tasks)) == 10

    asyncio.run(test())


def test_full_queue_raises_busy_error_at_once(slow: tuple[Thumbnails, SlowFetcher]) -> None:
    thumbnails, fetcher = slow

    async def test() -> None:
        tasks = await let_wait(thumbnails, *(f"http://slow/{number}" for number in range(20)))
        failed = [task for task in tasks if task.done()]
        assert len(failed) == 20 - 1 - 16, "one is fetched and four wait per thread"
        for task in failed:
            with pytest.raises(BusyError):
                task.result()
        assert len(thumbnails._failures) == 0, "that the server is busy says nothing about the image"
        fetcher.gate.release(100)
        await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(test())


@pytest.mark.parametrize(
    ("size", "expected"),
    [((400, 300), (400, 300)), ((1200, 300), (1200, 300)), ((3000, 20), (1280, 9)), ((90, 2560), (45, 1280))],
)
def test_large_thumbnail_shows_the_whole_image(
    tmp_path: Path, size: tuple[int, int], expected: tuple[int, int]
) -> None:
    image = Image.new("RGB", size, "black")
    image.paste("white", (0, 0, size[0] // 2, size[1] // 2))
    image.save(tmp_path / "a.png")
    with Thumbnails(tmp_path / "thumbnails", ServingConfig(max_concurrent_fetches=1)) as thumbnails:
        content = get(thumbnails, str(tmp_path / "a.png"), "large")
    with Image.open(io.BytesIO(content)) as large:
        assert large.size == expected
        assert np.asarray(large.convert("L")).mean() == pytest.approx(255 / 4, rel=0.1)


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
        assert get(thumbnails, f"{web}/a.png")
    CountingHandler.requests.clear()
    with (
        Thumbnails(tmp_path / "thumbnails", ServingConfig()) as thumbnails,  # nor is the stored thumbnail returned
        pytest.raises(FetchError) as caught,
    ):
        get(thumbnails, f"{web}/a.png")
    assert caught.value.reason == "ForbiddenHost"
    assert CountingHandler.requests == []


@pytest.mark.parametrize("chain", ["simplecache::{web}/a.png", "reference://x::{web}/a.png", "zip://a::{web}/a.png"])
def test_chained_addresses_are_not_downloaded(tmp_path: Path, web: str, chain: str) -> None:
    with (
        Thumbnails(tmp_path / "thumbnails", ServingConfig(allow_private_hosts=True)) as thumbnails,
        pytest.raises(FetchError) as caught,
    ):
        get(thumbnails, chain.format(web=web))
    assert caught.value.reason == "BadAddress"
    assert CountingHandler.requests == []


def test_thumbnails_created_ahead_are_served_without_the_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("captionlib.serving.thumbnails._BATCH", 2)
    paths = [tmp_path / f"{number}.png" for number in range(3)]
    for path in paths[:2]:
        Image.new("RGB", (90, 70), "teal").save(path)
    config = ServingConfig()
    assert create_thumbnails(tmp_path / "thumbnails", [str(path) for path in paths], config) == 1
    for path in paths[:2]:
        path.unlink()
    with Thumbnails(tmp_path / "thumbnails", config) as thumbnails:
        for path in paths[:2]:
            assert asyncio.run(thumbnails.get(str(path), "small")).startswith(b"\xff\xd8")
    uris = [str(path) for path in paths]
    assert create_thumbnails(tmp_path / "thumbnails", uris, config) == 1, "the others are stored"
    remove_thumbnails(tmp_path / "thumbnails", uris)
    assert not list((tmp_path / "thumbnails").rglob("*.jpg"))
