from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from captionlib.data.shards.dataset import open_dataset
from captionlib.serving import service as service_module
from captionlib.serving.service import Search, SearchService
from tests.search.example_index import Row, make_rows, write_captions_dataset, write_embeddings_dataset
from tests.search.test_live_index import update
from tests.serving.example_site import make_site


def rewrite(folder: Path, rows: list[Row]) -> None:
    write_captions_dataset(str(folder / "captions"), {0: rows}, 1, existing=open_dataset(folder / "captions"))
    write_embeddings_dataset(str(folder / "embeddings"), {0: rows}, 1)
    update(str(folder))


def test_server_changes_to_a_new_version_while_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service_module, "_REFRESH_SECONDS", 0.01)
    app = make_site(tmp_path, 10, with_models=False)
    with TestClient(app) as client:
        before = client.get("/health").json()["index"]
        assert client.get("/api/v1/search?q=giraffe").json()["total"] == 0
        rewrite(tmp_path, [("new", "a giraffe", -1.0), *make_rows(3)])
        for _ in range(10_000):
            if client.get("/health").json()["index"] != before:
                break
        assert client.get("/api/v1/search?q=giraffe").json()["total"] == 1
        image = client.get("/api/v1/image?id=new").json()
        assert [candidate["caption"] for candidate in image["candidates"]] == ["a giraffe", "a dog"]
        assert client.get("/api/v1/image?id=gone").status_code == 404
        assert "4 images" in client.get("/", headers={"accept": "text/html"}).text


def test_request_uses_one_version_throughout(tmp_path: Path) -> None:
    service: SearchService = make_site(tmp_path, 10, with_models=False).state.service
    snapshot = service.snapshot()
    rewrite(tmp_path, [("new", "a giraffe", -1.0)])
    assert service.index.refresh()
    assert snapshot.get_image("gone").candidates
    assert snapshot.search(Search("giraffe"), 0, 5).total == 0
    assert service.snapshot().search(Search("giraffe"), 0, 5).total == 1
    before, after = (each.search(Search("dog", "text"), 0, 5).facets for each in (snapshot, service.snapshot()))
    assert before is not None
    assert after is not None
    assert (before.splits.keys(), after.splits.keys()) == ({"train", "val"}, {"test"})
