from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from captionlib.data.text.vocabulary import Vocabulary
from captionlib.errors import CheckpointError, ConfigError
from captionlib.models.captioners.packed_sequences import pad_sentences
from captionlib.models.checkpoints.checkpoint import LoadedRanker, load_captioner, load_ranker, save_ranker
from captionlib.models.rankers.ranker import RankerConfig, RankerNetwork

SMALL = RankerConfig(hidden_size=8, embedding_size=6, joint_embedding_size=5, pooling="last")
ENCODER = {"model": "vgg16", "shape": [7]}
SHAPES = [
    replace(SMALL, sentence_encoder=encoder, pooling=pooling, layers=layers)
    for encoder, pooling, layers in [
        ("mean", "last", 1),
        ("gru", "last", 2),
        ("gru", "max", 1),
        ("lstm", "mean", 2),
        ("lstm", "last", 1),
    ]
]


def make(config: RankerConfig = SMALL, words: int = 9) -> RankerNetwork:
    torch.manual_seed(0)
    return RankerNetwork(config, 7, words).eval()


@pytest.fixture
def ranker(tmp_path: Path) -> LoadedRanker:
    vocabulary = Vocabulary.from_captions(["a dog runs", "a cat sleeps"], min_count=1)
    save_ranker(tmp_path, make(words=len(vocabulary)), vocabulary, ENCODER, provenance={}, training={})
    return load_ranker(tmp_path)


@pytest.mark.parametrize("config", SHAPES, ids=lambda config: f"{config.sentence_encoder}-{config.pooling}")
def test_embeddings_are_independent_of_padding_and_batch(config: RankerConfig) -> None:
    model = make(config)
    sentences = [[2, 3, 4, 5], [], [6], [2, 3]]
    together = model.embed_sentences(pad_sentences(sentences))
    assert together.shape == (4, 5)
    torch.testing.assert_close(together.norm(dim=1), torch.ones(4))
    for row, sentence in zip(together, sentences, strict=True):
        torch.testing.assert_close(model.embed_sentences(pad_sentences([sentence]))[0], row)


def test_word_order_matters_only_to_recurrence() -> None:
    one, other = pad_sentences([[2, 3, 4]]), pad_sentences([[4, 2, 3]])
    mean, gru = make(replace(SMALL, sentence_encoder="mean")), make()
    torch.testing.assert_close(mean.embed_sentences(one), mean.embed_sentences(other))
    assert (gru.embed_sentences(one) - gru.embed_sentences(other)).abs().max() > 1e-4


def test_last_pooling_equals_plain_gru() -> None:
    model = make()
    words = torch.tensor([[2, 3, 0]])  # END closes the sentence
    _, state = model.recurrence(model.word_vectors(words))  # type: ignore[misc]
    expected = torch.nn.functional.normalize(model.sentence_projection(state[0]), dim=1)
    torch.testing.assert_close(model.embed_sentences(words[:, :2]), expected)


def test_features_are_standardized_and_normalized() -> None:
    model = make()
    features = torch.randn(3, 7) * torch.arange(1, 8) + 5
    mean, std = features.mean(0), features.std(0)
    model.standardization.set_statistics(mean, std)
    standard = (features - mean) / std
    standard = standard / standard.norm(dim=1, keepdim=True) * 7**0.5
    expected = torch.nn.functional.normalize(model.image_projection(standard), dim=1)
    torch.testing.assert_close(model.embed_images(features), expected)


def test_constant_feature_gives_finite_embedding() -> None:
    model = make()
    model.standardization.set_statistics(torch.zeros(7), torch.zeros(7))
    assert model.embed_images(torch.ones(2, 7)).isfinite().all()


@pytest.mark.parametrize("values", [{"joint_embedding_size": 0}, {"dropout": 1.0}, {"feature_dropout": -0.1}])
def test_ranker_config_rejects_impossible_values(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"RankerConfig: {next(iter(values))}: "):
        RankerConfig(**values)


def test_save_and_load_round_trip(ranker: LoadedRanker, tmp_path: Path) -> None:
    again = load_ranker(tmp_path)
    assert again.fingerprint == ranker.fingerprint
    features = np.random.default_rng(0).normal(size=(300, 7)).astype(np.float32)
    vectors = ranker.encode_images(features)
    assert (vectors.dtype, vectors.shape) == (np.float32, (300, ranker.size))
    np.testing.assert_array_equal(vectors, again.encode_images(features))
    np.testing.assert_allclose(ranker.encode_images(features[:3]), vectors[:3], atol=1e-6)


def test_encode_sentences_keeps_order(ranker: LoadedRanker) -> None:
    sentences = ["A cat sleeps.", "", "dog", "a dog runs a dog runs", "zebra"]
    vectors = ranker.encode_sentences(sentences)
    assert (vectors.dtype, vectors.shape) == (np.float32, (5, 5))
    for sentence, vector in zip(sentences, vectors, strict=True):
        np.testing.assert_allclose(ranker.encode_sentences([sentence])[0], vector, atol=1e-6)
    assert ranker.encode_sentences([]).shape == (0, 5)


def test_features_of_another_shape_or_encoder_are_rejected(ranker: LoadedRanker) -> None:
    with pytest.raises(CheckpointError, match=r"of shape \[images, 7\], or \[images, positions, 7\], got \[2, 6\]"):
        ranker.encode_images(np.zeros((2, 6), np.float32))
    ranker.require_encoder({"model": "vgg16", "shape": (7,)})
    with pytest.raises(CheckpointError, match=r"a different encoder than the ranker's \(model: expected 'vgg16', got"):
        ranker.require_encoder({"model": "resnet50", "shape": [7]})


def test_load_captioner_rejects_ranker(ranker: LoadedRanker, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="expected a checkpoint of kind captioner, got ranker"):
        load_captioner(tmp_path)


def test_save_rejects_vocabulary_of_another_size(tmp_path: Path) -> None:
    vocabulary = Vocabulary.from_captions(["a dog"], min_count=1)
    with pytest.raises(CheckpointError, match="expected a vocabulary of 9 tokens, got one of 4"):
        save_ranker(tmp_path, make(), vocabulary, ENCODER, provenance={}, training={})
