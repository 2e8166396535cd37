import json
import shlex
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from captionlib.data.sources.folder import find_images
from captionlib.errors import DatasetError
from captionlib.models.encoders.encoder import EncoderConfig, load_encoder
from jobs.cli import captionlib
from tests.evaluation.test_report import read_items
from tests.models.attention_captioner import write_captioner
from tests.models.checkpoint_loads import count_checkpoint_loads


@pytest.fixture(scope="module")
def captioners(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Writes a captioner with attention and one without."""
    folder = tmp_path_factory.mktemp("captioners")
    encoder = load_encoder(EncoderConfig("squeezenet1_1", "features.7.cat", "random:0"), "cpu").description
    write_captioner(folder / "attention", encoder)
    write_captioner(folder / "pooled", encoder, attention_size=0)
    return folder


@pytest.fixture
def image(tmp_path: Path) -> str:
    Image.new("RGB", (90, 70), "teal").save(tmp_path / "image.png")
    return str(tmp_path / "image.png")


def caption(*arguments: str | Path) -> Result:
    options = ["caption", *map(str, arguments), "--device", "cpu"]
    return CliRunner().invoke(captionlib, options, catch_exceptions=False)


@pytest.mark.parametrize(
    ("command", "example"),
    [
        ("caption 'my photo.jpg' other.jpg", "caption 'my photo.jpg'"),
        ("generate-captions manifest -o captions", "generate-captions manifest -o captions"),
        ("init holidays --source images/", "init holidays --source images/"),
    ],
)
def test_without_a_captioner_three_lines_say_how_to_get_one(command: str, example: str) -> None:
    result = CliRunner().invoke(captionlib, shlex.split(command))
    assert result.exit_code == 2
    first, pretrained, demo = result.output.splitlines()
    assert first == f"Error: {command.split(maxsplit=1)[0]} needs a captioner, -c FOLDER. To get one, run one of these:"
    assert f"captionlib {example} -c hf:Salesforce/" in pretrained
    assert f"captionlib {example} -c demo/captioner" in demo
    for line in (pretrained, demo):
        arguments = shlex.split(line, comments=True)
        words = arguments[arguments.index("&&") + 2 :]
        with click.Context(captionlib) as parent:
            subcommand = captionlib.get_command(parent, words[0])
            assert subcommand is not None
            subcommand.make_context(words[0], words[1:], parent=parent)


def test_report_shows_the_attention_maps_of_each_token(captioners: Path, image: str, tmp_path: Path) -> None:
    result = caption(image, tmp_path / "missing.png", "-c", captioners / "attention", "--report", tmp_path / "page")
    assert result.exit_code == 1, "one image is missing"
    assert result.stdout.endswith(f"{tmp_path}/page/index.html: 1 images\n")
    (item,) = read_items(tmp_path / "page")
    assert item["id"] == image
    assert item["caption"] in result.stdout
    script = (tmp_path / "page" / item["attention"]).read_text(encoding="ascii")
    maps = json.loads(script[script.index("[") : script.rindex("]") + 1])
    assert len(maps) - len(item["caption"].split()) in (0, 1)
    assert (tmp_path / "page" / item["thumbnail"]).is_file()


def test_report_of_a_captioner_without_attention_has_no_maps(captioners: Path, image: str, tmp_path: Path) -> None:
    result = caption(image, "-c", captioners / "pooled", "--report", tmp_path / "page", "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout)["uri"] == image
    assert [item["attention"] for item in read_items(tmp_path / "page")] == [None]


def test_images_of_folders_and_globs_are_captioned(captioners: Path, image: str, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    (folder / "more").mkdir(parents=True)
    for path in (folder / "a.png", folder / "more" / "b.png"):
        path.write_bytes(Path(image).read_bytes())
    (folder / "notes.txt").touch()
    (folder / "dangling.png").symlink_to(folder / "nowhere.png")
    found = [str(folder / "a.png"), str(folder / "more" / "b.png")]
    for address, expected in ((folder, found), (folder / "*.png", found[:1])):
        result = caption(address, "-c", captioners / "pooled", "--json")
        assert [json.loads(line)["uri"] for line in result.stdout.splitlines()] == expected
        assert result.exit_code == 0
    with pytest.raises(DatasetError, match=r"has no images; skipped: .* extension .json"):
        find_images(str(captioners))


def test_a_report_loads_the_captioner_once(
    captioners: Path, image: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads = count_checkpoint_loads(monkeypatch)
    caption(image, "-c", captioners / "attention", "--report", tmp_path / "page")
    assert loads == ["attention"]


def test_json_contains_attention_maps_only_on_request(captioners: Path, image: str) -> None:
    row = json.loads(caption(image, "-c", captioners / "attention", "--json", "--set", "attention_maps=true").stdout)
    assert len(row["attention"]) == row["tokens"]
    assert "attention" not in json.loads(caption(image, "-c", captioners / "attention", "--json").stdout)


def test_n_best_overrides_the_configuration_and_is_1_without_one(captioners: Path, image: str, tmp_path: Path) -> None:
    (tmp_path / "three.yaml").write_text("decoding:\n  n_best: 3\n")

    def count(*options: str | Path) -> int:
        row = json.loads(caption(image, "-c", captioners / "pooled", "--json", *options).stdout)
        return len(row["candidates"])

    assert count() == 1
    assert count("--config", tmp_path / "three.yaml") == 3
    assert count("--config", tmp_path / "three.yaml", "--n-best", "2") == 2
