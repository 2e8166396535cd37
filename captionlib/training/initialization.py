"""Initializes captioners from statistics of the training data, pre-trained word vectors, or an existing checkpoint."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from captionlib.config import describe_differences, to_dict
from captionlib.data.batches.captions import (
    average_positions,
    compute_mean_and_std,
    count_training_data,
    get_feature_shape,
    sample_features,
)
from captionlib.data.shards.dataset import ShardedDataset
from captionlib.data.text.vocabulary import Vocabulary
from captionlib.data.text.word_vectors import read_word_vectors
from captionlib.errors import ConfigError, DatasetError
from captionlib.models.captioners.captioner import CaptionerConfig, CaptionerNetwork
from captionlib.models.checkpoints.checkpoint import LoadedCaptioner, load_captioner
from captionlib.models.checkpoints.encoder_file import ENCODER_ADDRESS
from captionlib.models.encoders.top_layers import EncoderTop
from captionlib.storage.folders import Folder

__all__ = [
    "build_captioner",
    "describe_training_data",
    "initialize_word_vectors",
    "load_initial_captioner",
    "require_other_folder",
]

_COMPONENT_IMAGES = 4096  # images sampled for the principal components
_MAP_IMAGES = 256  # images sampled for the statistics of feature maps
_TOP_BATCH_SIZE = 100  # images per pass through the encoder's top layers


def build_captioner(
    config: CaptionerConfig,
    dataset: ShardedDataset,
    splits: Sequence[str],
    vocabulary: Vocabulary,
    weights: str | None = None,
) -> CaptionerNetwork:
    """Builds a captioner, initialized with statistics of the features and words of the training splits.

    `weights` is the encoder's weights file, which also contains those of `encoder_top`, the encoder layers that are
    fine-tuned with the captioner.

    Raises:
        DatasetError: the captioner has attention, but the features are one vector per image.
        CheckpointError: the weights belong to a different encoder.
        ConfigError: `encoder_top` does not follow the node of the features, or its weights are missing.
    """
    shape = get_feature_shape(dataset)
    if config.attention_size and len(shape) == 1:
        raise DatasetError(
            f"{dataset.folder.uri}: attention needs feature maps [positions, channels], got one vector per image; "
            "extract features with pooling none at a node with spatial output, such as features.29 of vgg16, or set "
            "captioner.attention_size to 0"
        )
    encoder_top = None
    if config.encoder_top is not None:
        encoder_top = EncoderTop(dataset.config["encoder"], config.encoder_top)
        encoder_top.load_weights(weights)
    model = CaptionerNetwork(
        config, (shape if encoder_top is None else encoder_top.shape)[-1], len(vocabulary), encoder_top
    )
    _set_feature_statistics(model, dataset, splits)
    model.initialize_bias(torch.from_numpy(vocabulary.log_frequencies()))
    return model


def describe_training_data(
    dataset: ShardedDataset, train_splits: Sequence[str], validation_splits: Sequence[str]
) -> dict[str, Any]:
    """Returns a record of the training data of a model that is trained on a features dataset or a manifest."""
    provenance = {
        dataset.kind: dataset.compute_content_checksum(),
        "data": count_training_data(dataset, train_splits, validation_splits),
    }
    return {**provenance, ENCODER_ADDRESS: dataset.encoder_weights} if dataset.encoder_weights else provenance


@torch.no_grad()
def _set_feature_statistics(model: CaptionerNetwork, dataset: ShardedDataset, splits: Sequence[str]) -> None:
    """Computes the standardization or the principal components of the features, or of the output of `encoder_top`."""

    def compute_features(rows: npt.NDArray[np.floating]) -> npt.NDArray[np.float32]:
        features = torch.from_numpy(rows.astype(np.float32))
        if model.encoder_top is not None:
            features = torch.cat([model.encoder_top(chunk) for chunk in torch.split(features, _TOP_BATCH_SIZE)])
        return features.numpy()

    def compute_vectors(rows: npt.NDArray[np.floating]) -> npt.NDArray[np.float32]:
        return model.power_normalize(torch.from_numpy(average_positions(compute_features(rows)))).numpy()

    if model.attention_module is not None:
        sample = torch.from_numpy(compute_features(sample_features(dataset, splits, _MAP_IMAGES)))
        annotation_vectors = model.power_normalize(sample).view(-1, model.feature_size)
        model.attention_module.standardization.set_statistics(annotation_vectors.mean(0), annotation_vectors.std(0))
    if model.config.principal_components:
        vectors = compute_vectors(sample_features(dataset, splits, _COMPONENT_IMAGES))
        model.set_principal_components(torch.from_numpy(vectors))
    elif model.config.standardize_features:
        statistics = compute_mean_and_std(dataset, splits, compute_vectors)
        model.standardization.set_statistics(*map(torch.from_numpy, statistics))


def require_other_folder(init_from: str | None, output: Folder) -> None:
    """Checks that a run does not overwrite the checkpoint that it starts from.

    Raises:
        ConfigError: `init_from` is the run's folder.
    """
    if init_from is not None and Folder(init_from).path("") == output.path(""):
        raise ConfigError(f"init_from: {output.uri} is also the output of this run; choose another output folder")


def load_initial_captioner(folder: str, config: CaptionerConfig, dataset: ShardedDataset) -> LoadedCaptioner:
    """Loads the captioner of a checkpoint. Values of `config` that differ from the defaults must match it.

    Raises:
        CheckpointError: the folder is not a checkpoint, or its captioner uses a different encoder.
        ConfigError: the configured architecture differs from the checkpoint's.
    """
    initial = load_captioner(folder)
    initial.require_encoder(dataset.config["encoder"])
    configured, defaults = to_dict(config), to_dict(CaptionerConfig())
    changed = {name: value for name, value in configured.items() if value != defaults[name]}
    if lines := describe_differences({name: to_dict(initial.config)[name] for name in changed}, changed):
        raise ConfigError(
            f"captioner: expected the architecture of init_from, {folder}, got different values ({'; '.join(lines)}); "
            "leave these values out, or train without init_from"
        )
    return initial


@torch.no_grad()
def initialize_word_vectors(model: CaptionerNetwork, vocabulary: Vocabulary, uri: str) -> dict[str, Any]:
    """Initializes word embeddings from a word2vec, GloVe or fastText file. Missing words keep random embeddings.

    Returns:
        `file`, the numbers of `found` and `missing` words, and `examples`: the five most frequent missing words.

    Raises:
        ConfigError: the file is unreadable, or its vectors do not have the size of the model's embeddings.
        DatasetError: the file is malformed, or contains no word of the vocabulary.
    """
    word_vectors = read_word_vectors(uri, vocabulary.words, model.config.embedding_size)
    for word, vector in word_vectors.vectors.items():
        (token_id,) = vocabulary.encode_tokens([word])
        model.word_vectors.weight[token_id] = torch.from_numpy(vector)
    missing = word_vectors.missing
    return {"file": uri, "found": len(word_vectors.vectors), "missing": len(missing), "examples": list(missing[:5])}
