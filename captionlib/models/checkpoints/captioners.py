"""Captioners as they are kept: with their vocabulary and the encoder whose features they were trained on."""

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from captionlib.config import build_config, to_dict
from captionlib.data.text.vocabulary import Vocabulary
from captionlib.errors import CheckpointError
from captionlib.models.captioners.captioner import Captioner, CaptionerConfig
from captionlib.models.checkpoints.folder import find_encoder, read_checkpoint, rebuilding, write_checkpoint
from captionlib.models.devices import resolve_device
from captionlib.models.encoders.top_layers import EncoderTop
from captionlib.storage.folders import Folder

__all__ = ["LoadedCaptioner", "load_captioner", "require_same_encoder", "save_captioner"]

CAPTIONER = "captioner"


@dataclass(frozen=True)
class LoadedCaptioner:
    """A captioner that is ready to caption, with what belongs to it.

    Attributes:
        model: the captioner, in evaluation mode.
        vocabulary: its words.
        config: its shape.
        encoder: the description of the encoder whose features it was trained on.
        provenance: where it comes from.
        training: how its training went.
        fingerprint: of the checkpoint; see `Checkpoint`.
        encoder_weights: the weights file of that encoder, where it was tuned with the captioner; None where it was not.
    """

    model: Captioner
    vocabulary: Vocabulary
    config: CaptionerConfig
    encoder: Mapping[str, Any]
    provenance: Mapping[str, Any]
    training: Mapping[str, Any]
    fingerprint: str
    encoder_weights: str | None = None

    def require_encoder(self, description: Mapping[str, Any]) -> None:
        """Checks that features come from the encoder that this captioner was trained on.

        Args:
            description: of the encoder, as a features dataset carries it.

        Raises:
            CheckpointError: it is another one; says in which fields.
        """
        require_same_encoder(CAPTIONER, self.encoder, description)


def save_captioner(
    folder: str | os.PathLike[str] | Folder,
    model: Captioner,
    vocabulary: Vocabulary,
    encoder: Mapping[str, Any],
    *,
    provenance: Mapping[str, Any],
    training: Mapping[str, Any],
    encoder_file: bytes | None = None,
) -> str:
    """Saves a captioner, in place of one that is there.

    Args:
        folder: where to.
        model: the captioner, on any device.
        vocabulary: its words.
        encoder: the description of the encoder, as the features dataset that it was trained on carries it.
        provenance: where it comes from: fingerprints of data, versions, a date; plain values.
        training: how its training went: configuration, perplexities; plain values.
        encoder_file: the weights file of that encoder, where it was tuned with the captioner.

    Returns:
        The fingerprint.

    Raises:
        CheckpointError: the vocabulary is not the model's.
    """
    if len(vocabulary) != model.vocabulary_size:
        raise CheckpointError(f"expected a vocabulary of {model.vocabulary_size} classes, got one of {len(vocabulary)}")
    identity = {
        "architecture": {**to_dict(model.config), "feature_size": model.feature_size},
        "encoder": encoder,
        "vocabulary": vocabulary.to_dict(),
    }
    return write_checkpoint(folder, CAPTIONER, model.state_dict(), identity, provenance, training, encoder_file)


def load_captioner(folder: str | os.PathLike[str] | Folder, device: str = "cpu") -> LoadedCaptioner:
    """Loads a captioner.

    Raises:
        CheckpointError: there is none, it is damaged, or it is something else.
        ConfigError: no such device here.
    """
    target = resolve_device(device)
    checkpoint = read_checkpoint(folder, CAPTIONER)
    with rebuilding(folder):
        architecture = dict(checkpoint.identity["architecture"])
        feature_size = int(architecture.pop("feature_size"))
        config = build_config(CaptionerConfig, architecture, origin="architecture")
        vocabulary = Vocabulary.from_dict(checkpoint.identity["vocabulary"])
        encoder = dict(checkpoint.identity["encoder"])
        encoder_top = None if config.encoder_top is None else EncoderTop(encoder, config.encoder_top)
        model = Captioner(config, feature_size, len(vocabulary), encoder_top)
        model.load_state_dict(checkpoint.tensors)
    return LoadedCaptioner(
        model=model.to(target).eval(),
        vocabulary=vocabulary,
        config=config,
        encoder=encoder,
        provenance=checkpoint.provenance,
        training=checkpoint.training,
        fingerprint=checkpoint.fingerprint,
        encoder_weights=find_encoder(folder, encoder),
    )


def require_same_encoder(kind: str, expected: Mapping[str, Any], got: Mapping[str, Any]) -> None:
    """Checks that features come from the encoder that a model was trained on.

    Args:
        kind: what the model is, such as `captioner`.
        expected: the description of its encoder.
        got: the description of the features' encoder.

    Raises:
        CheckpointError: it is another one; says in which fields.
    """
    differences = list(_differences(_plain(expected), _plain(got)))
    if differences:
        raise CheckpointError(
            f"these features are of another encoder than the {kind}'s ({'; '.join(differences)}); "
            f"extract them with the {kind}'s encoder, or train a {kind} on them"
        )


def _plain(values: Mapping[str, Any]) -> Any:
    """Values as JSON gives them back, so that a tuple equals the list that was saved of it."""
    return json.loads(json.dumps(values))


def _differences(expected: Any, got: Any, name: str = "") -> Iterator[str]:
    """The fields in which two nested mappings differ, a text each."""
    if isinstance(expected, dict) and isinstance(got, dict):
        for key in {**expected, **got}:
            yield from _differences(expected.get(key), got.get(key), f"{name}.{key}".lstrip("."))
    elif expected != got:
        yield f"{name}: expected {expected!r}, got {got!r}"
