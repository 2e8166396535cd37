import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from captionlib.data.text.corpora import TextLayout
from captionlib.data.text.vocabulary import Vocabulary
from captionlib.errors import CheckpointError, ConfigError
from captionlib.models.captioners.captioner import CaptionerConfig, CaptionerNetwork
from captionlib.models.captioners.language_model import LanguageModelConfig, build_language_model
from captionlib.models.captioners.packed_sequences import pad_sentences
from captionlib.models.checkpoints.checkpoint import (
    LoadedLanguageModel,
    load_captioner,
    load_language_model,
    save_language_model,
)
from captionlib.models.decoding.config import DecodingConfig
from captionlib.models.decoding.text_sampling import sample_texts

WORDS = Vocabulary.from_captions(["a dog runs far", "a cat runs away"], min_count=1)
CHARACTERS = Vocabulary.from_captions(["a dog runs far, far away\n"], min_count=1, tokenization="characters")
CONFIG = LanguageModelConfig(layers=2, hidden_size=6, embedding_size=5)
SENTENCES = [[2, 3, 4], [5], [], [6, 2]]
SAMPLE = DecodingConfig(strategy="sample", max_tokens=8)


def build(
    config: LanguageModelConfig = CONFIG, vocabulary: Vocabulary = WORDS, spread: float = 1.5
) -> CaptionerNetwork:
    generator = torch.Generator().manual_seed(0)
    model = build_language_model(config, len(vocabulary)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(-spread, spread, generator=generator)
    return model


def load(folder: Path, vocabulary: Vocabulary = WORDS, layout: TextLayout = "sentences") -> LoadedLanguageModel:
    model = build(vocabulary=vocabulary)
    save_language_model(folder, model, CONFIG, vocabulary, layout, provenance={"source": "x"}, training={"loss": 1})
    return load_language_model(folder)


def score(model: CaptionerNetwork, sentences: list[list[int]]) -> torch.Tensor:
    nothing, rows = torch.zeros(1, 0), torch.zeros(len(sentences), dtype=torch.int64)
    scores = model(nothing, pad_sentences(sentences), rows)
    return torch.zeros(len(sentences)).index_add(0, scores.sentences, scores.log_probs)


@pytest.mark.parametrize("cell", ["lstm", "rnn"])
@pytest.mark.parametrize("tied", [False, True])
def test_language_model_equals_captioner_with_zero_image(cell: Any, tied: bool) -> None:
    config = LanguageModelConfig(cell, layers=2, hidden_size=5, embedding_size=5, tie_embeddings=tied)
    model = build(config, spread=0.8)
    captioner = CaptionerNetwork(replace(config.to_captioner_config(), image_input="first_step"), 3, len(WORDS)).eval()
    gates = len(captioner.recurrence.bias_ih_l0)
    unexpected = captioner.load_state_dict(
        model.state_dict()
        | {
            "standardization.mean": torch.zeros(3),
            "standardization.std": torch.ones(3),
            "image_projection.weight": torch.zeros(gates, 3),
            "image_projection.bias": torch.zeros(gates),
        }
    )
    assert not unexpected.unexpected_keys
    scores = captioner(torch.randn(1, 3), pad_sentences(SENTENCES), torch.zeros(4, dtype=torch.int64))
    expected = torch.zeros(4).index_add(0, scores.sentences, scores.log_probs)
    torch.testing.assert_close(score(model, SENTENCES), expected)
    assert expected.std() > 0.1


def test_features_are_rejected_without_image_input() -> None:
    with pytest.raises(ConfigError, match=r"image_input none and feature_size 0 together .* got none and 3"):
        CaptionerNetwork(CONFIG.to_captioner_config(), 3, 9)
    with pytest.raises(ConfigError, match=r"image_input none and feature_size 0 together .* got initial_input and 0"):
        CaptionerNetwork(CaptionerConfig(), 0, 9)
    with pytest.raises(ConfigError, match="embedding_size = hidden_size, got 5 and 6"):
        replace(CONFIG, tie_embeddings=True)


@pytest.mark.parametrize("vocabulary", [WORDS, CHARACTERS], ids=["words", "characters"])
def test_save_and_load_round_trip(vocabulary: Vocabulary, tmp_path: Path) -> None:
    loaded = load(tmp_path / "model", vocabulary, "continuous")
    assert torch.equal(score(loaded.model, SENTENCES), score(build(vocabulary=vocabulary), SENTENCES))
    assert (loaded.vocabulary, loaded.layout, loaded.config) == (vocabulary, "continuous", CONFIG)
    assert (loaded.provenance, loaded.training) == ({"source": "x"}, {"loss": 1})
    assert not loaded.model.training
    assert loaded.fingerprint == json.loads((tmp_path / "model" / "config.json").read_text())["fingerprint"]


def test_load_captioner_rejects_language_model(tmp_path: Path) -> None:
    load(tmp_path / "model")
    with pytest.raises(CheckpointError, match="expected a checkpoint of kind captioner, got language_model"):
        load_captioner(tmp_path / "model")


def test_save_rejects_vocabulary_of_another_size(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="expected a vocabulary of 8 tokens, got one of"):
        save_language_model(tmp_path, build(), CONFIG, CHARACTERS, "sentences", provenance={}, training={})


def test_log_prob_covers_whole_sentence(tmp_path: Path) -> None:
    loaded = load(tmp_path / "model")
    samples = sample_texts(loaded, SAMPLE, 30, prefix="A dog")
    ended = [sample for sample in samples if sample.tokens > len(sample.text.split())]
    assert ended
    expected = score(loaded.model, [loaded.vocabulary.encode(sample.text) for sample in ended])
    assert [sample.log_prob for sample in ended] == pytest.approx(expected.tolist(), rel=1e-4)
    assert all(sample.text.startswith("a dog") for sample in samples)
    assert max(sample.tokens for sample in samples) == 2 + 8


def test_larger_count_extends_samples_of_same_seed(tmp_path: Path) -> None:
    loaded = load(tmp_path / "model")
    few = sample_texts(loaded, SAMPLE, 5)
    many = sample_texts(loaded, SAMPLE, 120)  # more than one batch
    assert [sample.text for sample in many[:5]] == [sample.text for sample in few]
    assert len(many) == 120
    assert len({sample.text for sample in many}) > 60
    assert [sample.text for sample in sample_texts(loaded, replace(SAMPLE, seed=1), 5)] != [s.text for s in few]


def test_continuous_text_has_requested_length(tmp_path: Path) -> None:
    loaded = load(tmp_path / "model", CHARACTERS, "continuous")
    samples = sample_texts(loaded, replace(SAMPLE, max_tokens=40), 10, prefix="far, ")
    assert all(len(sample.text) == 45 == sample.tokens for sample in samples)
    assert all(sample.text.startswith("far, ") for sample in samples)


def test_sample_texts_rejects_unknown_prefix(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="words of the model's vocabulary, got 'zebra'"):
        sample_texts(load(tmp_path / "words"), SAMPLE, 1, prefix="a zebra runs")
    with pytest.raises(ConfigError, match="characters of the model's vocabulary, got 'A', '!'"):
        sample_texts(load(tmp_path / "characters", CHARACTERS), SAMPLE, 1, prefix="A far!")
