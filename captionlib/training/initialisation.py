"""The weights that a captioner starts from: what the data says of features and words, and what others have learnt."""

from collections.abc import Sequence
from typing import Any

import torch

from captionlib.data.batches import feature_shape, mean_and_std, sample_features
from captionlib.data.datasets import open_dataset
from captionlib.data.shards import ShardedDataset
from captionlib.data.vocabulary import Vocabulary
from captionlib.data.word_vectors import read_word_vectors
from captionlib.errors import DatasetError
from captionlib.models.captioner import Captioner, CaptionerConfig
from captionlib.storage import Folder

__all__ = ["build_captioner", "open_vectors", "start_word_vectors"]

_SAMPLE_IMAGES = 4096  # that principal components are found from


def open_vectors(features: Folder) -> ShardedDataset:
    """A features dataset that is complete and has one vector an image.

    Raises:
        DatasetError: it is not, or has not.
    """
    dataset = open_dataset(features.uri, "features").require_complete()
    if len(feature_shape(dataset)) != 1:
        raise DatasetError(
            f"{dataset.folder.uri}: expected one vector an image, got a map of {feature_shape(dataset)}; "
            "extract with pooling mean or max"
        )
    return dataset


def build_captioner(
    config: CaptionerConfig, dataset: ShardedDataset, splits: Sequence[str], vocabulary: Vocabulary
) -> Captioner:
    """A captioner that knows how the features and the words of these splits are distributed.

    Args:
        config: its shape.
        dataset: `features/`, complete.
        splits: the rows to learn from.
        vocabulary: its words.
    """
    model = Captioner(config, feature_shape(dataset)[-1], len(vocabulary))
    if config.principal_components:
        model.set_components(torch.from_numpy(sample_features(dataset, splits, _SAMPLE_IMAGES)))
    elif config.standardise_features:
        model.set_standardisation(*map(torch.from_numpy, mean_and_std(dataset, splits)))
    model.initialise_bias(torch.from_numpy(vocabulary.log_frequencies()))
    return model


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
    read = read_word_vectors(uri, vocabulary.words, model.config.word_size)
    for word, vector in read.vectors.items():
        (number,) = vocabulary.encode_tokens([word])
        model.word_vectors.weight[number] = torch.from_numpy(vector)
    return {"file": uri, "found": len(read.vectors), "missing": len(read.missing), "such as": list(read.missing[:5])}
