"""The language model: a captioner that knows no image. How it is kept, and how it writes."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch

from captionlib.config import build_config, to_dict
from captionlib.data.text.corpora import TextLayout
from captionlib.data.text.vocabulary import UNKNOWN, Vocabulary
from captionlib.errors import CheckpointError, ConfigError
from captionlib.models.captioners.captioner import Captioner, CaptionerConfig
from captionlib.models.checkpoints.folder import read_checkpoint, rebuilding, write_checkpoint
from captionlib.models.decoding.decoder import Decoder, DecodingConfig
from captionlib.models.devices import resolve_device
from captionlib.storage.folders import Folder

__all__ = [
    "LanguageModelConfig",
    "LoadedLanguageModel",
    "TextSample",
    "build_language_model",
    "load_language_model",
    "sample_texts",
    "save_language_model",
]

LANGUAGE_MODEL = "language_model"
_TOGETHER = 100  # texts written at a time


@dataclass(frozen=True)
class LanguageModelConfig:
    """The shape of a language model; the fields are the captioner's, see `CaptionerConfig`.

    Attributes:
        cell: `lstm`, or `rnn`.
        layers: recurrent layers.
        hidden_size: numbers in a layer's state.
        embedding_size: numbers in a word's or character's vector.
        dropout: the share of inputs and outputs of each layer that is dropped in training.
        tie_embeddings: use the word vectors as the weights of the softmax.
    """

    cell: Literal["lstm", "rnn"] = "lstm"
    layers: int = 1
    hidden_size: int = 512
    embedding_size: int = 512
    dropout: float = 0.5
    tie_embeddings: bool = False

    def __post_init__(self) -> None:
        self.captioner()

    def captioner(self) -> CaptionerConfig:
        """The captioner that it is.

        Raises:
            ConfigError: there can be none of this shape.
        """
        return CaptionerConfig(**vars(self), image_input="none", standardize_features=False)


@dataclass(frozen=True)
class LoadedLanguageModel:
    """A language model that is ready to write, with what belongs to it.

    Attributes:
        model: the network, in evaluation mode.
        vocabulary: its words or characters.
        layout: whether it learned sentences, which end, or a running text.
        config: its shape.
        provenance: where it comes from.
        training: how its training went.
        fingerprint: of the checkpoint; see `Checkpoint`.
    """

    model: Captioner
    vocabulary: Vocabulary
    layout: TextLayout
    config: LanguageModelConfig
    provenance: Mapping[str, Any]
    training: Mapping[str, Any]
    fingerprint: str


@dataclass(frozen=True)
class TextSample:
    """What a language model has written.

    Attributes:
        text: the prefix and what follows.
        log_prob: ln p(text), of the prefix too.
        tokens: words or characters, and END where it was reached.
    """

    text: str
    log_prob: float
    tokens: int


def build_language_model(config: LanguageModelConfig, vocabulary_size: int) -> Captioner:
    """A language model with weights drawn from PyTorch's global generator."""
    return Captioner(config.captioner(), 0, vocabulary_size)


def save_language_model(
    folder: str | os.PathLike[str] | Folder,
    model: Captioner,
    config: LanguageModelConfig,
    vocabulary: Vocabulary,
    layout: TextLayout,
    *,
    provenance: Mapping[str, Any],
    training: Mapping[str, Any],
) -> str:
    """Saves a language model, in place of one that is there.

    Args:
        folder: where to.
        model: the network, on any device.
        config: its shape.
        vocabulary: its words or characters.
        layout: whether it learned sentences, which end, or a running text.
        provenance: where it comes from; plain values.
        training: how its training went; plain values.

    Returns:
        The fingerprint.

    Raises:
        CheckpointError: the vocabulary is not the model's.
    """
    if len(vocabulary) != model.vocabulary_size:
        raise CheckpointError(f"expected a vocabulary of {model.vocabulary_size} classes, got one of {len(vocabulary)}")
    identity = {"architecture": to_dict(config), "layout": layout, "vocabulary": vocabulary.to_dict()}
    return write_checkpoint(folder, LANGUAGE_MODEL, model.state_dict(), identity, provenance, training)


def load_language_model(folder: str | os.PathLike[str] | Folder, device: str = "cpu") -> LoadedLanguageModel:
    """Loads a language model.

    Raises:
        CheckpointError: there is none, it is damaged, or it is something else.
        ConfigError: no such device here.
    """
    target = resolve_device(device)
    checkpoint = read_checkpoint(folder, LANGUAGE_MODEL)
    with rebuilding(folder):
        config = build_config(LanguageModelConfig, checkpoint.identity["architecture"], origin="architecture")
        vocabulary = Vocabulary.from_dict(checkpoint.identity["vocabulary"])
        layout = checkpoint.identity["layout"]
        if layout not in get_args(TextLayout):
            raise ValueError(f"expected layout {' or '.join(get_args(TextLayout))}, got {layout!r}")
        model = build_language_model(config, len(vocabulary))
        model.load_state_dict(checkpoint.tensors)
    return LoadedLanguageModel(
        model=model.to(target).eval(),
        vocabulary=vocabulary,
        layout=layout,
        config=config,
        provenance=checkpoint.provenance,
        training=checkpoint.training,
        fingerprint=checkpoint.fingerprint,
    )


def sample_texts(
    language_model: LoadedLanguageModel, config: DecodingConfig, count: int, prefix: str = ""
) -> list[TextSample]:
    """Writes sentences, or pieces of running text.

    Args:
        language_model: what writes.
        config: how texts are drawn. `max_tokens` is what is written at most after the prefix; of a running text, which
            never ends, it is what is written.
        count: how many; the same seed writes the same ones, and more of them when more are asked for.
        prefix: what every text begins with.

    Raises:
        ConfigError: the model does not know a word or character of the prefix.
    """
    ids = _encode_prefix(language_model.vocabulary, prefix)
    longest = len(ids) + config.max_tokens
    shortest = longest if language_model.layout == "continuous" else config.min_words
    bounded = replace(config, max_tokens=longest, min_words=shortest, n_best=1)
    decoder = Decoder(language_model.model, bounded, vocabulary=language_model.vocabulary)
    samples: list[TextSample] = []
    for first in range(0, count, _TOGETHER):
        keys = [str(number) for number in range(first, min(first + _TOGETHER, count))]
        for (candidate,) in decoder.decode(torch.zeros(len(keys), 0), keys, ids):
            text = language_model.vocabulary.decode(candidate.words)
            samples.append(TextSample(text, candidate.log_prob, candidate.tokens))
    return samples


def _encode_prefix(vocabulary: Vocabulary, prefix: str) -> list[int]:
    ids = vocabulary.encode(prefix)
    if UNKNOWN in ids:
        unknown = [part for part in vocabulary.tokenize(prefix) if vocabulary.encode_tokens([part]) == [UNKNOWN]]
        raise ConfigError(
            f"prefix: expected {vocabulary.level} that the model has learned, got {', '.join(map(repr, unknown))}; "
            "begin with others"
        )
    return ids
