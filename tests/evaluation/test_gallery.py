import base64
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from captionlib.evaluation.gallery import GalleryItem, write_gallery


class Page(HTMLParser):
    """Elements with their attributes, and the text a reader sees."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._code = 0
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._code += tag in ("script", "style")

    def handle_endtag(self, tag: str) -> None:
        self._code -= tag in ("script", "style")

    def handle_data(self, data: str) -> None:
        self.text += "" if self._code else data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    Image.new("RGB", (640, 400), (200, 30, 30)).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def write(tmp_path: Path, *items: GalleryItem, **options: str) -> Page:
    path = write_gallery(tmp_path / "new" / "gallery.html", options.pop("title", "Captions"), items, **options)
    return Page(path.read_text(encoding="utf-8"))


def test_everything_about_an_image_is_shown(tmp_path: Path, photo: Path) -> None:
    item = GalleryItem(
        "im-1",
        photo,
        "a dog",
        -0.6931,
        candidates=[("a dog", -0.6931), ("a cat", -9.21)],
        references=["A dog runs.", "Dog!"],
        marks={"shape": True, "colour": False},
    )
    path = write_gallery(tmp_path / "gallery.html", "Captions", [item], [("BLEU-4", "0.51")], "Of the dev split.")
    page = Page(path.read_text(encoding="utf-8"))
    for text in [
        "Captions",
        "Of the dev split.",
        "BLEU-4",
        "0.51",
        "im-1",
        "a dog",
        "a cat (0.01%)",
        "A dog runs.",
        "Dog!",
    ]:
        assert text in page.text
    assert "log-probability -0.69 (50%)" in page.text
    assert re.search(r"✓\s*shape: right", page.text)
    assert re.search(r"✗\s*colour: wrong", page.text)
    (card,) = [attributes for attributes in page.all("li") if "data-place" in attributes]
    assert card == {"data-place": "1", "data-log-prob": "-0.6931", "data-wrong": "colour "}


def test_thumbnails_are_in_the_page_and_small(tmp_path: Path, photo: Path) -> None:
    (image,) = write(tmp_path, GalleryItem("x", photo, "a dog", -1.0)).all("img")
    source = image["src"] or ""
    assert source.startswith("data:image/jpeg;base64,")
    thumbnail = Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2])))
    assert thumbnail.size == (224, 224)
    assert image["loading"] == "lazy"
    assert image["alt"] == "picture x"


def test_the_page_needs_nothing_from_elsewhere(tmp_path: Path, photo: Path) -> None:
    page = write(tmp_path, GalleryItem("x", photo, "a dog", -1.0, marks={"shape": True}))
    assert not page.all("link")
    assert all("src" not in script for script in page.all("script"))
    assert "http" not in re.sub(r"base64,\S+", "", (tmp_path / "new" / "gallery.html").read_text(encoding="utf-8"))


def test_all_text_is_escaped(tmp_path: Path, photo: Path) -> None:
    evil = "</p><script>alert(1)</script>\"'&"
    item = GalleryItem(evil, photo, evil, -1.0, [(evil, -1.0), (evil, -2.0)], [evil], {evil: False})
    path = write_gallery(tmp_path / "gallery.html", evil, [item], [(evil, evil)], evil)
    page = Page(path.read_text(encoding="utf-8"))
    assert len(page.all("script")) == 1
    assert page.text.count(evil) == 12


def test_a_picture_that_cannot_be_had_leaves_its_caption(tmp_path: Path) -> None:
    (tmp_path / "empty.jpg").touch()
    page = write(
        tmp_path,
        GalleryItem("gone", tmp_path / "nowhere.jpg", "a dog", -1.0),
        GalleryItem("empty", str(tmp_path / "empty.jpg"), "a cat", -1.0),
    )
    assert not page.all("img")
    assert page.text.count("the picture cannot be read") == 2
    assert "a cat" in page.text


def test_a_page_without_marks_has_nothing_to_filter_by_them(tmp_path: Path, photo: Path) -> None:
    assert [select["id"] for select in write(tmp_path, GalleryItem("x", photo, "a dog", -1.0)).all("select")] == [
        "order"
    ]
    marked = write(
        tmp_path, GalleryItem("x", photo, "a", -1.0), GalleryItem("y", photo, "b", -1.0, marks={"size": True})
    )
    assert [select["id"] for select in marked.all("select")] == ["order", "which"]
    assert [option["value"] for option in marked.all("option")][3:] == ["", "right", "wrong", "size"]


def test_a_page_of_nothing_is_a_page(tmp_path: Path) -> None:
    assert "0 pictures" in write(tmp_path).text
