import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from PIL import Image

from captionlib.models.encoders.encoder import EncoderConfig, load_encoder
from jobs.cli import captionlib
from tests.evaluation.test_report import read_items
from tests.models.attending import write_captioner


@pytest.fixture(scope="module")
def captioners(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One that looks, and one that takes images in at a glance."""
    folder = tmp_path_factory.mktemp("captioners")
    encoder = load_encoder(EncoderConfig("squeezenet1_1", "features.7.cat", "random:0"), "cpu").description
    write_captioner(folder / "looking", encoder)
    write_captioner(folder / "glancing", encoder, attention_size=0)
    return folder


@pytest.fixture
def photo(tmp_path: Path) -> str:
    Image.new("RGB", (90, 70), "teal").save(tmp_path / "photo.png")
    return str(tmp_path / "photo.png")


def caption(*arguments: str | Path) -> Result:
    options = ["caption", *map(str, arguments), "--device", "cpu"]
    return CliRunner().invoke(captionlib, options, catch_exceptions=False)


def test_a_page_of_single_images_shows_where_the_captioner_looked(captioners: Path, photo: str, tmp_path: Path) -> None:
    result = caption(photo, tmp_path / "gone.png", "-c", captioners / "looking", "--report", tmp_path / "page")
    assert result.exit_code == 1, "an image is missing"
    assert result.stdout.endswith(f"{tmp_path}/page/index.html: 1 images\n")
    (item,) = read_items(tmp_path / "page")
    assert item["id"] == photo
    assert item["caption"] in result.stdout
    assert len(item["looks"]) - len(item["caption"].split()) in (0, 1)
    assert (tmp_path / "page" / item["thumbnail"]).is_file()


def test_a_page_of_a_captioner_without_attention_has_no_maps(captioners: Path, photo: str, tmp_path: Path) -> None:
    result = caption(photo, "-c", captioners / "glancing", "--report", tmp_path / "page", "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout)["uri"] == photo
    assert [item["looks"] for item in read_items(tmp_path / "page")] == [[]]


def test_maps_are_in_the_json_where_they_are_asked_for(captioners: Path, photo: str) -> None:
    row = json.loads(caption(photo, "-c", captioners / "looking", "--json", "--set", "attention_maps=true").stdout)
    assert len(row["attention"]) == row["tokens"]
    assert "attention" not in json.loads(caption(photo, "-c", captioners / "looking", "--json").stdout)
