"""The captioner: an image vector and the words so far, through an RNN or an LSTM, to the probability of the next word.

After Karpathy & Fei-Fei 2015 (arXiv 1412.2306) and Vinyals et al. 2015 (arXiv 1411.4555):

    v = P (features - mean) / std                 the image, as long as a word vector
    x_0, x_1, ... = START, w_1, ...               word vectors; the image comes before, into or beside them
    h_t = max(0, Wxh x_t + Whh h_{t-1} + b)       or the gates of an LSTM; any number of layers
    p(w_{t+1} | w_1 .. w_t, image) = softmax(Why h_t + c)
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from captionlib.errors import ConfigError
from captionlib.models.ragged import drop_padding, pad_sentences

__all__ = ["Captioner", "CaptionerConfig", "TokenScores", "pad_sentences"]

_WEIGHT_RANGE = 0.1  # NeuralTalk's U(-0.1, 0.1)


@dataclass(frozen=True)
class CaptionerConfig:
    """The shape of a captioner.

    Attributes:
        cell: `lstm`, or `rnn`: the talk's h = max(0, Wxh x + Whh h).
        layers: recurrent layers, one upon the other.
        hidden_size: numbers in a layer's state.
        word_size: numbers in a word vector, and in the projected image.
        dropout: the share of inputs and outputs of each layer that is dropped in training.
        image_input: where the image enters: as an input of its own before START (`tick`, NeuralTalk's LSTM), added to
            START (`first`, the talk's RNN), added to every word (`every`), or as the initial state (`state`); `none` is
            a language model, which knows no image.
        tie_word_vectors: use the word vectors as the weights of the softmax; needs `word_size` = `hidden_size`.
        standardise_features: give each feature mean 0 and deviation 1 over the training images.
        principal_components: how many of the features' principal components the projection sees in their place, each of
            deviation 1; 0 leaves the features. What tells images apart often varies far less than what they share.
    """

    cell: Literal["lstm", "rnn"] = "lstm"
    layers: int = 1
    hidden_size: int = 512
    word_size: int = 512
    dropout: float = 0.5
    image_input: Literal["tick", "first", "every", "state", "none"] = "tick"
    tie_word_vectors: bool = False
    standardise_features: bool = True
    principal_components: int = 0

    def __post_init__(self) -> None:
        for name in ("layers", "hidden_size", "word_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"captioner: {name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"captioner: dropout must be at least 0 and below 1, got {self.dropout}")
        if self.tie_word_vectors and self.word_size != self.hidden_size:
            raise ConfigError(
                "captioner: tie_word_vectors makes word vectors the weights of the softmax, so it needs word_size = "
                f"hidden_size, got {self.word_size} and {self.hidden_size}; set them equal, or leave the vectors free"
            )


class TokenScores(NamedTuple):
    """How likely the model finds sentences, token by token; a token is a word or the END after the last word.

    Attributes:
        log_probs: `[tokens] float32`, ln p(token | image, tokens before it).
        sentences: `[tokens] int64`, the sentence that a token belongs to.
        mean_log_probs: `[tokens] float32`, the mean of ln p over all classes in the token's place, which label
            smoothing learns from; None unless it was asked for.
    """

    log_probs: Tensor
    sentences: Tensor
    mean_log_probs: Tensor | None = None


class Captioner(nn.Module):
    """Features and captions to log-probabilities. `Decoder` in decoding.py writes sentences with it.

    Weights are drawn from PyTorch's global generator.

    Args:
        config: its shape.
        feature_size: numbers in the feature vector of an image; 0 for a language model.
        vocabulary_size: classes of the softmax, `len(vocabulary)`.
    """

    feature_mean: Tensor
    feature_std: Tensor
    components: Tensor | None

    def __init__(self, config: CaptionerConfig, feature_size: int, vocabulary_size: int) -> None:
        super().__init__()
        if (config.image_input == "none") != (feature_size == 0):
            got = f"{config.image_input} and {feature_size}; it is for language models alone"
            raise ConfigError(f"captioner: image_input none goes with no features, got {got}")
        self.config = config
        self.feature_size = feature_size
        self.vocabulary_size = vocabulary_size
        self.register_buffer("feature_mean", torch.zeros(feature_size))
        self.register_buffer("feature_std", torch.ones(feature_size))
        self.word_vectors = nn.Embedding(vocabulary_size, config.word_size)
        self.recurrence: nn.RNNBase = (
            nn.LSTM(config.word_size, config.hidden_size, config.layers, dropout=_between_layers(config))
            if config.cell == "lstm"
            else nn.RNN(config.word_size, config.hidden_size, config.layers, "relu", dropout=_between_layers(config))
        )
        image_size = config.word_size
        if config.image_input == "state":
            image_size = config.layers * config.hidden_size * (2 if config.cell == "lstm" else 1)
        components = config.principal_components
        self.register_buffer("components", torch.zeros(components, feature_size) if components else None)
        if config.image_input != "none":
            self.image_projection = nn.Linear(components or feature_size, image_size)
        self.output = nn.Linear(config.hidden_size, vocabulary_size)
        self.dropout = nn.Dropout(config.dropout)
        self._draw_weights()
        if config.tie_word_vectors:
            self.output.weight = self.word_vectors.weight

    def _draw_weights(self) -> None:
        for name, parameter in self.named_parameters():
            if "bias" in name:
                nn.init.zeros_(parameter)
            else:
                nn.init.uniform_(parameter, -_WEIGHT_RANGE, _WEIGHT_RANGE)

    @torch.no_grad()
    def set_standardisation(self, mean: Tensor, std: Tensor) -> None:
        """Takes the statistics of the training images' features, `[feature_size]` each; constant features become 0."""
        self.feature_mean.copy_(mean)
        self.feature_std.copy_(torch.where(std > 0, std, torch.ones_like(std)))

    @torch.no_grad()
    def set_components(self, sample: Tensor) -> None:
        """Takes the principal components of training images' features, `[images, feature_size]`.

        Where the images are fewer than the components, those that are left see nothing.
        """
        if self.components is None:
            raise ConfigError("captioner: set principal_components before their values")
        self.feature_mean.copy_(sample.mean(0))
        _, singular, directions = torch.linalg.svd(sample - self.feature_mean, full_matrices=False)
        kept = min(len(self.components), int((singular > 1e-4 * singular[0]).sum()))
        self.components[:kept] = directions[:kept] * (len(sample) ** 0.5 / singular[:kept, None])

    @torch.no_grad()
    def initialise_bias(self, log_frequencies: Tensor) -> None:
        """Starts the softmax at the words' frequencies: `[vocabulary_size]`, from `Vocabulary.log_frequencies`."""
        self.output.bias.copy_(log_frequencies)

    def forward(
        self, features: Tensor, captions: Tensor, image_of_sentence: Tensor, mean_log_probs: bool = False
    ) -> TokenScores:
        """Scores captions, each token given the image and the true tokens before it.

        Each image is projected once, whatever the number of its captions, and padding costs nothing.

        Args:
            features: `[images, feature_size]`, as the encoder gave them.
            captions: `[sentences, ticks] int64`, word ids without START and END, then `PAD`.
            image_of_sentence: `[sentences] int64`, the row of `features` that a caption belongs to.
            mean_log_probs: give them too.
        """
        ragged = drop_padding(captions)
        image, state = self.look(features)
        rows = image_of_sentence[ragged.order]  # the image of each sentence that begins
        inputs = self.word_vectors(ragged.words)  # [tokens, word_size]
        if self.config.image_input == "first":
            inputs = torch.cat([inputs[: len(rows)] + image.index_select(0, rows), inputs[len(rows) :]])
        elif self.config.image_input == "every":
            inputs = inputs + image.index_select(0, image_of_sentence[ragged.sentences])
        hidden, _ = self._recur(self.dropout(inputs), ragged.sizes, state.index_select(1, rows))
        logits = self.output(self.dropout(hidden)).float()  # [tokens, vocabulary_size]
        log_probs = -F.cross_entropy(logits, ragged.targets, reduction="none")
        if not mean_log_probs:
            return TokenScores(log_probs, ragged.sentences)
        of_targets = logits.gather(1, ragged.targets[:, None]).squeeze(1)  # ln p(w) = logit(w) - ln Z, so ln Z is known
        return TokenScores(log_probs, ragged.sentences, logits.mean(1) - of_targets + log_probs)

    def standardise(self, features: Tensor) -> Tensor:
        """What the projection sees of features."""
        if self.components is not None:
            return (features - self.feature_mean) @ self.components.t()
        return (features - self.feature_mean) / self.feature_std if self.config.standardise_features else features

    def look(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Takes images in, once each.

        Args:
            features: `[images, feature_size]`, as the encoder gave them.

        Returns:
            The projected images, `[images, word_size]`, of a language model `[images, 0]`; and the state before START,
            `[states, images, hidden_size]`: the h of each layer and then, of an LSTM, the c of each layer.
        """
        if self.config.image_input == "none":
            return features, features.new_zeros(self.state_count, len(features), self.config.hidden_size)
        image = self.image_projection(self.standardise(features))
        if self.config.image_input == "state":
            state = image.view(len(image), -1, self.config.hidden_size).transpose(0, 1)
            return image, torch.tanh(state) if self.config.cell == "lstm" else torch.relu(state)
        state = image.new_zeros(self.state_count, len(image), self.config.hidden_size)
        if self.config.image_input == "tick":
            _, state = self._recur(self.dropout(image), [len(image)], state)
        return image, state

    @property
    def state_count(self) -> int:
        """Vectors of `hidden_size` that make up the state: one a layer, two in an LSTM."""
        return self.config.layers * (2 if self.config.cell == "lstm" else 1)

    def _recur(self, inputs: Tensor, sizes: list[int], state: Tensor) -> tuple[Tensor, Tensor]:
        """Runs the recurrence over ragged sentences.

        Args:
            inputs: `[tokens, word_size]`, tick by tick.
            sizes: how many sentences reach each tick; never more than reached the one before.
            state: `[states, sentences, hidden_size]` to begin with.

        Returns:
            The last layer's h, `[tokens, hidden_size]`, and the state of the sentences that reach the last tick.
        """
        if inputs.is_cuda:
            return self._recur_fused(inputs, sizes, state)
        layers = self.config.layers
        after = list(state.unbind())
        for layer, (w_ih, w_hh, b_ih, b_hh) in enumerate(self.recurrence.all_weights):
            if layer:
                inputs = self.dropout(inputs)
            h, c = after[layer], after[layer + layers] if self.config.cell == "lstm" else None
            ticks = []
            for x in torch.split(F.linear(inputs, w_ih, b_ih + b_hh), sizes):
                h, c = advance(torch.addmm(x, h[: len(x)], w_hh.t()), None if c is None else c[: len(x)])
                ticks.append(h)
            inputs = torch.cat(ticks)
            after[layer] = h
            if c is not None:
                after[layer + layers] = c
        return inputs, torch.stack(after)

    def _recur_fused(self, inputs: Tensor, sizes: list[int], state: Tensor) -> tuple[Tensor, Tensor]:
        """The same by cuDNN; on a CPU PyTorch's own loop over packed sequences takes half again as long as `_recur`."""
        packed = PackedSequence(inputs, torch.tensor(sizes))
        if self.config.cell == "lstm":
            h, c = state.contiguous().chunk(2)
            outputs, (h, c) = self.recurrence(packed, (h, c))
            state = torch.cat([h, c])
        else:
            outputs, state = self.recurrence(packed, state.contiguous())
        return outputs.data, state[:, : sizes[-1]]


def advance(gates: Tensor, c: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """One tick of a layer: the state after it, from Wxh x + Whh h + b.

    Args:
        gates: `[rows, hidden_size]` of an RNN; `[rows, 4 * hidden_size]` of an LSTM: input, forget, cell, output gate.
        c: `[rows, hidden_size]` of an LSTM, None of an RNN.

    Returns:
        h and c, `[rows, hidden_size]` each.
    """
    if c is None:
        return torch.relu(gates), None
    i, f, g, o = gates.chunk(4, dim=1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def _between_layers(config: CaptionerConfig) -> float:
    return config.dropout if config.layers > 1 else 0.0
