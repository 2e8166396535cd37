import base64
import io
import os
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from captionlib.evaluation.activation_page import write_activation_page
from captionlib.models.encoders.activations import Activations, LayerActivations
from jobs.cli import captionlib
from tests.evaluation.test_report import Page

IMAGE = np.full((8, 8, 3), 128, np.uint8)


def render(tmp_path: Path, *layers: LayerActivations, **options: object) -> Page:
    activations = Activations(IMAGE, layers, **{"classes": [], "note": "", **options})  # type: ignore[arg-type]
    write_activation_page(tmp_path / "new" / "page.html", "image.jpg", activations, "a network")
    return Page((tmp_path / "new" / "page.html").read_text(encoding="utf-8"))


def read_sprite(page: Page) -> Image.Image:
    (style,) = [section["style"] or "" for section in page.all("section")]
    encoded = style.partition("base64,")[2].partition(")")[0]
    return Image.open(io.BytesIO(base64.b64decode(encoded)))


def test_channels_are_sorted_and_scaled_by_their_peaks(tmp_path: Path) -> None:
    maps = np.zeros((18, 2, 3), np.float32)
    maps[4, 0, 1], maps[4, 1, 2] = 10, 5
    maps[17, 1, 0] = 2
    maps[0] = -1  # a constant map: its minimum is black
    page = render(tmp_path, LayerActivations("features.1", maps))
    labels = [button["aria-label"] for button in page.all("button") if "aria-label" in button]
    assert labels[:3] == ["channel 4, peak 10", "channel 17, peak 2", "channel 1, peak 0"]
    assert labels[-1] == "channel 0, peak -1"
    assert "18 channels of 3 x 2 positions, 16 of them inactive" in page.text
    sprite = read_sprite(page)
    assert sprite.size == (16 * 3, 2 * 2)
    values = np.asarray(sprite)
    assert values[:2, :3].tolist() == [[0, 255, 0], [0, 0, 128]]
    assert values[:2, 3:6].tolist() == [[0, 0, 0], [255, 0, 0]]
    positions = [tile["style"] for tile in page.all("i")]
    assert positions[0] == "background-position: 0.0000% 0.0000%"
    assert positions[17] == "background-position: 6.6667% 100.0000%"


def test_large_maps_are_reduced_by_averaging(tmp_path: Path) -> None:
    maps = np.zeros((1, 226, 224), np.float32)
    maps[0, :3, :3] = 9.0
    assert read_sprite(render(tmp_path, LayerActivations("x", maps))).size == (16 * 74, 75)


def test_overview_shows_the_mean_of_the_scaled_channels_of_each_layer(tmp_path: Path) -> None:
    maps = np.zeros((2, 1, 3), np.float32)
    maps[0, 0, 0], maps[1, 0, 0], maps[1, 0, 1] = 100, 1, 1
    page = render(tmp_path, LayerActivations("first", maps), LayerActivations("second", maps))
    assert [link["href"] for link in page.all("a")] == ["#layer-1", "#layer-2"]
    overview, _, _ = page.all("img")
    mean = Image.open(io.BytesIO(base64.b64decode((overview["src"] or "").partition("base64,")[2])))
    assert np.asarray(mean).tolist() == [[255, 128, 0]]


def test_only_the_first_channels_are_visible_at_first(tmp_path: Path) -> None:
    page = render(tmp_path, LayerActivations("x", np.ones((64, 1, 1), np.float32)))
    buttons = [button for button in page.all("button") if "aria-label" in button]
    assert sum("hidden" in button for button in buttons) == 16
    assert "show all 64 channels" in page.text


def test_page_shows_the_classes_or_the_reason_for_their_absence(tmp_path: Path) -> None:
    layer = LayerActivations("x", np.ones((1, 1, 1), np.float32))
    page = render(tmp_path, layer, classes=[("<tabby>", 0.75), ("fox", 0.125)])
    assert "<tabby>75.0%" in page.text.replace("\n", "")
    assert "no classifier" in render(tmp_path, layer, note="The weights have no classifier").text


def test_text_is_escaped_and_the_page_is_self_contained(tmp_path: Path) -> None:
    evil = "</p><script>alert(1)</script>\"'&"
    activations = Activations(IMAGE, [LayerActivations(evil, np.ones((1, 1, 1), np.float32))], [(evil, 1.0)], "")
    write_activation_page(tmp_path / "page.html", evil, activations, evil)
    html = (tmp_path / "page.html").read_text(encoding="utf-8")
    page = Page(html)
    assert len(page.all("script")) == 1
    assert page.text.count(evil) == 6
    assert "http" not in html
    assert page.all("link") == [{"rel": "icon", "href": "data:,"}]


def test_command_writes_the_page_and_reports_missing_classes(tmp_path: Path) -> None:
    Image.fromarray(IMAGE).save(tmp_path / "image.png")
    options = ["--weights", "random:0", "--node", "features.1", "--set", "model=squeezenet1_1"]
    arguments = ["activations", str(tmp_path / "image.png"), "-o", str(tmp_path / "page.html"), *options]
    result = CliRunner().invoke(captionlib, arguments, catch_exceptions=False)
    assert result.stdout == f"{tmp_path}/page.html: 64 maps of 1 layers\n"
    assert "weights are random" in result.stderr
    assert "image.png" in Page((tmp_path / "page.html").read_text(encoding="utf-8")).text


@pytest.mark.skipif(
    "CAPTIONLIB_VGG16_TRUNK" not in os.environ, reason="set CAPTIONLIB_VGG16_TRUNK to the weights file of the trunk"
)
def test_trained_weights_activate_every_layer(tmp_path: Path) -> None:
    Image.effect_mandelbrot((224, 224), (-2, -1.5, 1, 1.5), 50).convert("RGB").save(tmp_path / "image.png")
    arguments = ["activations", str(tmp_path / "image.png"), "-o", str(tmp_path / "page.html")]
    arguments += ["--weights", os.environ["CAPTIONLIB_VGG16_TRUNK"]]
    result = CliRunner().invoke(captionlib, arguments, catch_exceptions=False)
    assert "4,224 maps of 13 layers" in result.stdout
    assert "no classifier" in result.stderr
