"""The ranker: images and sentences as unit vectors of one space, where what belongs together lies together.

After Kiros et al. 2014 (arXiv 1411.2539) and Faghri et al. 2018 (VSE++, arXiv 1707.05612):

    v = W_i dropout(standardised features) + b        the image
    s = W_s pool(h_1 .. h_T) + c                      the sentence: states of an LSTM or GRU, or the word vectors
    score(image, sentence) = cos(v, s)

so that an image is embedded once, a sentence is embedded once, and ranking is an inner product.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from captionlib.data.text.vocabulary import END, PAD, UNKNOWN
from captionlib.errors import ConfigError
from captionlib.models.standardization import Standardization

__all__ = ["Ranker", "RankerConfig"]

_WORD_RANGE = 0.1
_FIRST_TEMPERATURE = 0.07  # of Wu et al. 2018 (arXiv 1805.01978), which CLIP starts from too


@dataclass(frozen=True)
class RankerConfig:
    """The shape of a ranker.

    Attributes:
        sentence_encoder: `lstm`, `gru`, or `mean`: the mean of the word vectors, whatever their order.
        bidirectional: also read the sentence backwards; both readings are averaged.
        layers: recurrent layers, one upon the other.
        hidden_size: numbers in a layer's state.
        embedding_size: numbers in a word vector.
        joint_embedding_size: numbers in the vector of an image or a sentence.
        pooling: which states stand for a sentence: the `last`, the `mean` of all, or the `max` of each number.
        feature_dropout: the share of an image's features that is dropped in training.
        word_dropout: the share of words that become UNKNOWN in training.
        dropout: the share of the word vectors' and the states' numbers that is dropped in training.
        standardize_features: give each feature mean 0 and deviation 1 over the training images.
        normalize_features: bring each image's features to the length of the square root of their number.
    """

    sentence_encoder: Literal["lstm", "gru", "mean"] = "gru"
    bidirectional: bool = False
    layers: int = 1
    hidden_size: int = 512
    embedding_size: int = 300
    joint_embedding_size: int = 512
    pooling: Literal["last", "mean", "max"] = "max"
    feature_dropout: float = 0.2
    word_dropout: float = 0.0
    dropout: float = 0.2
    standardize_features: bool = True
    normalize_features: bool = True

    def __post_init__(self) -> None:
        for name in ("layers", "hidden_size", "embedding_size", "joint_embedding_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"ranker: {name} must be at least 1, got {getattr(self, name)}")
        for name in ("feature_dropout", "word_dropout", "dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"ranker: {name} must be at least 0 and below 1, got {getattr(self, name)}")


class Ranker(nn.Module):
    """Features and sentences to unit vectors. `LoadedRanker` in ranker_checkpoints.py takes plain sentences.

    Weights are drawn from PyTorch's global generator.

    Args:
        config: its shape.
        feature_size: numbers in the feature vector of an image.
        vocabulary_size: `len(vocabulary)`.
    """

    def __init__(self, config: RankerConfig, feature_size: int, vocabulary_size: int) -> None:
        super().__init__()
        self.config = config
        self.feature_size = feature_size
        self.vocabulary_size = vocabulary_size
        self.standardization = Standardization(feature_size)
        self.image_projection = nn.Linear(feature_size, config.joint_embedding_size)
        self.word_vectors = nn.Embedding(vocabulary_size, config.embedding_size)
        self.recurrence = _make_recurrence(config)
        state_size = config.embedding_size if self.recurrence is None else config.hidden_size
        self.sentence_projection = nn.Linear(state_size, config.joint_embedding_size)
        self.dropout = nn.Dropout(config.dropout)
        self.feature_dropout = nn.Dropout(config.feature_dropout)
        # Learned where the loss is a softmax; kept as a logarithm, so that it stays above 0.
        self.log_temperature = nn.Parameter(torch.tensor(_FIRST_TEMPERATURE).log())
        nn.init.uniform_(self.word_vectors.weight, -_WORD_RANGE, _WORD_RANGE)
        for projection in (self.image_projection, self.sentence_projection):
            nn.init.xavier_uniform_(projection.weight)
            nn.init.zeros_(projection.bias)

    def embed_images(self, features: Tensor) -> Tensor:
        """Unit vectors of images.

        Args:
            features: `[images, feature_size]`, as the encoder gave them.

        Returns:
            `[images, joint_embedding_size]`.
        """
        if self.config.standardize_features:
            features = self.standardization(features)
        if self.config.normalize_features:
            features = F.normalize(features, dim=1) * self.feature_size**0.5
        return F.normalize(self.image_projection(self.feature_dropout(features)), dim=1)

    def embed_sentences(self, sentences: Tensor) -> Tensor:
        """Unit vectors of sentences; how far they are padded changes nothing.

        Args:
            sentences: `[sentences, ticks] int64`, word ids without START and END, then `PAD`; may be empty.

        Returns:
            `[sentences, joint_embedding_size]`.
        """
        words, lengths = _close(sentences)
        if self.training and self.config.word_dropout:
            dropped = torch.rand(words.shape, device=words.device) < self.config.word_dropout
            words = words.masked_fill(dropped & (words > UNKNOWN), UNKNOWN)
        inputs = self.dropout(self.word_vectors(words.clamp(min=0)))  # [sentences, ticks + 1, embedding_size]
        if self.recurrence is None:
            pooled = _pool(inputs, lengths, "mean")
        else:
            pooled = self.dropout(self._recur(self.recurrence, inputs, lengths))
        return F.normalize(self.sentence_projection(pooled), dim=1)

    def _recur(self, recurrence: nn.RNNBase, inputs: Tensor, lengths: Tensor) -> Tensor:
        """`[sentences, ticks, embedding_size]` to what stands for each sentence, `[sentences, hidden_size]`."""
        packed = pack_padded_sequence(inputs, lengths.cpu(), batch_first=True, enforce_sorted=False)
        outputs, state = recurrence(packed)
        if self.config.pooling == "last":
            final = state[0] if self.config.sentence_encoder == "lstm" else state
            directions: Tensor = final[-2:] if self.config.bidirectional else final[-1:]
            return directions.mean(0)
        padded, _ = pad_packed_sequence(outputs, batch_first=True)
        if self.config.bidirectional:
            padded = (padded[..., : self.config.hidden_size] + padded[..., self.config.hidden_size :]) / 2
        return _pool(padded, lengths, self.config.pooling)


def _make_recurrence(config: RankerConfig) -> nn.RNNBase | None:
    if config.sentence_encoder == "mean":
        return None
    cell = nn.LSTM if config.sentence_encoder == "lstm" else nn.GRU
    return cell(
        config.embedding_size,
        config.hidden_size,
        config.layers,
        batch_first=True,
        bidirectional=config.bidirectional,
        dropout=config.dropout if config.layers > 1 else 0.0,
    )


def _close(sentences: Tensor) -> tuple[Tensor, Tensor]:
    """Puts END behind each sentence; an empty one has END alone. Also gives the lengths with it, `[sentences]`."""
    lengths = (sentences != PAD).sum(1)
    closed = torch.cat([sentences, sentences.new_full((len(sentences), 1), PAD)], 1)
    return closed.scatter(1, lengths[:, None], END), lengths + 1


def _pool(states: Tensor, lengths: Tensor, how: str) -> Tensor:
    """`[sentences, ticks, size]` to `[sentences, size]`, over the first `lengths` ticks of each."""
    real = torch.arange(states.shape[1], device=states.device) < lengths.to(states.device)[:, None]
    if how == "max":
        return states.masked_fill(~real[..., None], float("-inf")).amax(1)
    return states.masked_fill(~real[..., None], 0).sum(1) / lengths.to(states)[:, None]
