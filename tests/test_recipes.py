from pathlib import Path

import pytest

from captionlib.errors import ConfigError
from captionlib.recipes import find_recipe, list_recipes


def test_recipes_are_found_by_short_and_by_full_name() -> None:
    by_short_name = find_recipe("talk-lstm", "train-captioner")
    assert by_short_name == find_recipe("train-captioner/talk-lstm", "train-ranker")
    assert by_short_name.name == "talk-lstm.yaml"


def test_a_file_comes_before_a_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("talk-lstm").write_text("")
    assert find_recipe("talk-lstm", "train-captioner") == Path("talk-lstm")


def test_an_unknown_recipe_names_the_nearest_and_all_of_the_command() -> None:
    with pytest.raises(ConfigError, match=r"talk-lstn is neither .* \(did you mean talk-lstm\?\); recipes: .*flickr8k"):
        find_recipe("talk-lstn", "train-captioner")
    with pytest.raises(ConfigError, match="recipes: none"):
        find_recipe("x", "inspect")


def test_every_recipe_is_listed_once() -> None:
    names = list_recipes()
    assert "runners/flink" in names
    assert len(set(names.values())) == len(names)
