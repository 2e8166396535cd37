import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from captionlib.errors import ConfigError
from jobs.cli import captionlib

TINY = ["model.hidden_size=8", "model.embedding_size=8", "training.epochs=1", "min_count=1"]


def run(*arguments: str) -> str:
    result = CliRunner().invoke(captionlib, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def train(tmp_path: Path, *options: str) -> str:
    (tmp_path / "text.txt").write_text("a dog runs far away\nthe cat sleeps\n" * 60)
    settings = [part for option in (*TINY, *options) for part in ("--set", option)]
    output = run(
        "train-language-model", str(tmp_path / "text.txt"), "-o", str(tmp_path / "model"), "--no-progress", *settings
    )
    assert "perplexity" in output
    return str(tmp_path / "model")


def test_sample_prints_sentences(tmp_path: Path) -> None:
    checkpoint = train(tmp_path)
    lines = run("sample", checkpoint, "--count", "3", "--prefix", "a dog", "--length", "4").splitlines()
    assert len(lines) == 3
    assert all(line.startswith("a dog") and len(line.split()) <= 6 for line in lines)
    assert lines == run("sample", checkpoint, "--count", "3", "--prefix", "a dog", "--length", "4").splitlines()
    other = run("sample", checkpoint, "--count", "3", "--seed", "5", "--temperature", "2", "--json").splitlines()
    assert all(json.loads(line).keys() == {"text", "log_prob", "tokens"} for line in other)
    assert "kind: language_model" in run("inspect", checkpoint)


def test_sample_prints_continuous_text_of_length(tmp_path: Path) -> None:
    checkpoint = train(tmp_path, "layout=continuous", "tokenization=characters", "sequence_length=20")
    output = run("sample", checkpoint, "--count", "2", "--length", "50", "--top-k", "3", "--top-p", "0.9")
    first, second = output.split("----\n")
    assert len(first) == len(second) == 51
    assert "characters" in run("inspect", checkpoint)


@pytest.mark.parametrize("tokenization", ["bpe", "unigram"])
def test_sample_continues_a_prefix_of_subwords(tmp_path: Path, tokenization: str) -> None:
    checkpoint = train(tmp_path, f"tokenization={tokenization}", "vocabulary_size=24")
    assert run("sample", checkpoint, "--prefix", "The dogs", "--length", "4").startswith("the dogs")
    with pytest.raises(ConfigError, match="prefix: expected subwords of the model's vocabulary, got 'zoo'; use a diff"):
        run("sample", checkpoint, "--prefix", "the zoo")


@pytest.mark.parametrize(
    "setting", ["decoding.strategy=sample", "decoding.beam_groups=5", "decoding.no_repeat_ngram_size=2"]
)
def test_set_reaches_decoding(setting: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(captionlib, ["caption", "x.jpg", "-c", str(tmp_path), "--set", setting])
    assert "is not a checkpoint" in str(result.exception)  # the setting was accepted
