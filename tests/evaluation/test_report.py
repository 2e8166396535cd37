import base64
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from captionlib.data.images.decoding import Preprocessing, decode_image
from captionlib.errors import DatasetError
from captionlib.evaluation.charts import build_charts
from captionlib.evaluation.image_display import ImageDisplay
from captionlib.evaluation.predictions import Prediction
from captionlib.evaluation.report import write_report


class Page(HTMLParser):
    """Collects the elements with their attributes, and the visible text."""

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


def read_page(folder: Path) -> Page:
    return Page((folder / "index.html").read_text(encoding="utf-8"))


def read_items(folder: Path) -> list[dict[str, Any]]:
    script = (folder / "data.js").read_text(encoding="ascii")
    items: list[dict[str, Any]] = json.loads(script.removeprefix("window.captionlibReport = ").rstrip().rstrip(";"))
    return items


@pytest.fixture
def image_file(tmp_path: Path) -> Path:
    Image.new("RGB", (640, 400), (200, 30, 30)).save(tmp_path / "image_file.png")
    return tmp_path / "image_file.png"


def test_data_holds_everything_about_an_image(tmp_path: Path, image_file: Path) -> None:
    prediction = Prediction(
        "im-1", "a dog", str(image_file), "val", -0.6931, (("a dog", -0.6931), ("a cat", -9.21)), ("Dog!",), 0.25
    )
    page = write_report(
        tmp_path / "new" / "report",
        "Captions",
        [prediction],
        note="Of the dev split.",
        scores=[("BLEU-4", "0.51", "0.49 to 0.53")],
        cider={"im-1": 1.25},
        attributes={"im-1": {"shape": True, "color": False}},
    )
    folder = tmp_path / "new" / "report"
    assert page == str(folder / "index.html")
    assert read_items(folder) == [
        {
            "id": "im-1",
            "caption": "a dog",
            "split": "val",
            "logProb": -0.6931,
            "imageTextScore": 0.25,
            "cider": 1.25,
            "candidates": [["a dog", -0.6931], ["a cat", -9.21]],
            "references": ["Dog!"],
            "attributes": {"shape": True, "color": False},
            "attention": None,
            "thumbnail": "thumbnails/000/000000.jpg",
            "baseline": None,
        }
    ]
    for text in ["Captions", "Of the dev split.", "BLEU-4", "0.51", "0.49 to 0.53", "1 image"]:
        assert text in read_page(folder).text
    assert Image.open(folder / "thumbnails/000/000000.jpg").size == (224, 224)
    assert sorted(path.name for path in folder.iterdir()) == ["data.js", "index.html", "thumbnails"]


def test_page_loads_nothing_from_other_servers(tmp_path: Path, image_file: Path) -> None:
    write_report(tmp_path / "report", "Captions", [Prediction("x", "a dog", str(image_file))])
    page = read_page(tmp_path / "report")
    assert [link["href"] for link in page.all("link")] == ["data:,"]
    assert [script["src"] for script in page.all("script") if "src" in script] == ["data.js"]
    assert "http" not in (tmp_path / "report" / "index.html").read_text(encoding="utf-8")


def test_all_text_is_escaped(tmp_path: Path) -> None:
    evil = "</p></script><script>alert(1)</script>\"'&\u2028"
    prediction = Prediction(evil, evil, evil, evil, -1.0, ((evil, -1.0), (evil, -2.0)), (evil,))
    history = [{"epoch": 1, evil: 1.0}, {"epoch": 2, evil: 2.0}]
    write_report(
        tmp_path / "report",
        evil,
        [prediction],
        note=evil,
        scores=[(evil, evil, evil)],
        attributes={evil: {evil: False}},
        history=history,
    )
    page = read_page(tmp_path / "report")
    assert len(page.all("script")) == 2
    assert page.text.count(evil) == 7  # title, heading, note, three of the score, chart
    data = (tmp_path / "report" / "data.js").read_text(encoding="ascii")
    assert "<" not in data
    assert read_items(tmp_path / "report")[0]["caption"] == evil
    for script in (Path(__file__).parents[2] / "captionlib/evaluation/templates").glob("*.js"):
        text = script.read_text(encoding="utf-8")
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", text)


def test_attention_maps_are_in_a_script_per_image(tmp_path: Path, image_file: Path) -> None:
    maps = np.array([[[0, 255], [7, 64]], [[255, 1], [2, 3]]], np.uint8)
    predictions = [Prediction("x", "dog", str(image_file)), Prediction("y", "cat", str(image_file))]
    write_report(tmp_path / "report", "", predictions, display=ImageDisplay(attention_maps={"x": maps}))
    with_maps, without_maps = read_items(tmp_path / "report")
    script = (tmp_path / "report" / with_maps["attention"]).read_text(encoding="ascii")
    position, texts = json.loads(f"[{script.removeprefix('captionlibMaps(').rstrip().removesuffix(');')}]")
    assert position == 0
    assert [list(base64.b64decode(text)) for text in texts] == [[0, 255, 7, 64], [255, 1, 2, 3]]
    assert without_maps["attention"] is None
    assert "Point at or tap a word" in read_page(tmp_path / "report").text
    write_report(tmp_path / "report", "", predictions)
    assert "Point at or tap a word" not in read_page(tmp_path / "report").text
    assert not (tmp_path / "report" / "attention").exists()


