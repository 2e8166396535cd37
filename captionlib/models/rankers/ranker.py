"""The ranker: a dual encoder that embeds images and sentences as unit vectors, close together if they match.

It follows Kiros et al. 2014 (arXiv 1411.2539) and Faghri et al. 2018 (VSE++, arXiv 1707.05612):

    v = Wi dropout(sqrt(size) f / |f|) + b            image; f: standardized features with `size` dimensions
    s = Ws pool(h_1 .. h_T) + c                       sentence; h_t: LSTM or GRU state, or word embedding
    score(image, sentence) = cos(v, s)

Each image and each sentence is embedded once; a score is the inner product of two embeddings.
"""

import math
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveInt
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from captionlib.config import configclass
from captionlib.data.text.vocabulary import END, PAD
from captionlib.models.layers import Dropout, Standardization, sample_normal_weights

__all__ = ["RankerConfig", "RankerNetwork"]

_WORD_EMBEDDING_RANGE = 0.1  # word embeddings are initialized from U(-0.1, 0.1)
_INITIAL_TEMPERATURE = 0.07  # as in Wu et al. 2018 (arXiv 1805.01978) and CLIP

_Probability = Annotated[float, Field(ge=0, lt=1)]


@configclass
class RankerConfig:
    """The architecture of a ranker.

    Attributes:
        sentence_encoder: `lstm`, `gru`, or `mean` (mean of the word embeddings, without recurrent layers).
        layers: number of recurrent layers.
        hidden_size: dimensions of a layer's hidden state.
        embedding_size: dimensions of a word embedding.
        joint_embedding_size: dimensions of the joint space.
        pooling: how recurrent states are combined: `last` (only the last), `mean`, or `max` (of each dimension).
        feature_dropout: dropout probability of image features.
        dropout: dropout probability of word embeddings and states.
    """

    sentence_encoder: Literal["lstm", "gru", "mean"] = "gru"
    layers: Annotated[int, Field(ge=1, le=100)] = 1
    hidden_size: PositiveInt = 512
    embedding_size: PositiveInt = 300
    joint_embedding_size: PositiveInt = 512
    pooling: Literal["last", "mean", "max"] = "max"
    feature_dropout: _Probability = 0.2
    dropout: _Probability = 0.2


class RankerNetwork(nn.Module):
    """Embeds features and sentences as unit vectors. `LoadedRanker` (checkpoints/checkpoint.py) embeds plain text.

    Args:
        config: the architecture.
        feature_size: dimensions of an image's feature vector.
        vocabulary_size: `len(vocabulary)`.
    """

    def __init__(self, config: RankerConfig, feature_size: int, vocabulary_size: int) -> None:
        super().__init__()
        self.config = config
        self.feature_size = feature_size
        self.vocabulary_size = vocabulary_size
        self.standardization = Standardization(feature_size)
        self.image_projection = nn.Linear(feature_size, config.joint_embedding_size)
        weights = sample_normal_weights(vocabulary_size, config.embedding_size)
        self.word_vectors = nn.Embedding.from_pretrained(weights, freeze=False)  # type: ignore[no-untyped-call]
        self.recurrence = _build_recurrence(config)
        state_size = config.embedding_size if self.recurrence is None else config.hidden_size
        self.sentence_projection = nn.Linear(state_size, config.joint_embedding_size)
        self.dropout = Dropout(config.dropout)
        self.feature_dropout = Dropout(config.feature_dropout)
        # Only the contrastive loss trains this parameter. As a logarithm, it keeps the temperature positive.
        self.log_temperature = nn.Parameter(torch.tensor(math.log(_INITIAL_TEMPERATURE)))
        nn.init.uniform_(self.word_vectors.weight, -_WORD_EMBEDDING_RANGE, _WORD_EMBEDDING_RANGE)
        for projection in (self.image_projection, self.sentence_projection):
            nn.init.xavier_uniform_(projection.weight)
            nn.init.zeros_(projection.bias)

    def embed_images(self, features: Tensor) -> Tensor:
        """Embeds images as unit vectors, `[images, feature_size]` to `[images, joint_embedding_size]`."""
        features = F.normalize(self.standardization(features), dim=1) * self.feature_size**0.5
        return F.normalize(self.image_projection(self.feature_dropout(features)), dim=1)

    def embed_sentences(self, sentences: Tensor) -> Tensor:
        """Embeds sentences as unit vectors, `[sentences, joint_embedding_size]`.

        `sentences` is `[sentences, longest] int64`: token ids without END, padded with `PAD`.
        """
        words, lengths = _append_end(sentences)
        inputs = self.dropout(self.word_vectors(words.clamp(min=0)))  # [sentences, longest + 1, embedding_size]
        if self.recurrence is None:
            pooled = _pool(inputs, lengths, "mean")
        else:
            pooled = self.dropout(self._encode_sentences(self.recurrence, inputs, lengths))
        return F.normalize(self.sentence_projection(pooled), dim=1)

    def _encode_sentences(self, recurrence: nn.RNNBase, inputs: Tensor, lengths: Tensor) -> Tensor:
        """Encodes `[sentences, longest, embedding_size]` as `[sentences, hidden_size]` with the recurrent layers."""
        packed = pack_padded_sequence(inputs, lengths.cpu(), batch_first=True, enforce_sorted=False)
        outputs, state = recurrence(packed)
        if self.config.pooling == "last":
            last: Tensor = (state[0] if self.config.sentence_encoder == "lstm" else state)[-1]
            return last
        padded, _ = pad_packed_sequence(outputs, batch_first=True)
        return _pool(padded, lengths, self.config.pooling)


def _build_recurrence(config: RankerConfig) -> nn.RNNBase | None:
    if config.sentence_encoder == "mean":
        return None
    cell = nn.LSTM if config.sentence_encoder == "lstm" else nn.GRU
    dropout = config.dropout if config.layers > 1 else 0.0
    return cell(config.embedding_size, config.hidden_size, config.layers, batch_first=True, dropout=dropout)


def _append_end(sentences: Tensor) -> tuple[Tensor, Tensor]:
    """Appends END to each sentence. Returns the sentences and their new lengths, `[sentences]`."""
    lengths = (sentences != PAD).sum(1)
    extended = torch.cat([sentences, sentences.new_full((len(sentences), 1), PAD)], 1)
    return extended.scatter(1, lengths[:, None], END), lengths + 1


def _pool(states: Tensor, lengths: Tensor, method: str) -> Tensor:
    """Pools `[sentences, longest, size]` over the first `lengths` time steps of each sentence."""
    is_token = torch.arange(states.shape[1], device=states.device) < lengths.to(states.device)[:, None]
    if method == "max":
        return states.masked_fill(~is_token[..., None], float("-inf")).amax(1)
    return states.masked_fill(~is_token[..., None], 0).sum(1) / lengths.to(states)[:, None]
