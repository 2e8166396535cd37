"""The captioner: a network that predicts the next word of a caption from an image feature and the previous words.

It follows Karpathy & Fei-Fei 2015 (arXiv 1412.2306) and Vinyals et al. 2015 (arXiv 1411.4555):

    v = (features - mean) / std                 image vector
    x_0, x_1, ... = START, w_1, ...             word embeddings
    h_t = max(0, Wxh x_t + Whh h_{t-1} + b)     or the gates of an LSTM; any number of layers
    p(w_{t+1} | w_1 .. w_t, image) = softmax(Why h_t + c)

`image_input` sets where the image projection Wih v enters. With `first_step`, h_0 = max(0, Wxh x_0 + Wih v + b).

The END token also serves as START. A feature map is averaged over its positions to give the `features` above. With
attention (attention.py), the context vector z_t affects two sums: Wz z_t is added to h_t before the output layer, and
Wg z_t to the gates of step t + 1. A Transformer (transformer.py) computes h_t from all previous words and the image's
positions. With `every_step`, Wih v is added to its word embeddings.
"""

from typing import Annotated, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field, NonNegativeInt, PositiveInt
from torch import Tensor, nn

from captionlib.config import configclass
from captionlib.data.text.vocabulary import END
from captionlib.errors import CheckpointError, ConfigError, DatasetError
from captionlib.models.captioners.attention import Attention
from captionlib.models.captioners.packed_sequences import PackedSequences, pack_sequences
from captionlib.models.captioners.recurrence import RecurrenceOutput, run_recurrence
from captionlib.models.captioners.transformer import Transformer
from captionlib.models.encoders.top_layers import EncoderTop
from captionlib.models.layers import Dropout, Standardization, sample_normal_weights

__all__ = ["CaptionerConfig", "CaptionerNetwork", "ImageState", "TokenLogProbs"]

_WEIGHT_RANGE = 0.1  # NeuralTalk (the code of the first paper) samples all weights from U(-0.1, 0.1)
_SMALLEST_SINGULAR_VALUE = 1e-4  # relative to the largest; smaller singular values are treated as noise


