from dataclasses import replace
from pathlib import Path

import pytest

from captionlib.config import load_config
from captionlib.errors import ConfigError
from captionlib.recipes import find_recipe, list_recipes, recipes_folder
from captionlib.training.captioning import CaptionerTrainingConfig
from captionlib.training.finetuning import FinetuningConfig
from captionlib.training.language_modeling import LanguageModelTrainingConfig
from captionlib.training.ranking import RankerTrainingConfig


def test_find_recipe_accepts_short_and_full_names() -> None:
    by_short_name = find_recipe("talk-lstm", "train-captioner")
    assert by_short_name == find_recipe("train-captioner/talk-lstm", "train-ranker")
    assert by_short_name.name == "talk-lstm.yaml"


def test_find_recipe_prefers_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("talk-lstm").write_text("")
    assert find_recipe("talk-lstm", "train-captioner") == Path("talk-lstm")


def test_unknown_recipe_error_suggests_alternatives() -> None:
    with pytest.raises(ConfigError, match=r"talk-lstn is neither .* of train-captioner \(did you mean talk-lstm\?\)"):
        find_recipe("talk-lstn", "train-captioner")
    with pytest.raises(ConfigError, match="x is neither a file nor a recipe of inspect; "):
        find_recipe("x", "inspect")


def test_list_recipes_lists_each_recipe_once() -> None:
    names = list_recipes()
    assert "runners/flink" in names
    assert len(set(names.values())) == len(names)


def test_base_recipes_are_not_listed_but_extended() -> None:
    base = recipes_folder() / "train-captioner" / "_flickr8k.yaml"
    assert base.exists()
    assert base not in list_recipes().values()
    with pytest.raises(ConfigError, match="neither a file nor a recipe"):
        find_recipe("_flickr8k", "train-captioner")
    pooled, attention = (
        load_config(CaptionerTrainingConfig, find_recipe(f"flickr8k-{name}", "train-captioner"))
        for name in ("pooled", "attention")
    )
    assert (pooled.captioner.attention_size, attention.captioner.attention_size) == (0, 512)
    assert (pooled.batch_images, attention.batch_images) == (32, 20)
    assert pooled.training == attention.training


def test_talk_recipes_differ_in_cell_and_image_input_alone() -> None:
    lstm, rnn = (
        load_config(CaptionerTrainingConfig, find_recipe(f"talk-{cell}", "train-captioner")) for cell in ("lstm", "rnn")
    )
    assert replace(lstm, captioner=replace(lstm.captioner, cell="rnn", image_input="first_step")) == rnn


@pytest.mark.parametrize(
    ("command", "config_type"),
    [
        ("train-captioner", CaptionerTrainingConfig),
        ("train-ranker", RankerTrainingConfig),
        ("train-language-model", LanguageModelTrainingConfig),
    ],
)
def test_training_recipes_are_valid(command: str, config_type: type) -> None:
    for name, file in list_recipes(command).items():
        overrides = ["init_from=captioner"] if name == "flickr8k-self-critical" else []
        load_config(FinetuningConfig if name == "finetune-encoder" else config_type, file, overrides)
