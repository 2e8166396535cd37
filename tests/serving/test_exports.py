import asyncio
import io
import json
import tarfile
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from captionlib.data.sources.rows import SkipCounter, SourceOptions
from captionlib.data.sources.webdataset import read_webdataset
from captionlib.errors import BusyError, FetchError
from captionlib.serving.config import ServingConfig
from captionlib.serving.exports import Exports
from tests.serving.example_site import make_site

ROW = {"uri": "u", "split": "val", "caption": "a dog", "log_prob": -1.0, "width": 1, "height": 1}
GIF = b"GIF89a" + bytes(100)


def export(config: ServingConfig, contents: Mapping[str, bytes | Exception]) -> dict[str, bytes]:
    """Returns the members of an exported tar by name. An image id is also the address of the image."""

    async def fetch(uri: str) -> bytes:
        content = contents[uri]
        if isinstance(content, Exception):
            raise content
        return content

    async def collect() -> bytes:
        rows = [{**ROW, "image_id": uri, "uri": uri} for uri in contents]
        parts = [part async for part in Exports(config).start(rows, fetch)]
        assert all(0 < len(part) <= 2**16 for part in parts)
        return b"".join(parts)

    with tarfile.open(fileobj=io.BytesIO(asyncio.run(collect()))) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]


def test_images_that_cannot_be_exported_are_listed_in_the_tar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("captionlib.serving.exports._MAX_TRIES", 1)
    contents = {"a": GIF, "b": FetchError("NotFound", "secret"), "c": b"no image", "d": BusyError("busy"), "e": GIF}
    members = export(ServingConfig(), contents)
    assert [name for name in members if name.endswith(".gif")] == ["selection-000000.gif", "selection-000004.gif"]
    failures = [json.loads(line) for line in members["__failures__"].splitlines()]
    assert [(each["image_id"], each["reason"]) for each in failures] == [
        ("b", "NotFound"),
        ("c", "UnknownFormat"),
        ("d", "Busy"),
    ]
    assert json.loads(members["selection-000000.json"]) == {"image_id": "a"} | {
        name: value for name, value in ROW.items() if name != "uri"
    }


def test_a_large_image_is_sent_in_small_parts() -> None:
    image = GIF + bytes(300_000)
    assert export(ServingConfig(), {"a": image})["selection-000000.gif"] == image


def test_export_stops_at_its_maximum_size() -> None:
    members = export(ServingConfig(max_export_bytes=2 * len(GIF)), {str(number): GIF for number in range(20)})
    assert sum(name.endswith(".gif") for name in members) == 2
    assert len(members["__failures__"].splitlines()) == 18


def test_export_waits_for_a_busy_server(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[int] = []

    async def wait(seconds: int) -> None:
        waits.append(seconds)

    monkeypatch.setattr("captionlib.serving.exports.asyncio.sleep", wait)
    assert b"Busy" in export(ServingConfig(), {"a": BusyError("busy")})["__failures__"]
    assert waits == [0, 1, 2, 3, 4, 5]
    assert "__failures__" not in export(ServingConfig(), {"a": GIF})


def test_exports_at_once_are_limited() -> None:
    async def run() -> None:
        exports = Exports(ServingConfig(max_concurrent_exports=1))

        async def fetch(_: str) -> bytes:
            return GIF

        parts = exports.start([{**ROW, "image_id": str(number)} for number in range(40)], fetch)
        assert await anext(parts)
        with pytest.raises(BusyError):
            exports.start([], fetch)
        await parts.aclose()  # type: ignore[attr-defined]  # the client disconnects
        assert [part async for part in exports.start([], fetch)]

    asyncio.run(run())


def test_exports_that_start_at_the_same_moment_wait_for_each_other() -> None:
    running: list[int] = []
    most = 0

    async def fetch(_: str) -> bytes:
        nonlocal most
        running.append(1)
        most = max(most, len(running))
        await asyncio.sleep(0)
        running.pop()
        return GIF

    async def collect(parts: AsyncIterator[bytes]) -> bytes:
        return b"".join([part async for part in parts])

    async def run() -> None:
        exports = Exports(ServingConfig(max_concurrent_exports=1))
        started = [exports.start([{**ROW, "image_id": "0"}], fetch) for _ in range(3)]
        assert all(await asyncio.gather(*map(collect, started)))

    asyncio.run(run())
    assert most == 1


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    config = ServingConfig(allowed_hosts=("testserver",), max_exported_images=5)
    with TestClient(make_site(tmp_path_factory.mktemp("site"), 10, config, with_models=False)) as client:
        yield client


def test_selection_is_a_webdataset_that_prepare_reads(client: TestClient, tmp_path: Path) -> None:
    response = client.post("/export", data={"id": ["im3", "gone", "im1", "nothing"], "format": "webdataset"})
    assert response.headers["content-disposition"] == 'attachment; filename="selection.tar"'
    (tmp_path / "selection.tar").write_bytes(response.content)
    skips = SkipCounter()
    rows = list(read_webdataset([str(tmp_path / "selection.tar")], SourceOptions(id_column="image_id"), skips))
    assert [(row.image_id, row.captions) for row in rows] == [
        ("im3", ("a dog and a horse",)),
        ("im1", ("a dog and a frisbee",)),
    ]
    assert b"/images/" not in response.content, "the addresses of images are private"


def test_selection_of_too_many_images_is_an_error(client: TestClient) -> None:
    ids = [f"im{number}" for number in range(6)]
    assert client.post("/export", data={"id": ids[:5], "format": "webdataset"}).status_code == 200
    response = client.post("/export", data={"id": ids, "format": "webdataset"})
    assert (response.status_code, "at most 5 selected images, got 6" in response.text) == (422, True)
