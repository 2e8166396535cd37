from pathlib import Path

import pytest
from click.testing import CliRunner

from captionlib.errors import ConfigError
from captionlib.recipes import list_recipes
from jobs.cli import captionlib


def recipes(*arguments: str) -> str:
    return CliRunner().invoke(captionlib, ["recipes", *arguments], catch_exceptions=False).output


def test_recipes_are_listed_by_command_with_a_summary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in {
        "train-captioner/small": "# A small captioner,\n# for tests. More text.\nseed: 1\n",
        "train-captioner/large": "# Large:\n#   captionlib train-captioner features\nseed: 1\n",
        "runners/local": "runner: DirectRunner\n",
    }.items():
        (tmp_path / name).with_suffix(".yaml").parent.mkdir(exist_ok=True)
        (tmp_path / name).with_suffix(".yaml").write_text(text)
    monkeypatch.setattr("captionlib.recipes.recipes_folder", lambda: tmp_path)
    lines = [line.rstrip() for line in recipes().splitlines()]
    assert lines == [
        "runners:",
        "  local",
        "",
        "train-captioner:",
        f"  {'large':<22}  Large",
        f"  {'small':<22}  A small captioner, for tests.",
    ]


def test_all_recipes_are_listed() -> None:
    lines = [line.split() for line in recipes().splitlines()]
    assert {line[0] for line in lines if line} >= {name.rpartition("/")[2] for name in list_recipes()}


@pytest.mark.parametrize("name", ["train-captioner/talk-lstm", "talk-lstm"])
def test_recipe_is_printed_as_it_is(name: str) -> None:
    assert recipes(name) == list_recipes()["train-captioner/talk-lstm"].read_text(encoding="utf-8")


def test_unknown_recipe_suggests_the_nearest_name() -> None:
    with pytest.raises(ConfigError, match=r"talk-lstn is neither .* \(did you mean talk-lstm\?\)"):
        recipes("talk-lstn")


def test_ambiguous_short_name_lists_the_full_names() -> None:
    with pytest.raises(ConfigError, match="flickr8k is the name of 2 recipes; use one of generate-captions/flickr8k, "):
        recipes("flickr8k")