@pytest.mark.parametrize(("resize_size", "crop_size"), [(224, 224), (256, 224), (342, 299)])
def test_thumbnails_show_the_crop_of_the_encoder(tmp_path: Path, resize_size: int, crop_size: int) -> None:
    ramp = np.linspace(0, 255, 400, dtype=np.uint8)
    horizontal, vertical = np.broadcast_to(ramp, (300, 400)), np.broadcast_to(ramp[:300, None], (300, 400))
    Image.fromarray(np.stack([horizontal, vertical, vertical], 2)).save(tmp_path / "ramp.png")
    encoder = Preprocessing(resize_size, crop_size, "bilinear", (0.5, 0.5, 0.5), (0.2, 0.2, 0.2))
    write_report(
        tmp_path / "report",
        "",
        [Prediction("x", "", str(tmp_path / "ramp.png"))],
        display=ImageDisplay(encoder),
    )
    (item,) = read_items(tmp_path / "report")
    expected = Image.fromarray(decode_image((tmp_path / "ramp.png").read_bytes(), encoder).pixels).resize((224, 224))
    thumbnail = Image.open(tmp_path / "report" / item["thumbnail"])
    assert thumbnail.size == (224, 224)
    difference = np.abs(np.asarray(expected, np.int16) - np.asarray(thumbnail, np.int16))
    assert difference.max() <= 6  # JPEG and rounding; another crop differs by about 12 at the sides
    assert difference.mean() < 1.5


def test_unreadable_image_keeps_its_caption(tmp_path: Path) -> None:
    (tmp_path / "empty.jpg").touch()
    uris = [str(tmp_path / "nowhere.jpg"), str(tmp_path / "empty.jpg"), ""]
    write_report(tmp_path / "report", "", [Prediction(uri, "a cat", uri) for uri in uris])
    items = read_items(tmp_path / "report")
    assert [(item["thumbnail"], item["caption"]) for item in items] == [(None, "a cat")] * 3


def test_non_finite_numbers_become_null(tmp_path: Path) -> None:
    prediction = Prediction("x", "a", log_prob=float("-inf"))
    write_report(tmp_path / "report", "", [prediction], cider={"x": float("nan")})
    (item,) = read_items(tmp_path / "report")
    assert (item["logProb"], item["cider"]) == (None, None)


def test_thumbnails_are_split_into_subfolders(
    tmp_path: Path, image_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("captionlib.evaluation.report._FILES_PER_FOLDER", 2)
    write_report(tmp_path / "report", "", [Prediction(str(n), "a", str(image_file)) for n in range(5)])
    names = [item["thumbnail"] for item in read_items(tmp_path / "report")]
    assert names[-1] == "thumbnails/002/000004.jpg"
    assert all((tmp_path / "report" / name).is_file() for name in names)


def test_report_is_replaced_and_other_files_are_not(tmp_path: Path, image_file: Path) -> None:
    write_report(tmp_path / "report", "", [Prediction("x", "a", str(image_file))])
    write_report(tmp_path / "report", "", [])
    assert read_items(tmp_path / "report") == []
    assert not (tmp_path / "report" / "thumbnails").exists()
    for name in ("thesis.tex", "index.html"):
        folder = tmp_path / f"with {name}"
        folder.mkdir()
        (folder / name).touch()
        with pytest.raises(DatasetError, match=rf"not from a report \({name}\); specify an empty folder"):
            write_report(folder, "", [])


def test_charts_show_metrics_of_more_than_one_epoch() -> None:
    history = [
        {"epoch": 1, "loss": 4.0, "CIDEr": None, "total_seconds": 3, "once": 1.0},
        {"epoch": 2, "loss": 2.0, "CIDEr": 0.25, "total_seconds": 3},
        {"epoch": 3, "loss": 3.0, "CIDEr": 0.5, "total_seconds": 3},
    ]
    loss, cider = build_charts(history)
    assert (loss.name, loss.last, loss.best, loss.low, loss.high) == ("loss", "3", "2", "2", "4")
    assert loss.points == [(48, 12), (200, 126), (352, 69)]
    assert loss.path == "M48.0 12.0 L200.0 126.0 L352.0 69.0"
    assert (cider.best, cider.first_epoch, cider.last_epoch) == ("0.5", 2, 3)
    assert (loss.split, loss.best_point, cider.split) == ("training", (200, 126), "validation")
    assert build_charts([]) == []
    assert build_charts([{"epoch": 1, "flat": 1.0}, {"epoch": 2, "flat": 1.0}])[0].points == [(48, 126), (352, 126)]
