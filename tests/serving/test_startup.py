"""The application that `captionlib serve` loads in each process."""

import io
import socket
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from fastapi.testclient import TestClient
from PIL import Image

from captionlib.config import to_dict
from captionlib.serving.config import ServingConfig
from captionlib.serving.server import configure_server, listen
from captionlib.serving.startup import AppConfig, load_app
from tests.serving.example_site import make_ranker, make_site


def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **limits: Any) -> TestClient:
    """Loads an application with a ranker and two sentences."""
    make_site(tmp_path, 10)
    ranker, opened = make_ranker(), [("ranker", "cpu")]
    monkeypatch.setattr(
        "captionlib.models.families.ranker.open_ranker", lambda *given: ranker if given in opened else None
    )
    (tmp_path / "sentences.txt").write_text("a dog runs\na cat\n")
    config = AppConfig(
        index=str(tmp_path / "index"),
        thumbnails=str(tmp_path / "thumbnails"),
        ranker="ranker",
        sentences=str(tmp_path / "sentences.txt"),
        device="cpu",
        serving=ServingConfig(allowed_hosts=("testserver",), **limits),
    )
    return TestClient(load_app(config))


def upload(client: TestClient) -> Any:
    content = io.BytesIO()
    Image.new("RGB", (40, 30), "teal").save(content, "PNG")
    return client.post("/api/v1/image-search", files={"image": ("a.png", content.getvalue())})


def test_ranker_and_sentences_of_the_configuration_are_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with load(tmp_path, monkeypatch) as client:
        result = upload(client).json()
        found = client.get("/api/v1/search", params={"q": "a dog", "mode": "sentence"})
    assert {row["sentence"] for row in result["sentences"]} == {"a dog runs", "a cat"}
    assert len(result["images"]) == 10
    assert found.status_code == 200


def test_limits_of_the_configuration_apply_to_uploads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with load(tmp_path, monkeypatch, max_image_pixels=1199) as client:
        assert upload(client).status_code == 400


def test_errors_of_image_searches_are_documented(tmp_path: Path) -> None:
    make_site(tmp_path, 10, with_models=False)
    config = AppConfig(index=str(tmp_path / "index"), thumbnails=str(tmp_path / "thumbnails"))
    paths = load_app(config).openapi()["paths"]
    responses = paths["/api/v1/image-search"]["post"]["responses"]
    assert {"400", "404", "408", "413", "503"} <= responses.keys()
    types = {status: list(response["content"]) for status, response in responses.items()}
    assert (types["200"], types["400"]) == (["application/json"], ["application/problem+json"])


def test_limits_of_the_api_are_in_its_description(tmp_path: Path) -> None:
    make_site(tmp_path, 10, with_models=False)
    config = AppConfig(index=str(tmp_path / "index"), thumbnails=str(tmp_path / "thumbnails"))
    schema = load_app(config).openapi()
    assert [tag["name"] for tag in schema["tags"]] == ["Search", "Caption", "Monitoring"]
    limits = {
        path: next(each["schema"] for each in schema["paths"][path]["get"]["parameters"] if each["name"] == "limit")
        for path in ("/api/v1/search", "/api/v1/failures")
    }
    assert [(each["minimum"], each["default"], each["maximum"]) for each in limits.values()] == [
        (1, 20, 100),
        (1, 100, 100),
    ]


def test_default_limits() -> None:
    limits = to_dict(ServingConfig())
    assert limits == {
        "allowed_hosts": ["localhost", "127.0.0.1", "::1", "[::1]"],
        "max_upload_bytes": 16 * 2**20,
        "max_concurrent_uploads": 4,
        "max_waiting_uploads": 64,
        "max_concurrent_fetches": 32,
        "max_requests_per_client": 64,
        "body_timeout_seconds": 20,
        "max_image_pixels": 50_000_000,
        "image_timeout_seconds": 10,
        "max_thumbnail_bytes": 2**30,
        "max_exported_images": 1000,
        "max_export_bytes": 2**30,
        "max_concurrent_exports": 2,
        "allow_private_hosts": False,
        "log_requests": False,
    }


@pytest.mark.parametrize(("host", "family"), [("127.0.0.1", socket.AF_INET), ("::1", socket.AF_INET6)])
def test_server_listens_on_both_kinds_of_addresses(host: str, family: socket.AddressFamily) -> None:
    with listen(host, 0) as server_socket:
        assert server_socket.family == family


def test_server_limits_headers_and_does_not_describe_itself() -> None:
    server = configure_server(lambda: None)
    assert (server.h11_max_incomplete_event_size, server.timeout_graceful_shutdown) == (2**17, 5)
    assert (server.ws, server.server_header, server.access_log) == ("none", False, False)


def test_threads_share_one_heap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = mock.Mock()
    monkeypatch.setattr("captionlib.serving.startup.ctypes.CDLL", lambda _name: library)
    make_site(tmp_path, 10, with_models=False)
    load_app(AppConfig(index=str(tmp_path / "index"), thumbnails=str(tmp_path / "thumbnails")))
    m_arena_max = -8  # in glibc's malloc.h
    assert library.mallopt.mock_calls == [mock.call(m_arena_max, 1)]
