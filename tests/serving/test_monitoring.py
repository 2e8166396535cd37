import asyncio
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families
from starlette.requests import ClientDisconnect

from captionlib.serving.config import ServingConfig
from captionlib.serving.monitoring import Monitoring

from .example_site import make_site
from .test_pages import make_png


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    config = ServingConfig(allowed_hosts=("testserver",), log_requests=True)
    app = make_site(tmp_path_factory.mktemp("site"), 20, config, with_captioner=True)
    with TestClient(app, raise_server_exceptions=False) as client:
        yield client


def read_metrics(client: TestClient) -> dict[tuple[str, ...], float]:
    families = text_string_to_metric_families(client.get("/metrics").text)
    return {
        (sample.name, *(sample.labels[name] for name in sorted(sample.labels) if name != "le")): sample.value
        for family in families
        for sample in family.samples
        if not sample.name.endswith(("_created", "_bucket"))
    }


def test_metrics_count_requests_thumbnails_and_models(client: TestClient) -> None:
    before = read_metrics(client)
    client.get("/api/v1/search?q=dog")
    client.get("/api/v1/search?q=dog&limit=0")
    client.get("/nothing/1")
    client.get("/nothing/2")
    client.request("FOO", "/nothing/3")
    for image in ("im1", "im1", "gone", "gone"):
        client.get(f"/thumbnail/small?id={image}")
    client.post("/api/v1/caption", files=[("images", ("x.png", make_png(), "image/png"))] * 2)
    counts = {name: value - before.get(name, 0) for name, value in read_metrics(client).items()}
    assert counts[("captionlib_requests_total", "/api/v1/search", "GET", "200")] == 1
    assert counts[("captionlib_requests_total", "/api/v1/search", "GET", "422")] == 1
    assert counts[("captionlib_requests_total", "other", "GET", "404")] == 2
    assert counts[("captionlib_request_seconds_count", "/api/v1/search")] == 2
    thumbnails = [counts[("captionlib_thumbnails_total", result)] for result in ("created", "stored", "failed")]
    assert thumbnails == [1, 1, 2]
    assert counts[("captionlib_requests_total", "other", "other", "404")] == 1
    assert counts[("captionlib_model_seconds_count", "caption")] == 2


def test_requests_are_not_logged_by_default(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with TestClient(make_site(tmp_path, 10, ServingConfig(allowed_hosts=("testserver",)))) as client:
        assert client.get("/api/v1/search?q=dog").status_code == 200
    assert capsys.readouterr().err == ""


def test_requests_are_logged_without_their_queries(client: TestClient, capsys: pytest.CaptureFixture[str]) -> None:
    client.get("/api/v1/search?q=secret")
    client.get("/nothing")
    first, second = map(json.loads, capsys.readouterr().err.splitlines())
    assert (first["method"], first["path"], first["status"]) == ("GET", "/api/v1/search", 200)
    assert "secret" not in json.dumps(first)
    assert first["client"] == "testclient"
    assert 0 < first["seconds"] < 60
    assert second["status"] == 404


def test_failure_of_the_server_is_a_problem_without_a_stack_trace(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = read_metrics(client)
    monkeypatch.setattr(client.app.state.service, "snapshot", None)  # type: ignore[attr-defined]
    response = client.get("/api/v1/search?q=dog")
    failures = ("captionlib_requests_total", "/api/v1/search", "GET", "500")
    assert read_metrics(client)[failures] == before.get(failures, 0) + 1
    assert (response.status_code, response.json()["detail"]) == (500, "the server failed; see its log for the reason")
    assert client.get("/", headers={"accept": "text/html"}).text.count("Traceback") == 0


def test_disconnected_client_is_recorded(
    client: TestClient, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async def disconnect(*_: object) -> None:
        raise ClientDisconnect

    monkeypatch.setattr("captionlib.serving.api.process_upload", disconnect)
    assert client.post("/api/v1/image-search", files={"image": ("x.png", b"")}).status_code == 499

    async def end_without_response(*_: object) -> None:
        pass

    scope = {"type": "http", "method": "GET", "path": "/"}
    asyncio.run(Monitoring(end_without_response, log_requests=True)(scope, None, None))  # type: ignore[arg-type]
    assert [json.loads(line)["status"] for line in capsys.readouterr().err.splitlines()] == [499, 499]


def test_metrics_of_several_processes_are_added_up(tmp_path: Path) -> None:
    program = "from captionlib.serving.monitoring import *; THUMBNAILS.labels('stored').inc(); "
    environment = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    for _ in range(2):
        command = [sys.executable, "-c", program + "print(format_metrics().decode())"]
        output = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    assert 'captionlib_thumbnails_total{result="stored"} 2.0' in output


def test_images_are_captioned_one_by_one(client: TestClient) -> None:
    files = [("images", (name, content, "image/png")) for name, content in (("a", make_png()), ("b", b"text"))]
    first, second = client.post("/api/v1/caption", files=files).json()["images"]
    assert (first["name"], first["captions"][0]["caption"], first["problem"]) == ("a", "a teal square", None)
    assert first["captions"][0]["word_probability"] == pytest.approx(math.exp(-1.5 / 4)), "four tokens, one of them END"
    assert (second["captions"], second["problem"]["reason"]) == ([], "NotAnImage")
    too_many = [("images", ("x.png", b"", "image/png"))] * 17
    assert client.post("/api/v1/caption", files=too_many).status_code == 422
    assert len(client.post("/api/v1/caption", files=too_many[1:]).json()["images"]) == 16
