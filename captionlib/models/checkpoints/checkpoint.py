"""Saves and loads trained captioners, language models and rankers (dual encoders for image-text retrieval)."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from captionlib.config import build_config, describe_differences, to_dict
from captionlib.data.batches.captions import average_positions
from captionlib.data.text.corpora import TextLayout
from captionlib.data.text.vocabulary import UNKNOWN, Vocabulary
from captionlib.errors import CheckpointError, ConfigError
from captionlib.models.captioners.captioner import CaptionerConfig, CaptionerNetwork
from captionlib.models.captioners.language_model import LanguageModelConfig, build_language_model
from captionlib.models.captioners.packed_sequences import pad_sentences
from captionlib.models.checkpoints.encoder_file import LOCAL_WEIGHTS, find_encoder_file, missing_encoder_error
from captionlib.models.checkpoints.folder import (
    FolderLike,
    damaged_error,
    open_folder,
    read_checkpoint,
    write_checkpoint,
)
from captionlib.models.devices import resolve_device
from captionlib.models.encoders.encoder import EncoderConfig
from captionlib.models.encoders.top_layers import EncoderTop
from captionlib.models.families.model import Arrays
from captionlib.models.rankers.ranker import RankerConfig, RankerNetwork
from captionlib.storage.folders import Folder

__all__ = [
    "LoadedCaptioner",
    "LoadedLanguageModel",
    "LoadedModel",
    "LoadedRanker",
    "load_captioner",
    "load_language_model",
    "load_ranker",
    "save_captioner",
    "save_language_model",
    "save_ranker",
]

_CAPTIONER = "captioner"
_RANKER = "ranker"
_LANGUAGE_MODEL = "language_model"

_BATCH_SIZE = 256  # for ranker inference

Model = TypeVar("Model", bound=nn.Module)
Config = TypeVar("Config")
Identity = Mapping[str, Any]
"""What determines a model's output, other than the weights; see `Checkpoint.identity`."""


@dataclass(frozen=True)
class LoadedModel(Generic[Model, Config]):
    """A trained model and its metadata.

    Attributes:
        folder: the folder of the checkpoint.
        kind: `captioner`, `ranker` or `language_model`.
        model: the network, in evaluation mode.
        vocabulary: the model's words, characters or subwords.
        config: the model's architecture.
        encoder: description of the encoder that computed the training features; empty for a language model.
        provenance: the data and the software versions that the model was trained with.
        training: the training configuration and history.
        fingerprint: hash of everything that determines the model's output.
    """

    folder: Folder
    kind: str
    model: Model
    vocabulary: Vocabulary
    config: Config
    encoder: Mapping[str, Any]
    provenance: Mapping[str, Any]
    training: Mapping[str, Any]
    fingerprint: str

    def find_input_transform(self, weights: str | None) -> EncoderConfig:
        """Returns the configuration of the encoder; see `ImageModel.find_input_transform`."""
        file = weights or find_encoder_file(self.folder, self.encoder, self.provenance)
        if file is None and self.encoder.get("weights") in LOCAL_WEIGHTS:
            raise missing_encoder_error(self.encoder, self.provenance)
        return EncoderConfig.from_description(self.encoder, file).resolve_paths()

    def to(self, device: torch.device) -> None:
        self.model.to(device)

    def require_encoder(self, description: Mapping[str, Any]) -> None:
        """Checks that `description` is that of the encoder of the training features; see `ImageModel`."""
        own, other = (json.loads(json.dumps(values)) for values in (self.encoder, description))  # tuples become lists
        if differences := describe_differences(own, other, ("expected", "got")):
            raise CheckpointError(
                f"these features come from a different encoder than the {self.kind}'s ({'; '.join(differences)}); "
                f"extract them with the {self.kind}'s encoder, or train a {self.kind} on them"
            )


LoadedCaptioner = LoadedModel[CaptionerNetwork, CaptionerConfig]


@dataclass(frozen=True)
class LoadedLanguageModel(LoadedModel[CaptionerNetwork, LanguageModelConfig]):
    """A trained language model.

    Attributes:
        layout: `sentences` if each sentence ends with END; `continuous` if the training text has no END.
    """

    layout: TextLayout


