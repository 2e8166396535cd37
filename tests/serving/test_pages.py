import base64
import io
import math
import re
import threading
from collections.abc import Iterator
from html import unescape
from pathlib import Path
from urllib.parse import quote, urlencode

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from anyio.to_thread import current_default_thread_limiter
from fastapi.testclient import TestClient
from PIL import Image
from starlette.concurrency import run_in_threadpool

from captionlib.data.images.decoding import list_decodable_formats
from captionlib.data.shards.dataset import create_dataset
from captionlib.data.shards.schemas import DUPLICATES_SCHEMA
from captionlib.data.shards.writer import write_shard
from captionlib.errors import BusyError
from captionlib.search import filters
from captionlib.search.build import plan_build
from captionlib.search.config import IndexConfig
from captionlib.search.index import open_index
from captionlib.serving.app import create_app
from captionlib.serving.config import ServingConfig
from captionlib.serving.pages import _format_percent, _format_ratio, _list_dates
from captionlib.serving.problems import make_problem
from captionlib.serving.responses import SearchResult
from captionlib.serving.service import SearchService
from tests.search.example_index import write_captions_dataset

from .example_site import MALICIOUS, MODIFIED_NS, make_site

BROWSER = {"accept": "text/html"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("site")


@pytest.fixture(scope="module")
def client(folder: Path) -> Iterator[TestClient]:
    hosts = ("testserver", "www.example.org")
    config = ServingConfig(allowed_hosts=hosts, max_upload_bytes=200_000, max_image_pixels=1_000_000)
    with TestClient(make_site(folder, config=config)) as client:
        yield client


def make_png(size: tuple[int, int] = (80, 60)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, "teal").save(buffer, "PNG")
    return buffer.getvalue()


def test_search_supports_all_modes(client: TestClient) -> None:
    both = {"a dog and a cat", "a cat and a dog"}
    text = client.get("/api/v1/search", params={"q": "+dog +cat"}).json()
    assert {row["caption"] for row in text["results"]} == both
    assert (text["total"], text["next_cursor"]) == (len(text["results"]), None)
    first = client.get("/api/v1/search", params={"q": "+dog +cat", "limit": 1}).json()
    assert (len(first["results"]), first["total"]) == (1, text["total"])
    for mode in ("sentence", "hybrid"):
        rows = client.get("/api/v1/search", params={"q": "dog cat", "mode": mode, "limit": 3}).json()["results"]
        assert {row["caption"] for row in rows} == both


@pytest.mark.parametrize("mode", ["text", "sentence", "hybrid"])
def test_cursor_continues_the_previous_results(client: TestClient, mode: str) -> None:
    pages, cursor = [], ""
    while cursor is not None:
        parameters = {"q": "dog", "mode": mode, "limit": 8, "cursor": cursor}
        page = client.get("/api/v1/search", params=parameters).json()
        pages.append([row["image_id"] for row in page["results"]])
        cursor = page["next_cursor"]
    whole = client.get("/api/v1/search", params={"q": "dog", "mode": mode, "limit": 100}).json()
    assert [image_id for page in pages for image_id in page] == [row["image_id"] for row in whole["results"]]
    assert len(pages) > 1


@pytest.mark.parametrize("change", [{"q": "cat"}, {"mode": "sentence"}, {"split": "val"}, {"cursor": "5-0"}])
def test_cursor_of_another_search_is_rejected(client: TestClient, change: dict[str, str]) -> None:
    parameters = {"q": "dog", "limit": "5"}
    parameters["cursor"] = client.get("/api/v1/search", params=parameters).json()["next_cursor"]
    response = client.get("/api/v1/search", params=parameters | change)
    assert (response.status_code, response.json()["detail"].split(":")[0]) == (400, "cursor")


def test_search_filters_by_split_and_log_prob(client: TestClient) -> None:
    response = client.get(
        "/api/v1/search", params={"q": "dog", "split": "val", "min_log_prob": -5, "limit": 100}
    ).json()
    assert response["results"]
    assert {row["split"] for row in response["results"]} == {"val"}
    assert min(row["log_prob"] for row in response["results"]) >= -5
    assert response["total"] == len(response["results"])


def test_invalid_query_returns_a_message(client: TestClient) -> None:
    response = client.get("/api/v1/search", params={"q": "the"}).json()
    assert response["results"] == []
    assert "expected words to search for" in response["message"]
    assert "Expected words to search for" in client.get("/?q=the").text
    unknown = client.get("/api/v1/search", params={"q": "zebra", "mode": "sentence"}).json()
    assert (unknown["results"], "words in the ranker's vocabulary" in unknown["message"]) == ([], True)


def test_empty_query_shows_help_and_examples(client: TestClient) -> None:
    html = client.get("/").text
    assert "<code>+dog -cat</code> requires one word" in html
    assert 'href="/?q=a+dog+and+a+cat&amp;mode=sentence">a dog and a cat</a>' in html, "an example that finds images"
    assert html.count('<span class="caption"') == 48


def test_values_at_their_limits_are_accepted(client: TestClient) -> None:
    limits = f"split={'x' * 100}&source={'x' * 300}"
    urls = [f"/api/v1/search?q={'x' * 500}&limit=100&min_log_prob=0&date=2026&{limits}", f"/?q={'x' * 500}&{limits}"]
    urls += [f"/{path}failures?reason={'x' * 100}&source={'x' * 300}" for path in ("api/v1/", "")]
    for url in urls:
        assert client.get(url).status_code == 200
    plain = client.get("/api/v1/search?q=dog+cat").json()
    assert len(plain["results"]) == 20
    assert client.get("/api/v1/search?q=dog+cat&split=&source=&date=").json() == plain


def test_unknown_values_in_the_address_of_a_page_are_ignored(client: TestClient) -> None:
    page = client.get("/?q=dog").text
    assert client.get("/?q=dog&mode=x&sort=x&date=March&duplicates=x&similar_to=im3").text == page
    assert client.get("/?q=dog&sort=log_prob").text != page


def test_pages_after_the_last_have_no_results(client: TestClient) -> None:
    assert "page 2 of 2" in client.get("/?q=dog+cat+pizza+train+horse&page=2").text
    for beyond in (100, 10**12):
        html = client.get(f"/?q=dog&page={beyond}").text
        assert "No more results for “dog”" in html
        assert "Examples of the images" not in html
        assert 'href="/?q=dog">← First page' in html


def test_all_values_are_escaped(client: TestClient) -> None:
    pages = ["/?q=dog", f"/?q={quote(MALICIOUS)}", f"/image?id={quote(MALICIOUS)}", "/image?id=im0"]
    pages += [f"/image?id={quote('<script>x')}", f"/?q=dog&split={quote(MALICIOUS)}&mode={quote(MALICIOUS)}"]
    for page in pages:
        html = client.get(page, headers=BROWSER).text
        assert "<script>document" not in html
        assert "<script>x" not in html
    response = client.post("/image-search", files={"image": (f"{MALICIOUS}.png", make_png(), "image/png")}).text
    assert "<script>document" not in response
    assert "&lt;script&gt;" in response


def test_responses_do_not_contain_addresses_of_images(client: TestClient, folder: Path) -> None:
    urls = ["/?q=dog", "/api/v1/search?q=dog", "/image?id=im0", "/api/v1/image?id=im0", "/api/v1/image?id=gone"]
    urls += ["/thumbnail/small?id=gone", "/thumbnail/small?id=nothing", "/health", "/openapi.json", "/docs"]
    for url in urls:
        assert str(folder) not in client.get(url).text


def test_thumbnails_exist_only_for_images_of_the_index(client: TestClient, folder: Path) -> None:
    for size in ("small", "large"):
        response = client.get(f"/thumbnail/{size}?id=im1")
        assert response.headers["content-type"] == "image/jpeg"
        with Image.open(io.BytesIO(response.content)) as image:
            width, height = image.size
            assert width / height == pytest.approx(4 / 3, abs=0.01)
    secret = folder / "images" / "0.png"
    for name in (str(secret), f"file://{secret}", "../images/0.png", "im1/../0.png", "IM1", ""):
        assert client.get("/thumbnail/small", params={"id": name}).status_code == 404
    assert client.get("/thumbnail/huge?id=im1").status_code == 422


def test_missing_image_has_a_placeholder(client: TestClient) -> None:
    response = client.get("/thumbnail/small?id=gone")
    problem = response.json()
    assert (response.status_code, problem["detail"], problem["reason"]) == (
        404,
        "image gone cannot be read",
        "NotFound",
    )
    assert client.get("/thumbnail/small?id=im1").headers["cache-control"] == "private, max-age=86400"
    on_page = client.get("/thumbnail/small?id=gone", headers={"accept": "image/avif,*/*"})
    assert (on_page.status_code, on_page.headers["content-type"]) == (404, "image/svg+xml")


def test_thumbnails_are_stored(client: TestClient, folder: Path) -> None:
    first = client.get("/thumbnail/small?id=im2").content
    (folder / "images" / "2.png").rename(folder / "images" / "away.png")
    assert client.get("/thumbnail/small?id=im2").content == first
    (folder / "images" / "away.png").rename(folder / "images" / "2.png")


def test_image_has_candidates_and_similar_images(client: TestClient) -> None:
    image = client.get("/api/v1/image?id=im0").json()
    assert [row["caption"] for row in image["candidates"]] == ["a dog and a cat", "perhaps a dog and a cat"]
    assert image["similar"][0]["caption"] in ("a cat and a dog", "a dog and a cat")
    assert "im0" not in [row["image_id"] for row in image["similar"]]
    html = client.get("/image?id=im0").text
    assert "perhaps a dog and a cat" in html
    missing = client.get("/image?id=nothing", headers=BROWSER)
    assert (missing.status_code, "No image nothing in the index" in missing.text) == (404, True)


def test_search_by_image_returns_images_and_sentences(client: TestClient) -> None:
    response = client.post("/api/v1/image-search", files={"image": ("x.png", make_png(), "image/png")}).json()
    assert len(response["images"]) == 24
    assert response["sentences"]
    assert response["captions"] == []
    page = client.post("/image-search", files={"image": ("x.png", make_png(), "image/png")}).text
    (shown,) = re.findall('src="data:image/jpeg;base64,([^"]*)"', page)
    with Image.open(io.BytesIO(base64.b64decode(shown))) as image:
        assert image.width / image.height == pytest.approx(4 / 3, abs=0.01)
    assert client.get("/image-search", follow_redirects=False).headers["location"] == "/"


def test_file_picker_accepts_all_decodable_formats(client: TestClient) -> None:
    page = client.get("/").text
    (accepted,) = re.findall('accept="([^"]*)"', page)
    formats = list_decodable_formats()
    assert set(accepted.split(",")) == {"image/*", *(name for found in formats for name in found.extensions)}
    assert f"{', '.join(found.name for found in formats[:-1])} or {formats[-1].name}, up to" in page


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "Empty"),
        (b"<svg onload=alert(1)>", "UnsupportedFormat"),
        (make_png()[:60], "Truncated"),
        (make_png(size=(2000, 600)), "TooManyPixels"),
    ],
)
def test_invalid_image_is_rejected(client: TestClient, content: bytes, reason: str) -> None:
    response = client.post("/api/v1/image-search", files={"image": ("x.png", content, "image/png")})
    assert response.status_code == 400
    problem = response.json()
    assert response.headers["content-type"] == "application/problem+json"
    assert (problem["reason"], problem["status"], problem["title"]) == (reason, 400, "Bad Request")
    assert reason not in problem["detail"]
    page = client.post("/image-search", files={"image": ("x.png", content, "image/png")}, headers=BROWSER)
    (shown,) = re.findall("<h1>.*</h1>\n<p>(.*)</p>", page.text)
    assert (page.status_code, reason in page.text) == (400, False)
    assert shown[0].isupper()
    assert len(shown) > 10


