import base64
import io
import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest
from fastapi.testclient import TestClient
from PIL import Image

from captionlib.serving.config import ServingConfig

from .example_site import EVIL, make_site

PERSON = {"accept": "text/html"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("site")


@pytest.fixture(scope="module")
def client(folder: Path) -> Iterator[TestClient]:
    config = ServingConfig(hosts=("testserver",), max_upload_bytes=200_000, max_image_pixels=1_000_000)
    with TestClient(make_site(folder, config=config)) as client:
        yield client


def photo(colour: str = "teal", size: tuple[int, int] = (80, 60)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "PNG")
    return buffer.getvalue()


def test_words_sentences_and_both_are_answered(client: TestClient) -> None:
    both = {"a dog and a cat", "a cat and a dog"}
    words = client.get("/api/search", params={"q": "+dog +cat"}).json()
    assert {row["caption"] for row in words["rows"]} == both
    assert (words["total"], words["more"]) == (len(words["rows"]), False)
    first = client.get("/api/search", params={"q": "+dog +cat", "limit": 1}).json()
    assert (len(first["rows"]), first["total"], first["more"]) == (1, words["total"], True)
    for mode in ("sentence", "hybrid"):
        rows = client.get("/api/search", params={"q": "dog cat", "mode": mode, "limit": 3}).json()["rows"]
        assert {row["caption"] for row in rows} == both


def test_pages_of_an_answer_follow_each_other(client: TestClient) -> None:
    def ids(offset: int, limit: int) -> list[str]:
        rows = client.get("/api/search", params={"q": "dog", "offset": offset, "limit": limit}).json()["rows"]
        return [row["image_id"] for row in rows]

    assert ids(0, 5) + ids(5, 5) == ids(0, 10)
    assert ids(10_000, 5) == []


def test_split_and_probability_narrow_an_answer(client: TestClient) -> None:
    answer = client.get("/api/search", params={"q": "dog", "split": "val", "min_log_prob": -5, "limit": 100}).json()
    assert answer["rows"]
    assert {row["split"] for row in answer["rows"]} == {"val"}
    assert min(row["log_prob"] for row in answer["rows"]) >= -5
    assert answer["total"] == len(answer["rows"])


def test_a_question_without_words_has_a_note_in_place_of_rows(client: TestClient) -> None:
    answer = client.get("/api/search", params={"q": "the"}).json()
    assert answer["rows"] == []
    assert "expected words to search for" in answer["note"]
    assert "Expected words to search for" in client.get("/?q=the").text
    unknown = client.get("/api/search", params={"q": "zebra", "mode": "sentence"}).json()
    assert (unknown["rows"], "words that the ranker knows" in unknown["note"]) == ([], True)


def test_who_asks_nothing_yet_is_shown_how_and_some_images(client: TestClient) -> None:
    html = client.get("/").text
    assert "<code>+dog</code> must be there" in html
    assert html.count('<span class="caption"') == 24


def test_pages_end(client: TestClient) -> None:
    assert "page 2 of" in client.get("/?q=dog+cat+pizza+train&page=2").text
    for beyond in (100, 10**12):
        html = client.get(f"/?q=dog&page={beyond}").text
        assert "No further images for “dog”" in html
        assert 'href="/?q=dog&amp;mode=text">← First page' in html


def test_everything_is_escaped(client: TestClient) -> None:
    pages = ["/?q=dog", f"/?q={quote(EVIL)}", f"/image?id={quote(EVIL)}", "/image?id=im0"]
    pages += [f"/image?id={quote('<script>x')}", f"/?q=dog&split={quote(EVIL)}&mode={quote(EVIL)}"]
    for page in pages:
        html = client.get(page, headers=PERSON).text
        assert "<script>document" not in html
        assert "<script>x" not in html
    found = client.post("/photo", files={"photo": (f"{EVIL}.png", photo(), "image/png")}).text
    assert "<script>document" not in found
    assert "&lt;script&gt;" in found


def test_no_answer_names_the_places_of_images(client: TestClient, folder: Path) -> None:
    urls = ["/?q=dog", "/api/search?q=dog", "/image?id=im0", "/api/image?id=im0", "/api/image?id=gone"]
    urls += ["/picture/small?id=gone", "/picture/small?id=nothing", "/health", "/openapi.json", "/docs"]
    for url in urls:
        assert str(folder) not in client.get(url).text


def test_only_images_of_the_index_are_shown(client: TestClient, folder: Path) -> None:
    for size in ("small", "large"):
        answer = client.get(f"/picture/{size}?id=im1")
        assert answer.headers["content-type"] == "image/jpeg"
        with Image.open(io.BytesIO(answer.content)) as image:
            width, height = image.size
            assert (
                (width, height) == (256, 256) if size == "small" else width / height == pytest.approx(4 / 3, abs=0.01)
            )
    secret = folder / "images" / "0.png"
    for name in (str(secret), f"file://{secret}", "../images/0.png", "im1/../0.png", "IM1", ""):
        assert client.get("/picture/small", params={"id": name}).status_code == 404
    assert client.get("/picture/huge?id=im1").status_code == 422


def test_an_image_that_is_gone_has_a_sign_in_its_place(client: TestClient) -> None:
    answer = client.get("/picture/small?id=gone")
    assert (answer.status_code, answer.json()["detail"]) == (404, "the image of gone cannot be had: FileNotFoundError")
    on_page = client.get("/picture/small?id=gone", headers={"accept": "image/avif,*/*"})
    assert (on_page.status_code, on_page.headers["content-type"]) == (404, "image/svg+xml")


def test_thumbnails_are_made_once(client: TestClient, folder: Path) -> None:
    first = client.get("/picture/small?id=im2").content
    (folder / "images" / "2.png").rename(folder / "images" / "away.png")
    assert client.get("/picture/small?id=im2").content == first
    (folder / "images" / "away.png").rename(folder / "images" / "2.png")


def test_a_page_of_one_image_has_its_captions_and_what_is_near(client: TestClient) -> None:
    image = client.get("/api/image?id=im0").json()
    assert [row["caption"] for row in image["candidates"]] == ["a dog and a cat", "perhaps a dog and a cat"]
    assert image["similar"][0]["caption"] in ("a cat and a dog", "a dog and a cat")
    assert "im0" not in [row["image_id"] for row in image["similar"]]
    html = client.get("/image?id=im0").text
    assert "perhaps a dog and a cat" in html
    missing = client.get("/image?id=nothing", headers=PERSON)
    assert (missing.status_code, "no image nothing in the index" in missing.text) == (404, True)


def test_a_photograph_finds_images_and_sentences(client: TestClient) -> None:
    found = client.post("/api/photo", files={"photo": ("x.png", photo(), "image/png")}).json()
    assert len(found["images"]) == 24
    assert found["sentences"]
    assert found["captions"] == []
    page = client.post("/photo", files={"photo": ("x.png", photo(), "image/png")}).text
    (shown,) = re.findall('src="data:image/jpeg;base64,([^"]*)"', page)
    with Image.open(io.BytesIO(base64.b64decode(shown))) as image:
        assert image.width / image.height == pytest.approx(4 / 3, abs=0.01)
    assert client.get("/photo", follow_redirects=False).headers["location"] == "/"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "Empty"),
        (b"<svg onload=alert(1)>", "UnsupportedFormat"),
        (photo()[:60], "Truncated"),
        (photo(size=(2000, 600)), "TooManyPixels"),
    ],
)
def test_what_is_no_photograph_is_refused(client: TestClient, content: bytes, reason: str) -> None:
    answer = client.post("/api/photo", files={"photo": ("x.png", content, "image/png")})
    assert answer.status_code == 400
    assert answer.json()["detail"].startswith(f"{reason}: ")
    page = client.post("/photo", files={"photo": ("x.png", content, "image/png")})
    assert (page.status_code, reason in page.text) == (400, True)