class LoadedRanker(LoadedModel[RankerNetwork, RankerConfig]):
    """A trained ranker; implements `RankingModel`."""

    sentence_template = None  # sentences are embedded as they are

    @property
    def size(self) -> int:
        return self.config.joint_embedding_size

    def has_known_word(self, sentence: str) -> bool:
        return any(word != UNKNOWN for word in self.vocabulary.encode(sentence))

    @torch.inference_mode()
    def encode_sentences(self, sentences: Sequence[str]) -> npt.NDArray[np.float32]:
        """Embeds sentences as unit vectors, `[sentences, size]`; words outside the vocabulary become UNKNOWN."""
        ids = [self.vocabulary.encode(sentence) for sentence in sentences]
        order = np.argsort([len(row) for row in ids], kind="stable")  # sentences of similar length need little padding
        embeddings = np.empty((len(ids), self.size), np.float32)
        for start in range(0, len(ids), _BATCH_SIZE):
            rows = order[start : start + _BATCH_SIZE]
            padded = pad_sentences([ids[row] for row in rows]).to(self._device)
            embeddings[rows] = self.model.embed_sentences(padded).float().cpu().numpy()
        return embeddings

    @torch.inference_mode()
    def encode_images(self, images: Arrays) -> npt.NDArray[np.float32]:
        """Embeds images as unit vectors, `[images, size]`, from features of the encoder.

        Raises:
            CheckpointError: the features have a different shape than those of the encoder.
        """
        features = np.asarray(images)
        size = self.model.feature_size
        if features.ndim not in (2, 3) or features.shape[-1] != size:
            raise CheckpointError(
                f"expected features of shape [images, {size}], or [images, positions, {size}], "
                f"got {list(features.shape)}"
            )
        features = average_positions(features)
        embeddings = np.empty((len(features), self.size), np.float32)
        for start in range(0, len(features), _BATCH_SIZE):
            batch = slice(start, start + _BATCH_SIZE)
            inputs = torch.from_numpy(features[batch].astype(np.float32)).to(self._device)
            embeddings[batch] = self.model.embed_images(inputs).float().cpu().numpy()
        return embeddings

    @property
    def _device(self) -> torch.device:
        return self.model.image_projection.weight.device


def save_captioner(
    folder: FolderLike,
    model: CaptionerNetwork,
    vocabulary: Vocabulary,
    encoder: Mapping[str, Any],
    *,
    provenance: Mapping[str, Any],
    training: Mapping[str, Any],
    encoder_weights: bytes | None = None,
) -> str:
    """Saves a captioner and returns its fingerprint. A checkpoint that is already in the folder is replaced.

    `encoder` is the description that the features dataset records. If the encoder was fine-tuned with the captioner,
    `encoder_weights` is the content of its weights file.

    Raises:
        CheckpointError: the vocabulary does not fit the model.
    """
    identity = {"encoder": encoder}
    return _save(folder, _CAPTIONER, model, model.config, vocabulary, identity, provenance, training, encoder_weights)


def load_captioner(folder: FolderLike, device: str = "cpu") -> LoadedCaptioner:
    """Loads a captioner.

    Example:
        >>> captioner = captionlib.load_captioner("captioner")
        >>> captioner.config.cell
        'lstm'

    Args:
        folder: the checkpoint's folder.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.

    Raises:
        CheckpointError: the checkpoint is missing, damaged or of a different kind.
        ConfigError: the device does not exist.
    """

    def build(config: CaptionerConfig, feature_size: int, vocabulary_size: int, identity: Identity) -> CaptionerNetwork:
        encoder_top = None if config.encoder_top is None else EncoderTop(identity["encoder"], config.encoder_top)
        return CaptionerNetwork(config, feature_size, vocabulary_size, encoder_top)

    return LoadedModel(**_load(folder, _CAPTIONER, device, CaptionerConfig, build))


def save_ranker(
    folder: FolderLike,
    model: RankerNetwork,
    vocabulary: Vocabulary,
    encoder: Mapping[str, Any],
    *,
    provenance: Mapping[str, Any],
    training: Mapping[str, Any],
) -> str:
    """Saves a ranker; see `save_captioner` for arguments, result and errors."""
    return _save(folder, _RANKER, model, model.config, vocabulary, {"encoder": encoder}, provenance, training)


def load_ranker(folder: FolderLike, device: str = "cpu") -> LoadedRanker:
    """Loads a ranker.

    Example:
        >>> ranker = captionlib.load_ranker("ranker")
        >>> ranker.encode_sentences(["a red ring", "a blue square"]).shape
        (2, 512)

    Args:
        folder: the checkpoint's folder.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.

    Raises:
        CheckpointError: the checkpoint is missing, damaged or of a different kind.
        ConfigError: the device does not exist.
    """

    def build(config: RankerConfig, feature_size: int, vocabulary_size: int, _identity: Identity) -> RankerNetwork:
        return RankerNetwork(config, feature_size, vocabulary_size)

    return LoadedRanker(**_load(folder, _RANKER, device, RankerConfig, build))


