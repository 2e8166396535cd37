"""Rankers as they are kept, and what searchers need of them: plain sentences and features in, unit vectors out."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from captionlib.config import build_config, to_dict
from captionlib.data.batches.captions import pool_map
from captionlib.data.text.vocabulary import UNKNOWN, Vocabulary
from captionlib.errors import CheckpointError
from captionlib.models.captioners.captioner import pad_sentences
from captionlib.models.checkpoints.captioners import require_same_encoder
from captionlib.models.checkpoints.folder import read_checkpoint, rebuilding, write_checkpoint
from captionlib.models.devices import resolve_device
from captionlib.models.rankers.ranker import Ranker, RankerConfig
from captionlib.storage.folders import Folder

__all__ = ["LoadedRanker", "load_ranker", "save_ranker"]

RANKER = "ranker"

_BATCH = 256


@dataclass(frozen=True)
class LoadedRanker:
    """A ranker that is ready to embed, with what belongs to it.

    Attributes:
        model: the ranker, in evaluation mode.
        vocabulary: its words.
        config: its shape.
        encoder: the description of the encoder whose features it was trained on.
        provenance: where it comes from.
        training: how its training went.
        fingerprint: of the checkpoint; see `Checkpoint`.
    """

    model: Ranker
    vocabulary: Vocabulary
    config: RankerConfig
    encoder: Mapping[str, Any]
    provenance: Mapping[str, Any]
    training: Mapping[str, Any]
    fingerprint: str

    @property
    def size(self) -> int:
        """Numbers in a vector of the joint space."""
        return self.config.joint_embedding_size

    @property
    def encoder_weights(self) -> None:
        """A ranker brings no weights of its encoder."""

    def require_encoder(self, description: Mapping[str, Any]) -> None:
        """Checks that features come from the encoder that this ranker was trained on.

        Args:
            description: of the encoder, as a features dataset carries it.

        Raises:
            CheckpointError: it is another one; says in which fields.
        """
        require_same_encoder(RANKER, self.encoder, description)

    def knows(self, sentence: str) -> bool:
        """Whether any of the words is in the vocabulary."""
        return any(word != UNKNOWN for word in self.vocabulary.encode(sentence))

    @torch.inference_mode()
    def encode_sentences(self, sentences: Sequence[str]) -> npt.NDArray[np.float32]:
        """Unit vectors of sentences, `[sentences, size]`; words that it does not know count as UNKNOWN."""
        ids = [self.vocabulary.encode(sentence) for sentence in sentences]
        order = np.argsort([len(row) for row in ids], kind="stable")  # batches of like length have little padding
        vectors = np.empty((len(ids), self.size), np.float32)
        for begin in range(0, len(ids), _BATCH):
            rows = order[begin : begin + _BATCH]
            padded = pad_sentences([ids[row] for row in rows]).to(self.model.feature_mean.device)
            vectors[rows] = self.model.embed_sentences(padded).float().cpu().numpy()
        return vectors

    @torch.inference_mode()
    def encode_features(self, features: npt.NDArray[np.floating]) -> npt.NDArray[np.float32]:
        """Unit vectors of images, `[images, size]`.

        Args:
            features: `[images, feature_size]` or `[images, positions, feature_size]`, as the encoder gave them.

        Raises:
            CheckpointError: they are of another shape.
        """
        size = self.model.feature_size
        if features.ndim not in (2, 3) or features.shape[-1] != size:
            raise CheckpointError(
                f"expected features of shape [images, {size}], or [images, positions, {size}], "
                f"got {list(features.shape)}"
            )
        features = pool_map(features)
        vectors = np.empty((len(features), self.size), np.float32)
        for begin in range(0, len(features), _BATCH):
            some = torch.from_numpy(features[begin : begin + _BATCH].astype(np.float32))
            some = some.to(self.model.feature_mean.device)
            vectors[begin : begin + _BATCH] = self.model.embed_images(some).float().cpu().numpy()
        return vectors


def save_ranker(
    folder: str | os.PathLike[str] | Folder,
    model: Ranker,
    vocabulary: Vocabulary,
    encoder: Mapping[str, Any],
    *,
    provenance: Mapping[str, Any],
    training: Mapping[str, Any],
) -> str:
    """Saves a ranker, in place of one that is there.

    Args:
        folder: where to.
        model: the ranker, on any device.
        vocabulary: its words.
        encoder: the description of the encoder, as the features dataset that it was trained on carries it.
        provenance: where it comes from: fingerprints of data, versions, a date; plain values.
        training: how its training went: configuration, scores; plain values.

    Returns:
        The fingerprint.

    Raises:
        CheckpointError: the vocabulary is not the model's.
    """
    if len(vocabulary) != model.vocabulary_size:
        raise CheckpointError(f"expected a vocabulary of {model.vocabulary_size} words, got one of {len(vocabulary)}")
    identity = {
        "architecture": {**to_dict(model.config), "feature_size": model.feature_size},
        "encoder": encoder,
        "vocabulary": vocabulary.to_dict(),
    }
    return write_checkpoint(folder, RANKER, model.state_dict(), identity, provenance, training)


def load_ranker(folder: str | os.PathLike[str] | Folder, device: str = "cpu") -> LoadedRanker:
    """Loads a ranker.

    Raises:
        CheckpointError: there is none, it is damaged, or it is something else.
        ConfigError: no such device here.
    """
    target = resolve_device(device)
    checkpoint = read_checkpoint(folder, RANKER)
    with rebuilding(folder):
        architecture = dict(checkpoint.identity["architecture"])
        feature_size = int(architecture.pop("feature_size"))
        config = build_config(RankerConfig, architecture, origin="architecture")
        vocabulary = Vocabulary.from_dict(checkpoint.identity["vocabulary"])
        model = Ranker(config, feature_size, len(vocabulary))
        model.load_state_dict(checkpoint.tensors)
        encoder = dict(checkpoint.identity["encoder"])
    return LoadedRanker(
        model=model.to(target).eval(),
        vocabulary=vocabulary,
        config=config,
        encoder=encoder,
        provenance=checkpoint.provenance,
        training=checkpoint.training,
        fingerprint=checkpoint.fingerprint,
    )
