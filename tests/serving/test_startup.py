"""The application that `captionlib serve` loads in each process."""

import io
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from fastapi.testclient import TestClient
from PIL import Image

from captionlib.serving.config import ServingConfig
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
    assert {"400", "404", "408", "413", "503"} <= paths["/api/v1/image-search"]["post"]["responses"].keys()


def test_threads_share_one_heap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = mock.Mock()
    monkeypatch.setattr("captionlib.serving.startup.ctypes.CDLL", lambda _name: library)
    make_site(tmp_path, 10, with_models=False)
    load_app(AppConfig(index=str(tmp_path / "index"), thumbnails=str(tmp_path / "thumbnails")))
    m_arena_max = -8  # in glibc's malloc.h
    assert library.mallopt.mock_calls == [mock.call(m_arena_max, 1)]