def save_language_model(
    folder: FolderLike,
    model: CaptionerNetwork,
    config: LanguageModelConfig,
    vocabulary: Vocabulary,
    layout: TextLayout,
    *,
    provenance: Mapping[str, Any],
    training: Mapping[str, Any],
) -> str:
    """Saves a language model; see `LoadedLanguageModel` for `layout`, and `save_captioner` for the rest."""
    return _save(folder, _LANGUAGE_MODEL, model, config, vocabulary, {"layout": layout}, provenance, training)


def load_language_model(folder: FolderLike, device: str = "cpu") -> LoadedLanguageModel:
    """Loads a language model; see `load_captioner` for arguments and errors."""

    def build(config: LanguageModelConfig, _size: int, vocabulary_size: int, identity: Identity) -> CaptionerNetwork:
        if identity["layout"] not in get_args(TextLayout):
            raise ValueError(f"expected layout {' or '.join(get_args(TextLayout))}, got {identity['layout']!r}")
        return build_language_model(config, vocabulary_size)

    return LoadedLanguageModel(**_load(folder, _LANGUAGE_MODEL, device, LanguageModelConfig, build, "layout"))


def _save(
    folder: FolderLike,
    kind: str,
    model: CaptionerNetwork | RankerNetwork,
    config: Any,
    vocabulary: Vocabulary,
    identity: Identity,
    provenance: Mapping[str, Any],
    training: Mapping[str, Any],
    encoder_weights: bytes | None = None,
) -> str:
    if len(vocabulary) != model.vocabulary_size:
        raise CheckpointError(f"expected a vocabulary of {model.vocabulary_size} tokens, got one of {len(vocabulary)}")
    architecture = {**to_dict(config), "feature_size": model.feature_size}
    identity = {"architecture": architecture, **identity, "vocabulary": vocabulary.to_dict()}
    return write_checkpoint(folder, kind, model.state_dict(), identity, provenance, training, encoder_weights)


def _load(
    folder: FolderLike,
    kind: str,
    device: str,
    config_type: type[Config],
    build: Callable[[Config, int, int, Identity], nn.Module],
    *identity_keys: str,
) -> dict[str, Any]:
    """Returns the arguments of `LoadedModel`, and the entries of `Checkpoint.identity` with the given keys.

    `build` creates the network from configuration, feature size, vocabulary size and `Checkpoint.identity`.
    """
    torch_device, source = resolve_device(device), open_folder(folder)
    checkpoint = read_checkpoint(source, kind)
    identity = checkpoint.identity
    try:
        with torch.random.fork_rng(devices=[]):  # initializing weights must not change the random state
            architecture = dict(identity["architecture"])
            feature_size = int(architecture.pop("feature_size"))
            config = build_config(config_type, architecture, origin="architecture")
            vocabulary = Vocabulary.from_dict(identity["vocabulary"])
            with torch.device("meta"):  # allocates no memory, whatever sizes the configuration contains
                _check_shapes(build(config, feature_size, len(vocabulary), identity), checkpoint.tensors)
            model = build(config, feature_size, len(vocabulary), identity)
            model.load_state_dict(checkpoint.tensors)
            encoder = dict(identity.get("encoder", {}))
            attributes = {name: identity[name] for name in identity_keys}
    except (ConfigError, KeyError, TypeError, ValueError, RuntimeError) as error:
        reason, _, _ = str(error).partition("\n")  # PyTorch's messages may end with a stack trace
        raise damaged_error(source, f"{type(error).__name__}: {reason}") from error
    return {
        "folder": source,
        "kind": kind,
        "model": model.to(torch_device).eval(),
        "vocabulary": vocabulary,
        "config": config,
        "encoder": encoder,
        "provenance": checkpoint.provenance,
        "training": checkpoint.training,
        "fingerprint": checkpoint.fingerprint,
        **attributes,
    }


def _check_shapes(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    expected = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    got = {name: list(tensor.shape) for name, tensor in tensors.items()}
    for name in sorted({**expected, **got}):
        if expected.get(name) != got.get(name):
            raise ValueError(f"{name}: expected shape {expected.get(name)}, got {got.get(name)}")
