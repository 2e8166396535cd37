from pathlib import Path

import pytest

from captionlib.errors import ConfigError
from captionlib.recipes import find_recipe, list_recipes


def test_find_recipe_accepts_short_and_full_names() -> None:
    by_short_name = find_recipe("talk-lstm", "train-captioner")
    assert by_short_name == find_recipe("train-captioner/talk-lstm", "train-ranker")
    assert by_short_name.name == "talk-lstm.yaml"


def test_find_recipe_prefers_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("talk-lstm").write_text("")
    assert find_recipe("talk-lstm", "train-captioner") == Path("talk-lstm")


def test_unknown_recipe_error_suggests_alternatives() -> None:
    with pytest.raises(ConfigError, match=r"talk-lstn is neither .* \(did you mean talk-lstm\?\); recipes: .*flickr8k"):
        find_recipe("talk-lstn", "train-captioner")
    with pytest.raises(ConfigError, match="recipes: none"):
        find_recipe("x", "inspect")


def test_list_recipes_lists_each_recipe_once() -> None:
    names = list_recipes()
    assert "runners/flink" in names
    assert len(set(names.values())) == len(names)