def test_a_body_that_is_too_large_is_refused(client: TestClient) -> None:
    large = client.post("/api/photo", files={"photo": ("x.png", b"x" * 300_000, "image/png")})
    assert (large.status_code, large.json()["detail"]) == (413, "expected a photograph of at most 0.191 MB")
    page = client.post("/photo", files={"photo": ("x.png", b"x" * 300_000, "image/png")}, headers=PERSON)
    assert (page.status_code, "<h1>Too large</h1>" in page.text) == (413, True)
    pieces = (b"x" * 10_000 for _ in range(30))
    headers = {"content-type": "multipart/form-data; boundary=b", "transfer-encoding": "chunked"}
    assert client.post("/api/photo", content=pieces, headers=headers).status_code == 413


@pytest.mark.parametrize(
    "url",
    [
        f"/api/search?q={'x' * 501}",
        "/api/search?q=dog&limit=101",
        "/api/search?q=dog&offset=10001",
        "/api/search?q=dog&mode=sql",
        "/api/search?q=dog&min_log_prob=nan",
        "/api/search",
        "/?page=0",
    ],
)
def test_limits_are_kept(client: TestClient, url: str) -> None:
    answer = client.get(url)
    assert answer.status_code == 422
    assert answer.json()["detail"]
    assert "That cannot be asked" in client.get(url, headers=PERSON).text


def test_no_sql_is_taken(client: TestClient) -> None:
    plain = client.get("/api/search?q=dog").json()
    assert client.get("/api/search?q=dog&where=FALSE&sql=SELECT+1").json() == plain
    assert client.get("/api/search", params={"q": "dog", "split": "val' OR '1'='1"}).json()["rows"] == []


def test_only_known_hosts_and_safe_headers(client: TestClient) -> None:
    assert client.get("/", headers={"host": "evil.example.org"}).status_code == 400
    for url in ("/", "/api/search?q=dog", "/static/page.css", "/nothing", "/picture/small?id=im0"):
        headers = client.get(url).headers
        assert "default-src 'none'" in headers["content-security-policy"]
        assert "unsafe" not in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"


def test_health_and_docs(client: TestClient) -> None:
    health = client.get("/health").json()
    assert (health["status"], health["captions"], health["vectors"]) == ("ok", 60, 60)
    docs = client.get("/docs").text
    for path in client.get("/openapi.json").json()["paths"]:
        assert path in docs
    assert "https://" not in docs


def test_nothing_there_is_a_page_for_people_and_json_for_programs(client: TestClient) -> None:
    assert client.get("/nothing").json() == {"detail": "Not Found"}
    assert "<h1>Nothing here</h1>" in client.get("/nothing", headers=PERSON).text
    assert client.get("/static/../../app.py").status_code == 404


def test_without_a_ranker_only_words_are_offered(tmp_path: Path) -> None:
    import captionlib.search
    from captionlib.serving.app import create_app
    from captionlib.serving.service import Library

    make_site(tmp_path, 10, sees=False)
    library = Library(captionlib.search.open(tmp_path / "index"), ServingConfig(hosts=("testserver",)))
    with TestClient(create_app(library, tmp_path / "thumbnails")) as client:
        html = client.get("/?q=dog").text
        assert "radio" not in html
        assert "photograph" not in html
        refused = client.get("/api/search?q=dog&mode=sentence")
        assert (refused.status_code, refused.json()["detail"]) == (400, "sentence cannot be asked here; there is text")
        answer = client.post("/api/photo", files={"photo": ("x.png", photo(), "image/png")})
        assert answer.status_code == 404
