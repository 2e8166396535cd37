import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from captionlib.serving import job_page
from captionlib.serving.job_page import create_job_app
from tests.data.shards.test_inspection import write


@pytest.fixture
def client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[TestClient]:
    monkeypatch.setattr(job_page, "_MIN_RENDER_INTERVAL_SECONDS", -1.0)
    monkeypatch.setattr(job_page, "_MAX_BUSY_FRACTION", 1.0)
    write(tmp_path / "data", done=1)
    with TestClient(
        create_job_app(tmp_path / "data", ["localhost", "www.evil.example"]), base_url="http://localhost"
    ) as client:
        yield client


def test_page_follows_the_dataset(client: TestClient, tmp_path: Path) -> None:
    assert "1 of 3 done" in " ".join(client.get("/").text.replace("<small>", " ").split())
    write(tmp_path / "data", done=3)
    assert "3 of 3 done" in " ".join(client.get("/").text.replace("<small>", " ").split())


@pytest.mark.parametrize(("interval_seconds", "busy_fraction"), [(60.0, 1.0), (-1.0, 1e-9)])
def test_page_is_not_rendered_again_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interval_seconds: float, busy_fraction: float
) -> None:
    monkeypatch.setattr(job_page, "_MIN_RENDER_INTERVAL_SECONDS", interval_seconds)
    monkeypatch.setattr(job_page, "_MAX_BUSY_FRACTION", busy_fraction)
    write(tmp_path / "data", done=1)
    with TestClient(create_job_app(tmp_path / "data", ["localhost"]), base_url="http://localhost") as client:
        first = client.get("/").text
        write(tmp_path / "data", done=3)
        assert client.get("/").text == first


def test_page_has_a_strict_policy_and_no_inline_code(client: TestClient) -> None:
    response = client.get("/")
    assert "script-src 'self'; style-src 'self'" in response.headers["content-security-policy"]
    assert "<style" not in response.text
    assert "style=" not in response.text
    assert response.headers["cache-control"] == "no-store"
    for name in ("page.css", "failures.css", "dataset.css", "live.js"):
        assert f'"/{name}"' in response.text
        media_type = "text/css" if name.endswith("css") else "text/javascript"
        assert client.get(f"/{name}").headers["content-type"] == f"{media_type}; charset=utf-8"


def test_page_says_that_the_dataset_is_gone_and_recovers(client: TestClient, tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "data")
    response = client.get("/")
    assert response.status_code == 503
    assert "is not a captionlib dataset" in response.text
    write(tmp_path / "data", done=1)
    assert client.get("/").status_code == 200


def test_other_hosts_are_rejected(client: TestClient) -> None:
    assert client.get("/", headers={"host": "evil.example"}).status_code == 400