def test_body_that_is_too_large_is_rejected(client: TestClient) -> None:
    large = client.post("/api/v1/image-search", files={"image": ("x.png", b"x" * 300_000, "image/png")})
    assert (large.status_code, large.json()["detail"]) == (413, "expected images of at most 0.191 MB in total")
    page = client.post("/image-search", files={"image": ("x.png", b"x" * 300_000, "image/png")}, headers=BROWSER)
    assert (page.status_code, "<h1>Too large</h1>" in page.text) == (413, True)
    pieces = (b"x" * 10_000 for _ in range(30))
    headers = {"content-type": "multipart/form-data; boundary=b", "transfer-encoding": "chunked"}
    assert client.post("/api/v1/image-search", content=pieces, headers=headers).status_code == 413


@pytest.mark.parametrize(("size", "status"), [(200_000 + 2**16, 422), (200_000 + 2**16 + 1, 413)])
def test_other_parts_of_an_upload_have_a_limit(client: TestClient, size: int, status: int) -> None:
    headers = {"content-type": "multipart/form-data; boundary=b"}
    body = b"--b--".ljust(size)
    assert client.post("/api/v1/image-search", content=body, headers=headers).status_code == status


@pytest.mark.parametrize(
    "url",
    [
        f"/api/v1/search?q={'x' * 501}",
        f"/api/v1/search?q=dog&split={'x' * 101}",
        f"/api/v1/search?q=dog&source={'x' * 301}",
        f"/api/v1/failures?reason={'x' * 101}",
        f"/?split={'x' * 101}",
        f"/?source={'x' * 301}",
        f"/failures?reason={'x' * 101}",
        f"/failures?source={'x' * 301}",
        "/failures?page=0",
        "/image?id=im0&at=-2",
        "/api/v1/search?q=dog&limit=0",
        "/api/v1/search?q=dog&date=2026-3",
        "/api/v1/search?q=dog&date=20260",
        "/api/v1/search?q=dog&min_log_prob=0.1",
        "/api/v1/search?q=dog&limit=101",
        f"/api/v1/search?q=dog&cursor={'1' * 101}",
        "/api/v1/search?q=dog&mode=sql",
        "/api/v1/search?q=dog&min_log_prob=nan",
        "/api/v1/search",
        "/?page=0",
    ],
)
def test_limits_are_enforced(client: TestClient, url: str) -> None:
    response = client.get(url)
    assert response.status_code == 422
    problem = response.json()
    assert problem["detail"] == "; ".join(f"{each['name']}: {each['detail']}" for each in problem["errors"])
    assert f"{problem['errors'][0]['name']}=" in url or url == "/api/v1/search"
    assert "Invalid request" in client.get(url, headers=BROWSER).text


