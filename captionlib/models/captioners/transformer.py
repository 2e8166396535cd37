"""The layers of a captioner with `cell: transformer` (Vaswani et al. 2017, arXiv 1706.03762).

    a_i = max(0, Wa (x_i - mean) / std + b)           annotation vector of position i of the feature map
    h_t = sqrt(size) E w_t + position(t) [+ Wih v]    word embedding, sinusoids and, with `image_input: every_step`, the
                                                      projected mean over the positions
    h_t = h_t + SelfAttention(norm(h_t))              to the words up to t    }
    h_t = h_t + CrossAttention(norm(h_t), a)          to the image            } any number of layers
    h_t = h_t + W2 gelu(W1 norm(h_t) + b1) + b2                               }
    p(w_{t+1} | w_1 .. w_t, image) = softmax(Why norm(h_t) + c)

Each head computes softmax(q k / sqrt(head_size)) v. Captioners of this kind: Sharma et al. 2018 (Conceptual Captions,
ACL), Cornia et al. 2020 (arXiv 1912.08226). Normalizing the inputs of the sublayers instead of their outputs (pre-norm)
makes training stable (Xiong et al. 2020, arXiv 2002.04745). A feature vector is treated as a map with one position.

The state is a cache: the keys and values of the words so far. A time step adds the keys and values of one word.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from captionlib.models.captioners.attention import ImageGroups, group_by_image
from captionlib.models.layers import Dropout, Standardization

__all__ = ["Transformer", "TransformerOutput"]

_WAVELENGTH_BASE = 10000  # from the paper: the longest wavelength of the sinusoids is 2 pi times this
_FEED_FORWARD_FACTOR = 4  # from the paper: the feed-forward network has `4 * size` hidden units


class TransformerOutput(NamedTuple):
    """The output of a Transformer for packed sentences.

    Attributes:
        hidden: `[tokens, size]`, the normalized output of the last layer.
        state: the keys of each layer, then the values of each layer, `[sentences, steps, size]` each.
        attention_weights: `[tokens, positions] float32`, the mean over all layers and heads; None without an image.
    """

    hidden: Tensor
    state: list[Tensor]
    attention_weights: Tensor | None


class Transformer(nn.Module):
    """A pre-norm Transformer decoder.

    Args:
        channels: channels of the feature map; 0 for a language model, which has no cross-attention.
        size: dimensions of the word embeddings and of each layer.
        layers: number of layers.
        heads: number of attention heads, which must divide `size`.
        dropout: dropout probability of annotation vectors, and of each sublayer's output.
    """

    def __init__(self, channels: int, size: int, layers: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = Dropout(dropout)
        if channels:
            self.standardization = Standardization(channels)
            self.annotation = nn.Linear(channels, size)
            self.image_keys_values = nn.Linear(size, 2 * layers * size)  # of all layers
        self.layers = nn.ModuleList(_Layer(size, heads, dropout, bool(channels)) for _ in range(layers))
        self.norm = nn.LayerNorm(size)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        if channels:  # initialized separately, because Xavier's bound for the whole matrix is too small
            for projection in self.image_keys_values.weight.chunk(2 * layers):
                nn.init.xavier_uniform_(projection)

    def annotate(self, maps: Tensor) -> Tensor:
        """Computes the keys of each layer's cross-attention, then the values of each layer.

        Returns `[2 * layers, images, heads, positions, head_size]` for maps `[images, positions, channels]`.
        """
        annotations = self.dropout(torch.relu(self.annotation(self.standardization(maps))))
        projected: Tensor = self.image_keys_values(annotations)
        per_head = projected.view(*maps.shape[:2], 2 * len(self.layers), self.heads, -1)
        return per_head.permute(2, 0, 3, 1, 4).contiguous()

    def forward(
        self,
        embeddings: Tensor,
        batch_sizes: list[int],
        state: Sequence[Tensor] | Tensor,
        annotations: Tensor | None,
        image_of_caption: Tensor | None,
        parent: Tensor | None = None,
        image_projections: Tensor | None = None,
    ) -> TransformerOutput:
        """Runs the layers over packed sentences: all words at once, or one more word per sentence.

        Args:
            embeddings: `[tokens, size]`, word embeddings ordered by time step.
            batch_sizes: the number of sentences that reach each time step, in non-increasing order.
            state: the keys of each layer, then the values of each layer, `[parents, steps, size]` each. With several
                time steps in `batch_sizes`, the state must be empty (no steps).
            annotations: the output of `annotate`; None for a language model.
            image_of_caption: `[sentences] int64`, the image that each sentence attends to; None for a language model.
            parent: `[sentences] int64`, the row of the state that each sentence continues; None if sentence i continues
                row i.
            image_projections: `[tokens, size]`, added to the embeddings; None unless `image_input` is `every_step`.
        """
        layout = _PaddedLayout.create(batch_sizes, state[0].shape[1], embeddings.device)
        size, layers = embeddings.shape[1], len(self.layers)
        hidden = embeddings * size**0.5 + _encode_positions(layout.positions, size).to(embeddings.dtype)
        if image_projections is not None:
            hidden = hidden + image_projections
        groups = None
        if annotations is not None and image_of_caption is not None:
            groups = group_by_image(image_of_caption[layout.sentences], annotations.shape[1])
        keys, values, weights = [], [], []
        for index, layer in enumerate(self.layers):
            assert isinstance(layer, _Layer)
            past = state[index], state[layers + index]
            if parent is not None:  # one layer at a time, because the keys and values of a wide beam are large
                past = past[0].index_select(0, parent), past[1].index_select(0, parent)
            hidden, key, value = layer.attend_to_words(hidden, *past, layout)
            keys.append(key)
            values.append(value)
            if annotations is not None and groups is not None:
                keys_values = annotations[index], annotations[layers + index]
                hidden, layer_weights = layer.attend_to_image(hidden, *keys_values, groups)
                weights.append(layer_weights)
            hidden = layer.feed_forward(hidden)
        mean_weights = torch.stack(weights).mean(0) if weights else None
        return TransformerOutput(self.norm(hidden), [*keys, *values], mean_weights)


class _PaddedLayout(NamedTuple):
    """Places packed tokens, which are ordered by time step, in a padded `[sentences, steps]` matrix.

    Attributes:
        sentences: `[tokens] int64`, the sentence of each token.
        positions: `[tokens] int64`, the position of each token in its sentence.
        slots: `[tokens] int64`, the index of each token in the flattened matrix.
        shape: number of sentences and time steps.
    """

    sentences: Tensor
    positions: Tensor
    slots: Tensor
    shape: tuple[int, int]

    @staticmethod
    def create(batch_sizes: list[int], first_position: int, device: torch.device) -> "_PaddedLayout":
        steps = len(batch_sizes)
        sentence = torch.cat([torch.arange(rows, device=device) for rows in batch_sizes])
        step = torch.arange(steps, device=device).repeat_interleave(torch.tensor(batch_sizes, device=device))
        return _PaddedLayout(sentence, first_position + step, sentence * steps + step, (batch_sizes[0], steps))

    def pad(self, tokens: Tensor) -> Tensor:
        """Converts `[tokens, size]` to `[sentences, steps, size]`, with zeros after the end of a sentence."""
        sentences, steps = self.shape
        padded = tokens.new_zeros(sentences * steps, tokens.shape[1]).index_copy(0, self.slots, tokens)
        return padded.view(sentences, steps, -1)

    def pack(self, padded: Tensor) -> Tensor:
        """Converts `[sentences, steps, size]` to `[tokens, size]`."""
        return padded.flatten(0, 1).index_select(0, self.slots)


class _Layer(nn.Module):
    def __init__(self, size: int, heads: int, dropout: float, has_image: bool) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = Dropout(dropout)
        self.word_norm = nn.LayerNorm(size)
        self.word_projections = nn.Linear(size, 3 * size)  # query, key and value
        self.word_output = nn.Linear(size, size)
        if has_image:
            self.image_norm = nn.LayerNorm(size)
            self.image_query = nn.Linear(size, size)
            self.image_output = nn.Linear(size, size)
        self.inner_norm = nn.LayerNorm(size)
        self.inner = nn.Linear(size, _FEED_FORWARD_FACTOR * size)
        self.inner_output = nn.Linear(_FEED_FORWARD_FACTOR * size, size)

    def attend_to_words(
        self, hidden: Tensor, past_keys: Tensor, past_values: Tensor, layout: _PaddedLayout
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Attends from each token to the words up to it; also returns the keys and values of all words so far."""
        query, key, value = layout.pad(self.word_projections(self.word_norm(hidden))).chunk(3, 2)
        key = torch.cat([past_keys.to(key.dtype), key], 1)
        value = torch.cat([past_values.to(value.dtype), value], 1)
        attended = _attend(*(self._split_heads(part) for part in (query, key, value)))
        attended = layout.pack(attended.transpose(1, 2).flatten(2))
        return hidden + self.dropout(self.word_output(attended)), key, value

    def attend_to_image(
        self, hidden: Tensor, keys: Tensor, values: Tensor, groups: ImageGroups
    ) -> tuple[Tensor, Tensor]:
        """Attends from each token to its image; also returns the attention weights, averaged over the heads.

        `keys` and `values` are `[images, heads, positions, head_size]`.
        """
        images, heads, positions, head_size = keys.shape
        queries = self.image_query(self.image_norm(hidden)) * head_size**-0.5
        grouped = queries.new_zeros(images * groups.width, heads * head_size).index_copy(0, groups.slots, queries)
        grouped = grouped.view(images, groups.width, heads, head_size).transpose(1, 2)
        weights = torch.softmax(grouped @ keys.transpose(2, 3), 3, dtype=torch.float32)  # [images, heads, width, pos.]
        contexts = (weights.to(values.dtype) @ values).transpose(1, 2).flatten(2).flatten(0, 1)
        attended = self.image_output(contexts.index_select(0, groups.slots))
        mean_weights = weights.mean(1).view(-1, positions).index_select(0, groups.slots)
        return hidden + self.dropout(attended), mean_weights

    def _split_heads(self, tokens: Tensor) -> Tensor:
        """Converts `[sentences, steps, size]` to `[sentences, heads, steps, head_size]`."""
        return tokens.view(*tokens.shape[:2], self.heads, -1).transpose(1, 2)

    def feed_forward(self, hidden: Tensor) -> Tensor:
        inner = self.dropout(F.gelu(self.inner(self.inner_norm(hidden))))
        output: Tensor = hidden + self.dropout(self.inner_output(inner))
        return output


def _attend(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Computes causal attention, `[sentences, heads, steps, head_size]`. A single query attends to all keys."""
    is_causal = queries.shape[2] > 1  # the causal mask also excludes the padding after the end of a sentence
    if is_causal and not torch.is_grad_enabled():  # sentences of validation can be long; this takes linear memory
        return F.scaled_dot_product_attention(queries, keys, values, is_causal=True)
    # For 16 words in bfloat16 on a CPU, the backward pass of PyTorch's fused attention takes 9 times as long.
    scores = (queries * queries.shape[3] ** -0.5) @ keys.transpose(2, 3)
    if is_causal:
        future = torch.ones(scores.shape[2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(future, -torch.inf)
    return torch.softmax(scores, 3, dtype=torch.float32).to(values.dtype) @ values


def _encode_positions(position: Tensor, size: int) -> Tensor:
    """Returns the sinusoids of the paper: sine and cosine of each position, with wavelengths from 2 pi to 20000 pi."""
    exponent = torch.arange(0, size, 2, device=position.device) / size
    angle = position[:, None] * _WAVELENGTH_BASE**-exponent  # [tokens, size / 2]
    return torch.stack([angle.sin(), angle.cos()], 2).flatten(1)[:, :size]
