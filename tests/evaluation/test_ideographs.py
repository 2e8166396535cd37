import pytest

from captionlib.evaluation.diversity import count_diversity
from captionlib.evaluation.ideographs import separate_characters


@pytest.mark.parametrize(
    ("text", "separated"),
    [
        ("A dog's ball, isn't it?", "A dog's ball, isn't it?"),
        ("नमस्ते दुनिया।", "नमस्ते दुनिया।"),
        ("一只狗\uff0c在跑。", "一 只 狗 在 跑"),
        ("犬がボールで遊ぶ", "犬 が ボ ー ル で 遊 ぶ"),
        ("两只Golden Retriever的T恤", "两 只 golden retriever 的 t 恤"),
        ("", ""),
    ],
)
def test_only_han_characters_and_kana_are_separated(text: str, separated: str) -> None:
    assert separate_characters(text) == separated
    assert separate_characters(separated) == separated


def test_diversity_counts_characters() -> None:
    assert count_diversity({"a": "一只狗。", "b": "一只猫", "c": "一只猫。"}) == {
        "distinct_captions": 2,
        "vocabulary_size": 4,
    }