def test_sql_is_ignored(client: TestClient) -> None:
    plain = client.get("/api/v1/search?q=dog").json()
    assert client.get("/api/v1/search?q=dog&where=FALSE&sql=SELECT+1").json() == plain
    assert client.get("/api/v1/search", params={"q": "dog", "split": "val' OR '1'='1"}).json()["results"] == []


def test_unknown_hosts_are_rejected_and_headers_are_set(client: TestClient) -> None:
    for host in ("evil.example.org", "example.org"):
        assert client.get("/", headers={"host": host}).status_code == 400
    for url in ("/", "/api/v1/search?q=dog", "/static/page.css", "/nothing", "/thumbnail/small?id=im0"):
        headers = client.get(url).headers
        assert "default-src 'none'" in headers["content-security-policy"]
        assert "unsafe" not in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"


def test_long_image_ids_are_accepted(client: TestClient) -> None:
    for url in ("/image", "/api/v1/image", "/thumbnail/small"):
        response = client.get(url, params={"id": "x" * 10_000})
        assert (response.status_code, "no image xxx" in response.text) == (404, True)


def test_health_does_not_wait_for_a_thread(client: TestClient) -> None:
    gate = threading.Event()
    assert client.portal is not None
    limiter = client.portal.call(current_default_thread_limiter)
    assert limiter.total_tokens == 8
    waiting = [client.portal.start_task_soon(run_in_threadpool, gate.wait) for _ in range(limiter.total_tokens + 1)]
    try:
        assert client.get("/health").json()["status"] == "ok"
    finally:
        gate.set()
    assert all(task.result() for task in waiting)