@configclass
class CaptionerConfig:
    """The architecture of a captioner.

    Attributes:
        cell: `lstm`, `rnn` with ReLU units, or `transformer`.
        layers: number of layers.
        hidden_size: dimensions of a layer's hidden state.
        embedding_size: dimensions of the word embeddings; a Transformer requires `embedding_size` = `hidden_size`.
        heads: number of attention heads of a Transformer, which must divide `hidden_size`.
        dropout: dropout probability of the inputs and outputs of each layer, and of annotation vectors.
        image_input: where the projected image enters an RNN or LSTM. `initial_input`: a separate input before START
            (NeuralTalk's LSTM). `first_step`: added to the pre-activations of the first layer at START (the RNN of
            Karpathy & Fei-Fei; NeuralTalk's `rnn_feed_once`). `every_step`: the same at every time step (NeuralTalk's
            RNN). `initial_state`: the state before START. `none`: a language model. A Transformer supports `none`,
            `initial_input` (the image enters only through attention) and `every_step` (the projected image is also
            added to the embedding of each word).
        tie_embeddings: use the word embeddings as the softmax weights; requires `embedding_size` = `hidden_size`.
        feature_power: exponent of the magnitudes of features; signs are kept. An exponent below 1 damps large
            activations (Perronnin et al. 2010).
        standardize_features: standardize features with the mean and standard deviation of the training images.
        principal_components: number of whitened principal components that replace the features; 0 keeps the features.
        attention_size: dimensions of an annotation vector. 0 disables attention. Attention needs spatial feature maps.
            Must be 0 for a Transformer, whose annotation vectors have `hidden_size` dimensions.
        encoder_top: last node of the encoder network whose layers become part of the captioner and are fine-tuned with
            it. They begin after the node that outputs the features. For example, `features.29` if the features are the
            output of `features.23`. If None, the captioner contains no encoder layers.
        weight_init: `neuraltalk` initializes weights from U(-r, r) with r = min(0.1, 1 / sqrt(fan_in)), word embeddings
            with r = 0.1, and the recurrent weights of an RNN with random orthogonal matrices; `pytorch` uses PyTorch's
            defaults: word embeddings from N(0, 1), all others from U(-r, r) with r = 1 / sqrt(fan_in). A Transformer
            ignores this: its word embeddings and softmax weights are from N(0, 1 / hidden_size), its image projection
            has PyTorch's defaults, and all others are initialized as in Glorot & Bengio 2010.
    """

    cell: Literal["lstm", "rnn", "transformer"] = "lstm"
    layers: Annotated[int, Field(ge=1, le=100)] = 1
    hidden_size: PositiveInt = 512
    embedding_size: PositiveInt = 512
    heads: PositiveInt = 8
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.5
    image_input: Literal["initial_input", "first_step", "every_step", "initial_state", "none"] = "initial_input"
    tie_embeddings: bool = False
    feature_power: Annotated[float, Field(gt=0, le=1)] = 1.0
    standardize_features: bool = True
    principal_components: NonNegativeInt = 0
    attention_size: NonNegativeInt = 0
    encoder_top: str | None = None
    weight_init: Literal["neuraltalk", "pytorch"] = "neuraltalk"

    def __post_init__(self) -> None:
        if self.attention_size and self.image_input == "none":
            raise ConfigError("captioner: attention_size needs an image, got image_input none")
        if self.tie_embeddings and self.embedding_size != self.hidden_size:
            raise ConfigError(
                "captioner: tie_embeddings makes the word embeddings the weights of the softmax, so it needs "
                f"embedding_size = hidden_size, got {self.embedding_size} and {self.hidden_size}; set them equal, or "
                "set tie_embeddings to false"
            )
        if self.cell == "transformer":
            self._check_transformer()

    def _check_transformer(self) -> None:
        if self.embedding_size != self.hidden_size:
            raise ConfigError(
                f"captioner: a Transformer needs embedding_size = hidden_size, got {self.embedding_size} and "
                f"{self.hidden_size}; set them equal"
            )
        if self.hidden_size % self.heads:
            raise ConfigError(
                f"captioner: expected heads that divide hidden_size, got {self.heads} and {self.hidden_size}; all "
                "attention heads have the same size"
            )
        for name, allowed in (
            ("attention_size", (0,)),
            ("principal_components", (0,)),
            ("image_input", ("initial_input", "every_step", "none")),
        ):
            if getattr(self, name) not in allowed:
                raise ConfigError(
                    f"captioner: cell transformer needs {name} {' or '.join(map(str, allowed))}, got "
                    f"{getattr(self, name)}; leave {name} out"
                )


class TokenLogProbs(NamedTuple):
    """Log-probabilities of the tokens of given sentences, including the END of each.

    Attributes:
        log_probs: `[tokens] float32`, ln p(token | image, previous tokens).
        sentences: `[tokens] int64`, the index of each token's sentence.
        mean_log_probs: `[tokens] float32`, the mean of ln p over the vocabulary, for label smoothing; may be None.
    """

    log_probs: Tensor
    sentences: Tensor
    mean_log_probs: Tensor | None = None


class ImageState(NamedTuple):
    """Encoded images.

    Attributes:
        features: `[images, projection_input_size]`, the input of the projection; `[images, 0]` for a language model.
        projection: `[images, size]`, the projected features. The size is that of a word embedding, the gates or the
            state, depending on `image_input`; 0 for a language model, and for a Transformer without `every_step`.
        state: `[states, images, hidden_size]` before START: the h of each layer, then the c of each layer of an LSTM.
            For a Transformer, an empty cache of keys and values, `[2 * layers, images, 0, hidden_size]`.
        annotations: annotation vectors, `[images, positions, attention_size]`; for a Transformer, their keys and values
            (`Transformer.annotate`); None without attention.
    """

    features: Tensor
    projection: Tensor
    state: Tensor
    annotations: Tensor | None


