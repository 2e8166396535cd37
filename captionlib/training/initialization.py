"""The weights that a captioner starts from: what the data says of features and words, and what others have learnt."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from captionlib.config import describe_differences, to_dict
from captionlib.data.batches.captions import feature_shape, mean_and_std, pool_map, sample_features
from captionlib.data.shards.dataset import ShardedDataset
from captionlib.data.text.vocabulary import Vocabulary
from captionlib.data.text.word_vectors import read_word_vectors
from captionlib.errors import ConfigError, DatasetError
from captionlib.models.captioners.captioner import Captioner, CaptionerConfig
from captionlib.models.checkpoints.checkpoint import LoadedCaptioner, load_captioner
from captionlib.models.encoders.top_layers import EncoderTop
from captionlib.storage.folders import Folder

__all__ = ["build_captioner", "open_start", "refuse_own_folder", "start_word_vectors"]

_COMPONENT_IMAGES = 4096  # that principal components are found from
_MAP_IMAGES = 256  # whose positions tell how the numbers of a map are spread
_TOGETHER = 100  # images that go through a encoder_top at a time


def build_captioner(
    config: CaptionerConfig,
    dataset: ShardedDataset,
    splits: Sequence[str],
    vocabulary: Vocabulary,
    weights: str | None = None,
) -> Captioner:
    """A captioner that knows how the features and the words of these splits are distributed.

    Args:
        config: its shape.
        dataset: `features/`, complete.
        splits: the rows to learn from.
        vocabulary: its words.
        weights: the encoder's weights file, where it has a encoder_top and the encoder had its weights from a file.

    Raises:
        DatasetError: it has attention, and the features are no maps.
        CheckpointError: the weights are not the encoder's.
        ConfigError: the encoder_top has no place behind the encoder, or no weights.
    """
    shape = feature_shape(dataset)
    if config.attention_size and len(shape) == 1:
        raise DatasetError(
            f"{dataset.folder.uri}: attention looks at maps [positions, channels], got one vector an image; "
            "extract with pooling none at a node that is a map, such as features.29 of vgg16, or set "
            "captioner.attention_size to 0"
        )
    encoder_top = None
    if config.encoder_top is not None:
        encoder_top = EncoderTop(dataset.config["encoder"], config.encoder_top)
        encoder_top.load_weights(weights)
    model = Captioner(config, (shape if encoder_top is None else encoder_top.shape)[-1], len(vocabulary), encoder_top)
    _take_statistics(model, dataset, splits)
    model.initialize_bias(torch.from_numpy(vocabulary.log_frequencies()))
    return model


@torch.no_grad()
def _take_statistics(model: Captioner, dataset: ShardedDataset, splits: Sequence[str]) -> None:
    """Tells a captioner how the features of these splits are distributed, as its encoder_top gives them where it has one."""

    def seen(rows: npt.NDArray[np.floating]) -> npt.NDArray[np.float32]:
        features = torch.from_numpy(rows.astype(np.float32))
        if model.encoder_top is not None:
            features = torch.cat([model.encoder_top(part) for part in torch.split(features, _TOGETHER)])
        return features.numpy()

    def vectors(rows: npt.NDArray[np.floating]) -> npt.NDArray[np.float32]:
        return model.power_normalize(torch.from_numpy(pool_map(seen(rows)))).numpy()

    if model.attention is not None:
        maps = torch.from_numpy(seen(sample_features(dataset, splits, _MAP_IMAGES)))
        positions = model.power_normalize(maps).flatten(0, 1)
        model.attention.standardization.set_statistics(positions.mean(0), positions.std(0))
    if model.config.principal_components:
        model.set_principal_components(torch.from_numpy(vectors(sample_features(dataset, splits, _COMPONENT_IMAGES))))
    elif model.config.standardize_features:
        model.standardization.set_statistics(*map(torch.from_numpy, mean_and_std(dataset, splits, vectors)))


def refuse_own_folder(init_from: str | None, output: Folder) -> None:
    """Makes sure that a run does not start from the checkpoint that it replaces.

    Raises:
        ConfigError: it would.
    """
    if init_from is not None and Folder(init_from).path("") == output.path(""):
        raise ConfigError(f"init_from: {output.uri} is the run's own folder; give another folder to the run")


def open_start(folder: str, config: CaptionerConfig, dataset: ShardedDataset) -> LoadedCaptioner:
    """The captioner whose weights another training starts from; its shape and its words are kept.

    Args:
        folder: its checkpoint.
        config: the shape that is configured: what is not as by default has to be as in the checkpoint.
        dataset: `features/`, of its encoder.

    Raises:
        CheckpointError: there is none, or the features are of another encoder.
        ConfigError: another shape is configured.
    """
    start = load_captioner(folder)
    start.require_encoder(dataset.config["encoder"])
    configured, default = to_dict(config), to_dict(CaptionerConfig())
    given = {name: value for name, value in configured.items() if value != default[name]}
    if lines := describe_differences({name: to_dict(start.config)[name] for name in given}, given):
        raise ConfigError(
            f"captioner: expected the shape of {folder}, from which training starts, got another "
            f"({'; '.join(lines)}); leave these values out, or train without init_from"
        )
    return start


@torch.no_grad()
def start_word_vectors(model: Captioner, vocabulary: Vocabulary, uri: str) -> dict[str, Any]:
    """Starts the word vectors that a file has where it has them; the others stay as drawn.

    Args:
        model: the captioner.
        vocabulary: its words.
        uri: a file of word2vec, GloVe or fastText.

    Returns:
        How it went, for people: the file, how many words were found, how many were not, and the most frequent of those.

    Raises:
        ConfigError: the file cannot be read, or its vectors are of another size than the model's.
        DatasetError: it is damaged, or has none of the words.
    """
    read = read_word_vectors(uri, vocabulary.words, model.config.embedding_size)
    for word, vector in read.vectors.items():
        (number,) = vocabulary.encode_tokens([word])
        model.word_vectors.weight[number] = torch.from_numpy(vector)
    return {"file": uri, "found": len(read.vectors), "missing": len(read.missing), "such as": list(read.missing[:5])}