def test_busy_server_asks_to_try_again(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise BusyError("busy")

    monkeypatch.setattr(client.app.state.service, "search_by_image", fail)  # type: ignore[attr-defined]
    response = client.post("/api/v1/image-search", files={"image": ("x.png", make_png(), "image/png")})
    assert (response.status_code, response.headers["retry-after"]) == (503, "5")


def test_health_and_docs(client: TestClient) -> None:
    health = client.get("/health").json()
    assert (health["status"], health["captions"], health["vectors"]) == ("ok", 60, 60)
    assert client.get("/redoc").status_code == 404
    docs = client.get("/docs").text
    assert "https://" not in docs
    for file in re.findall('(?:src|href)="(/static/[^"]*)"', docs):
        assert client.get(file).status_code == 200


def test_error_is_a_page_for_browsers_and_json_for_other_clients(client: TestClient) -> None:
    problem = {"type": "about:blank", "title": "Not Found", "status": 404, "detail": "/nothing does not exist"}
    assert client.get("/nothing").json() == {**problem, "errors": []}
    page = client.get("/nothing", headers=BROWSER).text
    assert "<h1>Not found</h1>\n<p>/nothing does not exist.</p>" in page
    assert client.get("/static/../../app.py").status_code == 404
    response = client.post("/health", headers=BROWSER)
    assert (response.status_code, response.headers["allow"]) == (405, "GET")
    assert "<h1>Request failed</h1>" in response.text


@pytest.mark.parametrize(
    ("status", "heading"), [(404, "Not found"), (408, "Too slow"), (429, "Too busy"), (503, "Too busy")]
)
def test_page_of_an_error_has_a_heading(client: TestClient, status: int, heading: str) -> None:
    page = client.app.state.pages.render_error(make_problem(status, "the detail"))  # type: ignore[attr-defined]
    assert f"<h1>{heading}</h1>\n<p>The detail.</p>".encode() in page.body
    assert (b"examples of the images" in page.body) == (status == 404)


def test_without_models_only_text_search_is_available(tmp_path: Path) -> None:
    from captionlib.search.index import open_index
    from captionlib.serving.app import create_app
    from captionlib.serving.service import SearchService

    make_site(tmp_path, 10, with_models=False)
    service = SearchService(open_index(tmp_path / "index"), ServingConfig(allowed_hosts=("testserver",)))
    with TestClient(create_app(service, tmp_path / "thumbnails")) as client:
        html = client.get("/?q=dog").text
        assert 'name="mode"' not in html
        assert "Search by image" not in html
        rejected = client.get("/api/v1/search?q=dog&mode=sentence")
        assert (rejected.status_code, rejected.json()["detail"]) == (
            400,
            "mode sentence is not available; expected text",
        )
        response = client.post("/api/v1/image-search", files={"image": ("x.png", make_png(), "image/png")})
        assert response.status_code == 404


def similar_ids(client: TestClient) -> list[str]:
    return [row["image_id"] for row in client.get("/api/v1/image?id=im0").json()["similar"]]


def find_cards(html: str) -> list[str]:
    return re.findall(r"<li class=.*?</li>", html, re.DOTALL)


def test_cards_explain_their_numbers(client: TestClient) -> None:
    (card, *_) = find_cards(client.get("/?q=%22dog+and+a+cat%22").text)
    assert "85% per word" in card  # exp(-1 / 6), with five words and the end
    assert 'title="How sure the captioner is' in card
    (card, *_) = find_cards(client.get("/?q=dog+cat&mode=sentence").text)
    score = client.get("/api/v1/search?q=dog+cat&mode=sentence").json()["results"][0]["score"]
    assert f"similarity {score:.2f}" in card


def test_image_page_shows_candidates_and_where_the_row_came_from(client: TestClient, folder: Path) -> None:
    image = client.get("/api/v1/image?id=im0").json()
    best, other = (candidate["word_probability"] for candidate in image["candidates"])
    assert (best, other) == (pytest.approx(math.exp(-1 / 6)), pytest.approx(math.exp(-2 / 7)))
    assert (image["source"], image["provenance"]) == (
        "captions",
        {"Captioner": "captioner-of", "Encoder": "vgg16, fc7"},
    )
    html = client.get("/image?id=im0").text
    assert "<dt>Encoder</dt><dd>vgg16, fc7</dd>" in html
    assert "<td>75%</td>" in html


def test_image_page_shows_references_attention_and_the_file(client: TestClient) -> None:
    image = client.get("/api/v1/image?id=im2").json()
    assert image["references"] == ["a person wrote this about 2"]
    assert [list(base64.b64decode(each)) for each in image["attention"]["maps"]] == [[255, 0, 0, 128]] * 6
    # The crop of 224 of 256 pixels of the shorter side, in the center of an image of 90 x 140 pixels.
    assert image["attention"]["crop"] == pytest.approx([1 / 16, (1 - 0.875 * 90 / 140) / 2, 0.875, 0.875 * 90 / 140])
    assert (image["modified"], image["version"]) == ("2026-03-01T12:00:00", f"400-{MODIFIED_NS:x}")
    html = client.get("/image?id=im2").text
    assert "<li>a person wrote this about 2</li>" in html
    assert "2026-03-01 12:00 UTC" in html
    assert 'data-maps="/wAAgA==' in html
    assert client.get("/static/attention_maps.js").text.startswith("// Attention maps")


def test_failures_are_listed_with_reasons_but_without_addresses(client: TestClient) -> None:
    failures = client.get("/api/v1/failures", params={"limit": 2}).json()
    assert (failures["total"], failures["reasons"]) == (3, {"Truncated": 2, "Odd": 1})
    assert [image["image_id"] for image in failures["images"]] == ["failed 0", "failed 1"]
    rest = client.get("/api/v1/failures", params={"limit": 2, "cursor": failures["next_cursor"]}).json()
    assert ([image["reason"] for image in rest["images"]], rest["next_cursor"]) == (["Odd"], None)
    html = client.get("/failures?reason=Truncated").text
    assert "<td>failed 1</td><td>the file is incomplete</td>" in html
    assert "secret" not in html + client.get("/failures").text
    assert "another reason (Odd)" in html
    assert '<a href="/failures">3 without a caption</a>' in client.get("/").text
    assert client.get("/api/v1/failures", params={"limit": 3}).json()["next_cursor"] is None


def test_failures_have_pages(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("captionlib.serving.pages.MAX_RESULTS", 2)
    pages = [client.get(f"/failures?page={page}").text for page in (1, 2)]
    assert [re.findall("<td>(failed .)</td>", page) for page in pages] == [["failed 0", "failed 1"], ["failed 2"]]
    assert [re.findall('rel="(prev|next)".*(page=.)"', page) for page in pages] == [
        [("next", "page=2")],
        [("prev", "page=1")],
    ]
    monkeypatch.setattr("captionlib.serving.pages.MAX_OFFSET", 2)
    assert client.get("/failures?page=9").text == pages[0], "the last page that can be reached"


def test_unknown_facet_values_find_nothing(client: TestClient) -> None:
    for facet in ({"source": "nowhere"}, {"date": "1999-01"}, {"split": MALICIOUS}):
        response = client.get("/api/v1/search", params={"q": "dog", **facet}).json()
        assert (response["total"], response["results"]) == (0, [])
        page = client.get("/", params={"q": "dog", **facet})
        assert "Search without the filters" in page.text
        assert "<script>document" not in page.text
    assert client.get("/api/v1/search", params={"q": "dog", "date": "March"}).status_code == 422


def test_unclosed_quote_is_closed(client: TestClient) -> None:
    closed, unclosed = (
        client.get("/api/v1/search", params={"q": q}).json() for q in ('"dog and a cat"', '"dog and a cat')
    )
    assert unclosed["results"] == closed["results"] != []
    note = "A closing quotation mark was added: “dog and a cat”."
    assert note in client.get("/", params={"q": "“dog and a cat"}).text
    assert note not in client.get("/", params={"q": '"dog and a cat"'}).text
    assert note not in client.get("/", params={"q": "“dog and a cat", "mode": "sentence"}).text


def test_matched_words_are_marked_and_escaped(client: TestClient) -> None:
    html = client.get("/?q=dogs+-pizza").text
    assert "a <mark>dog</mark> and a cat" in html
    assert "<mark>" not in client.get("/?q=dog&mode=sentence").text
    marked = client.get("/?q=script").text
    assert "&lt;<mark>script</mark>&gt;document" in marked


def test_image_page_links_to_the_previous_and_next_result(client: TestClient) -> None:
    ids = [row["image_id"] for row in client.get("/api/v1/search?q=dog&sort=log_prob").json()["results"]]
    html = client.get("/image", params={"id": ids[1], "q": "dog", "sort": "log_prob", "at": 1}).text
    assert re.findall('rel="(prev|next|up)" href="([^"]*)"', html) == [
        ("up", "/?q=dog&amp;sort=log_prob"),
        ("prev", f"/image?q=dog&amp;sort=log_prob&amp;id={quote(ids[0], safe='')}&amp;at=0"),
        ("next", f"/image?q=dog&amp;sort=log_prob&amp;id={quote(ids[2], safe='')}&amp;at=2"),
    ]
    first = client.get("/image", params={"id": ids[0], "q": "dog", "sort": "log_prob", "at": 0}).text
    assert 'rel="prev"' not in first
    assert f"id={quote(ids[1], safe='')}&amp;at=1" in first
    for parameters in (
        {"at": 0},
        {"at": 0, "q": " "},
        {"q": "dog"},
        {"at": 9999, "q": "dog"},
        {"at": 10**9, "q": "dog"},
    ):
        assert 'rel="next"' not in client.get("/image", params={"id": "im0", **parameters}).text
    assert (
        'rel="next"' in client.get("/image", params={"id": similar_ids(client)[0], "similar_to": "im0", "at": 0}).text
    )
    moved = client.get("/image", params={"id": ids[5], "q": "dog", "sort": "log_prob", "at": 1}).text
    assert 'rel="next"' not in moved, "the index has changed, so the position belongs to a different image"


def test_facets_have_counts_of_the_search(client: TestClient) -> None:
    html = client.get("/?q=dog").text
    counts = {value: int(count) for value, count in re.findall(r'<option value="([^"]+)" *>[^(<]+\((\d+)\)', html)}
    assert counts.keys() == {"train", "val", "2026-03", "2026-04"}
    assert 'name="source"' not in html, "there is only one"
    assert 'name="duplicates"' not in html, "there are none"
    for value, count in counts.items():
        facet = {"date" if value.startswith("2026") else "split": value}
        assert client.get("/api/v1/search", params={"q": "dog", **facet}).json()["total"] == count > 0
    one_month = client.get("/api/v1/search", params={"q": "dog", "date": "2026-04", "split": "val"}).json()
    assert one_month["facets"]["splits"]["val"] == one_month["total"] < counts["val"]
    sentence = client.get("/api/v1/search?q=dog&mode=sentence&date=2026-04&limit=100").json()
    assert len(sentence["results"]) == sum(sentence["facets"]["splits"].values())


def test_only_text_searches_need_facets_that_count_months(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filters, "_MAX_GROUPS", 1)
    with TestClient(make_site(tmp_path)) as client:
        for parameters in ({"q": "dog", "mode": "sentence"}, {"q": "dog", "mode": "hybrid"}):
            address = f"/api/v1/search?{urlencode({**parameters, 'limit': 100})}"
            month, year = (client.get(f"{address}&date={date}").json() for date in ("2026-04", "2026"))
            assert (month["message"], month["facets"]) == (None, None)
            assert 0 < len(month["results"]) < len(year["results"])
            assert {row["image_id"] for row in month["results"]} < {row["image_id"] for row in year["results"]}
            assert year["facets"]["dates"] == {"2026": 60}
        for parameters in ({}, {"similar_to": "im3"}, {"q": "dog", "mode": "sentence"}):
            page = client.get("/", params={**parameters, "date": "2026-04"})
            assert page.status_code == 200
            assert '<option value="2026-04" selected>2026-04</option>' in page.text
            assert "Clear filters" in page.text
            shown = re.findall('name="id" value="im([0-9]+)"', page.text)
            assert shown
            assert all(int(number) % 2 == 1 for number in shown), "the files of the others are of March"
        text = client.get("/api/v1/search?q=dog&date=2026-04").json()
        assert (text["facets"], text["results"]) == (None, [])
        assert "use 2026" in text["message"]


def test_images_like_an_image_have_an_address(client: TestClient) -> None:
    similar = [row["image_id"] for row in client.get("/api/v1/image?id=im3").json()["similar"]]
    shown = [unescape(each) for each in re.findall('name="id" value="([^"]*)"', client.get("/?similar_to=im3").text)]
    assert shown[: len(similar)] == similar
    assert "No image nothing in the index" in client.get("/?similar_to=nothing").text


def test_search_without_results_suggests_others(client: TestClient) -> None:
    html = client.get("/?q=%2Bdog+%2Bgiraffe&split=val").text
    assert 'href="/?q=%2Bdog+%2Bgiraffe">Search without the filters' in html
    assert 'href="/?q=dog+giraffe&amp;split=val">Search for any of the words' in html
    assert 'href="/?q=dog+giraffe&amp;mode=sentence">Search the images by this description' in html
    assert html.count('<span class="caption"') == 12, "examples"


@pytest.mark.parametrize(
    ("query", "suggestion"),
    [("frisbe", "frisbee"), ("+hosre -cat", "+horse -cat"), ('"a pizzza', '"a pizza'), ("xyz", None)],
)
def test_misspelled_words_are_corrected(client: TestClient, query: str, suggestion: str | None) -> None:
    response = client.get("/api/v1/search", params={"q": query}).json()
    assert (response["total"], response["suggestion"]) == (0, suggestion)
    if suggestion is not None:
        assert client.get("/api/v1/search", params={"q": suggestion}).json()["total"] > 0
        assert f'Did you mean <a href="/?{urlencode({"q": suggestion})}' in client.get("/", params={"q": query}).text


@pytest.mark.parametrize("words", ["text", "relevance"])
def test_links_keep_words_that_are_also_values_of_other_parameters(client: TestClient, words: str) -> None:
    page = client.get("/image", params={"id": "im0", "q": words}).text
    assert f'href="/?q={words}"' in unescape(page)


def test_selection_is_exported_without_addresses_of_images(client: TestClient, folder: Path) -> None:
    ids = {"id": ["im3", "im1", "im3", "nothing"]}
    csv = client.post("/export", data={**ids, "format": "csv"})
    assert csv.headers["content-type"] == "text/csv; charset=utf-8"
    assert csv.headers["content-disposition"] == 'attachment; filename="captions.csv"'
    assert csv.text.splitlines()[1].startswith('"im3","train","a dog and a horse"')
    parquet = pq.read_table(pa.BufferReader(client.post("/export", data={**ids, "format": "parquet"}).content))
    assert parquet["image_id"].to_pylist() == ["im3", "im1"]
    assert "uri" not in parquet.column_names
    assert client.post("/export", data={**ids, "format": "exe"}).status_code == 422


def test_page_that_is_not_found_offers_a_search(client: TestClient) -> None:
    for url in ("/nothing", "/image?id=nothing"):
        page = client.get(url, headers=BROWSER)
        assert (page.status_code, 'role="search"' in page.text) == (404, True)


def test_first_visit_is_small(client: TestClient) -> None:
    html = client.get("/").text
    files = [client.get(file).content for file in re.findall('(?:src|href)="(/static/[^"]*)"', html)]
    assert len(html) + sum(map(len, files)) < 150_000


@pytest.mark.parametrize(
    ("width", "height", "expected"),
    [(40, 30, "r135"), (30, 40, "r75"), (9, 1, "r250"), (1, 9, "r50"), (None, 30, ""), (40, None, "")],
)
def test_class_of_an_aspect_ratio(width: int | None, height: int | None, expected: str) -> None:
    assert _format_ratio(SearchResult.model_construct(width=width, height=height)) == expected


@pytest.mark.parametrize(
    ("probability", "expected"), [(1, "100%"), (0.095, "10%"), (0.0949, "9.5%"), (0.0123, "1.2%"), (0, "0%")]
)
def test_small_percentages_have_two_digits(probability: float, expected: str) -> None:
    assert _format_percent(probability) == expected


def test_dates_are_months_or_years() -> None:
    months = {f"{year}-{month:02}": month for year in (2025, 2026) for month in range(1, 13)}
    listed = _list_dates(months)
    assert (len(listed), listed[0], listed[-1]) == (24, ("2026-12", "Dec 2026", 12), ("2025-01", "Jan 2025", 1))
    assert _list_dates({**months, "2024-12": 5}) == [("2026", "2026", 78), ("2025", "2025", 78), ("2024", "2024", 5)]
    assert _list_dates({"2025": 3, "2026-01": 4}) == [("2026", "2026", 4), ("2025", "2025", 3)]


@pytest.mark.usefixtures("client")
def test_marked_duplicates_can_be_left_out(folder: Path, tmp_path: Path) -> None:
    duplicates = create_dataset(tmp_path / "duplicates", "duplicates", DUPLICATES_SCHEMA, config={}, shards=1)
    group = [{"image_id": f"im{number}", "group": "im0", "kept": not number, "similarity": 1.0} for number in range(3)]
    with write_shard(duplicates, 0, 3) as writer:
        writer.write(pa.RecordBatch.from_pylist(group, DUPLICATES_SCHEMA))
    duplicates.finish()
    config = IndexConfig(keep_duplicates=True)
    build = plan_build(folder / "captions", None, tmp_path / "index", config, duplicates=tmp_path / "duplicates")
    build.add_shard(0)
    build.finish()
    limits = ServingConfig(allowed_hosts=("testserver",))
    service = SearchService(open_index(tmp_path / "index", refresh_seconds=None), limits)
    with TestClient(create_app(service, tmp_path / "thumbnails")) as client:
        total, distinct = (
            client.get(f"/api/v1/search?q=dog&duplicates={each}").json()["total"] for each in ("include", "exclude")
        )
        assert distinct == total - 2
        assert f'<option value="exclude" >Without duplicates ({distinct})' in client.get("/?q=dog").text
        page = client.get("/?q=dog&duplicates=exclude").text
        assert f"{distinct} images" in page
        assert f'<option value="exclude" selected>Without duplicates ({distinct})' in page


def test_index_without_images_has_pages(tmp_path: Path) -> None:
    write_captions_dataset(str(tmp_path / "captions"), {0: []}, 1, failed={0: ["broken"]})
    build = plan_build(tmp_path / "captions", None, tmp_path / "index", IndexConfig())
    build.add_shard(0)
    build.finish()
    limits = ServingConfig(allowed_hosts=("testserver",))
    service = SearchService(open_index(tmp_path / "index", refresh_seconds=None), limits)
    with TestClient(create_app(service, tmp_path / "thumbnails")) as client:
        assert "The index has no images yet" in client.get("/").text
        assert "No results for “dog”" in client.get("/?q=dog&split=val").text
        assert "No image x in the index" in client.get("/?similar_to=x").text
        assert "<td>broken</td>" in client.get("/failures").text
        assert client.get("/image?id=x").status_code == 404