class CaptionerNetwork(nn.Module):
    """Computes log-probabilities of captions from image features. `Decoder` (decoding/decoder.py) generates captions.

    Args:
        config: the architecture.
        feature_size: dimensions of an image's feature vector, or channels of its feature map; 0 for a language model.
        vocabulary_size: number of classes of the softmax, `len(vocabulary)`.
        encoder_top: layers from the features to `config.encoder_top`; `feature_size` then describes their output.

    Raises:
        ConfigError: `config.image_input` is `none` but `feature_size` is not 0, or the reverse.
    """

    components: Tensor | None
    recurrence: nn.RNNBase  # missing if the cell is a Transformer
    transformer: Transformer | None

    def __init__(
        self, config: CaptionerConfig, feature_size: int, vocabulary_size: int, encoder_top: EncoderTop | None = None
    ) -> None:
        super().__init__()
        if (config.image_input == "none") != (feature_size == 0):
            raise ConfigError(
                "captioner: expected image_input none and feature_size 0 together (a language model), got "
                f"{config.image_input} and {feature_size}"
            )
        embedding_size, hidden_size, layers = config.embedding_size, config.hidden_size, config.layers
        gates_size = hidden_size * (4 if config.cell == "lstm" else 1)
        self.config = config
        self.feature_size = feature_size
        self.vocabulary_size = vocabulary_size
        self.standardization = Standardization(feature_size)
        component_count = config.principal_components
        self.register_buffer("components", torch.zeros(component_count, feature_size) if component_count else None)
        # The order of the parameters determines which random numbers initialize them.
        weights = sample_normal_weights(vocabulary_size, embedding_size)
        self.word_vectors = nn.Embedding.from_pretrained(weights, freeze=False)  # type: ignore[no-untyped-call]
        self.transformer = None
        if config.cell == "transformer":
            self.transformer = Transformer(feature_size, hidden_size, layers, config.heads, config.dropout)
        else:
            self.recurrence = _create_recurrence(config)
        if config.image_input != "none" and (self.transformer is None or config.image_input == "every_step"):
            sizes = {"initial_input": embedding_size, "initial_state": self.state_count * hidden_size}
            self.image_projection = nn.Linear(self.projection_input_size, sizes.get(config.image_input, gates_size))
        self.attention: Attention | None = None
        if config.attention_size:
            self.attention = Attention(feature_size, config.attention_size, hidden_size, gates_size, config.dropout)
        self.output = nn.Linear(hidden_size, vocabulary_size)
        self.dropout = Dropout(config.dropout)
        if self.transformer is not None:
            for layer in (self.word_vectors, self.output):
                layer.weight = nn.Parameter(sample_normal_weights(vocabulary_size, hidden_size, hidden_size**-0.5))
        elif config.weight_init == "neuraltalk":
            self._initialize_weights()
        self.encoder_top = encoder_top  # after the initialization, which would overwrite its pretrained weights
        if config.tie_embeddings:
            self.output.weight = self.word_vectors.weight

    @property
    def projection_input_size(self) -> int:
        """Dimensions of the input of the image projection: the features or their principal components."""
        return self.feature_size if self.components is None else len(self.components)

    @property
    def state_count(self) -> int:
        """Number of parts of the state: one per layer of an RNN, two per layer of an LSTM or Transformer."""
        return self.config.layers * (1 if self.config.cell == "rnn" else 2)

    @property
    def attention_module(self) -> Attention | Transformer | None:
        """The module that attends to the positions of a feature map, if there is one."""
        is_language_model = self.config.image_input == "none"
        return self.attention if self.transformer is None or is_language_model else self.transformer

    def forward(
        self, features: Tensor, captions: Tensor, image_of_caption: Tensor, mean_log_probs: bool = False
    ) -> TokenLogProbs:
        """Computes the log-probability of each token of captions, given the image and the previous tokens.

        Args:
            features: `[images, feature_size]` or `[images, positions, channels]`, from the encoder.
            captions: `[captions, longest] int64`, token ids without START and END, padded with `PAD`.
            image_of_caption: `[captions] int64`, the row of `features` that each caption describes.
            mean_log_probs: also return the mean log-probability over the vocabulary.
        """
        packed = pack_sequences(captions)
        hidden = self._run_packed(features, packed, image_of_caption).hidden
        logits = self.output(self.dropout(hidden)).float()  # [tokens, vocabulary_size]
        log_probs = -F.cross_entropy(logits, packed.targets, reduction="none")
        if not mean_log_probs:
            return TokenLogProbs(log_probs, packed.sentences)
        target_logits = logits.gather(1, packed.targets[:, None]).squeeze(1)  # ln p = logit - ln Z
        return TokenLogProbs(log_probs, packed.sentences, logits.mean(1) - target_logits + log_probs)

    def attention_weights(self, features: Tensor, captions: Tensor, image_of_caption: Tensor) -> list[Tensor]:
        """Returns attention weights, `[tokens, positions] float32` per caption, END included; see `forward`.

        Raises:
            CheckpointError: the captioner has no attention.
        """
        packed = pack_sequences(captions)
        weights = self._run_packed(features, packed, image_of_caption).attention_weights
        if weights is None:
            raise CheckpointError("captioner: attention weights need a captioner with attention, got one without")
        return [weights[packed.sentences == sentence] for sentence in range(len(captions))]

    def step(
        self, words: Tensor, state: Tensor, image_state: ImageState, image_of_caption: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Computes one differentiable time step. For inference, `IncrementalCaptioner` is faster.

        Args:
            words: `[sentences] int64`, the previous token of each sentence; END at the first time step.
            state: the state of each sentence; at the first time step, the `image_state.state` of its image.
            image_state: the encoded images.
            image_of_caption: `[sentences] int64`, the image of each sentence.

        Returns:
            The log-probabilities of the next word, `[sentences, vocabulary_size] float32`, and the new state.
        """
        is_first = bool((words == END).all())
        output = self._run(words, [len(words)], state, image_state, image_of_caption, is_first)
        return F.log_softmax(self.output(self.dropout(output.hidden)).float(), 1), output.state

    def predict_bag_of_words(self, features: Tensor) -> Tensor:
        """Returns the log-probability of each word as the first token, `[images, vocabulary_size] float32`.

        The objective `bag_of_words` trains the first time step to predict all words of the captions.
        """
        image_state = self.encode_images(features)
        images = torch.arange(len(features), device=features.device)
        return self.step(torch.full_like(images, END), image_state.state, image_state, images)[0]

    def encode_images(self, features: Tensor) -> ImageState:
        """Encodes images from features, `[images, feature_size]` or `[images, positions, channels]`.

        Raises:
            DatasetError: the captioner has attention, but the features are not feature maps.
        """
        return self._encode_features(features if self.encoder_top is None else self.encoder_top(features))

    def encode_mean_features(self) -> ImageState:
        """Encodes an image that has the training images' mean features at every position.

        Raises:
            ConfigError: the captioner does not store the mean.
        """
        if not (self.config.standardize_features or self.config.principal_components):
            raise ConfigError(
                "captioner: expected a captioner that stores the mean of the training images' features, got one with "
                "standardize_features false"
            )
        mean = self.standardization.mean  # of power-normalized features, so the power is inverted here
        return self._encode_features((mean.sign() * mean.abs() ** (1 / self.config.feature_power))[None, None])

    def power_normalize(self, features: Tensor) -> Tensor:
        """Raises the magnitudes of features to `feature_power`, and keeps the signs."""
        power = self.config.feature_power
        if power == 1:
            return features
        magnitudes = torch.where(features == 0, 1, features.abs())  # the gradient at 0 is infinite
        return features.sign() * magnitudes**power

    def transform_features(self, features: Tensor) -> Tensor:
        """Computes the input of the image projection, `[images, feature_size]` to `[images, projection_input_size]`."""
        features = self.power_normalize(features)
        if self.components is not None:
            return (features - self.standardization.mean) @ self.components.t()
        return self.standardization(features) if self.config.standardize_features else features

    @torch.no_grad()
    def set_principal_components(self, features: Tensor) -> None:
        """Computes the principal components of training images' power-normalized features, `[images, feature_size]`.

        Components beyond the rank of the features stay 0.
        """
        if self.components is None:
            raise ConfigError("captioner: expected principal_components above 0, got 0")
        mean = features.mean(0)
        self.standardization.mean.copy_(mean)
        _, singular, directions = torch.linalg.svd(features - mean, full_matrices=False)
        rank = int((singular > _SMALLEST_SINGULAR_VALUE * singular[0]).sum())
        count = min(len(self.components), rank)
        self.components[:count] = directions[:count] * (len(features) ** 0.5 / singular[:count, None])

    @torch.no_grad()
    def initialize_bias(self, log_frequencies: Tensor) -> None:
        """Initializes the softmax bias with `Vocabulary.log_frequencies`, `[vocabulary_size]`."""
        self.output.bias.copy_(log_frequencies)

    def _run_packed(self, features: Tensor, packed: PackedSequences, image_of_caption: Tensor) -> RecurrenceOutput:
        image_state = self.encode_images(features)
        images = image_of_caption[packed.order]  # the longest sentence first
        state = image_state.state.index_select(1, images)
        return self._run(packed.words, packed.batch_sizes, state, image_state, images)

    def _run(
        self,
        words: Tensor,
        batch_sizes: list[int],
        state: Tensor,
        image_state: ImageState,
        image_of_caption: Tensor,
        is_first: bool = True,
    ) -> RecurrenceOutput:
        """Runs the layers over words, `[tokens] int64`, which begin with START if `is_first`; see `run_recurrence`."""
        projections = None  # of the image of each word's sentence
        image_input = self.config.image_input
        if image_input == "every_step" or (image_input == "first_step" and is_first):
            projections = self.dropout(image_state.projection.index_select(0, image_of_caption))
            if image_input == "every_step":  # the longest sentences come first and reach the most time steps
                projections = torch.cat([projections[:rows] for rows in batch_sizes])
        inputs = self.dropout(self.word_vectors(words))  # [tokens, embedding_size]
        images = image_state.annotations, image_of_caption
        if self.transformer is not None:
            output = self.transformer(inputs, batch_sizes, state, *images, image_projections=projections)
            final_state = torch.stack([values[: batch_sizes[-1]] for values in output.state])
            return RecurrenceOutput(output.hidden, final_state, output.attention_weights)
        recurrence = self.recurrence, self.dropout
        return run_recurrence(*recurrence, inputs, batch_sizes, state, projections, self.attention, *images)

    def _encode_features(self, features: Tensor) -> ImageState:
        if self.transformer is not None:
            return self._encode_for_transformer(self.transformer, features)
        annotations = None
        if self.attention is not None:
            if features.dim() != 3:
                raise DatasetError(
                    "captioner: attention needs feature maps [positions, channels], got one vector per image; extract "
                    "features with pooling none at a node whose output is a spatial feature map"
                )
            annotations = self.attention.annotate(self.power_normalize(features))
        if features.dim() == 3:
            features = features.mean(1)
        count, hidden_size = len(features), self.config.hidden_size
        if self.config.image_input == "none":
            state = features.new_zeros(self.state_count, count, hidden_size)
            return ImageState(features, features, state, None)
        features = self.transform_features(features)
        projection = self.image_projection(features)
        if self.config.image_input == "initial_state":
            state = projection.view(count, -1, hidden_size).transpose(0, 1)
            state = torch.tanh(state) if self.config.cell == "lstm" else torch.relu(state)
        else:
            state = projection.new_zeros(self.state_count, count, hidden_size)
        if self.config.image_input == "initial_input":
            state = run_recurrence(self.recurrence, self.dropout, self.dropout(projection), [count], state).state
        return ImageState(features, projection, state, annotations)

    def _encode_for_transformer(self, transformer: Transformer, features: Tensor) -> ImageState:
        state = features.new_zeros(self.state_count, len(features), 0, self.config.hidden_size)
        if self.config.image_input == "none":
            return ImageState(features, features, state, None)
        maps = features if features.dim() == 3 else features[:, None]
        annotations = transformer.annotate(self.power_normalize(maps))
        pooled = self.transform_features(maps.mean(1))
        projection = self.image_projection(pooled) if self.config.image_input == "every_step" else pooled[:, :0]
        return ImageState(pooled, projection, state, annotations)

    def _initialize_weights(self) -> None:
        """Initializes as NeuralTalk does, but with smaller weights for a layer with more than 100 inputs.

        With U(-0.1, 0.1), a projection of the thousands of features of fc7 would outweigh the softmax bias (the log
        frequencies of the words) in the first predictions. An orthogonal Whh keeps the length of an RNN's state.
        """
        for name, parameter in self.named_parameters():
            if "bias" in name:
                nn.init.zeros_(parameter)
            elif "weight_hh" in name and self.config.cell == "rnn":
                nn.init.orthogonal_(parameter)
            else:
                fan_in = 1 if parameter is self.word_vectors.weight else parameter.shape[1]
                bound = min(_WEIGHT_RANGE, fan_in**-0.5)
                nn.init.uniform_(parameter, -bound, bound)


def _create_recurrence(config: CaptionerConfig) -> nn.RNNBase:
    sizes = config.embedding_size, config.hidden_size, config.layers
    dropout = config.dropout if config.layers > 1 else 0.0
    return nn.LSTM(*sizes, dropout=dropout) if config.cell == "lstm" else nn.RNN(*sizes, "relu", dropout=dropout)
