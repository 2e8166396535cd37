"""The captioner: an image vector and the words so far, through an RNN or an LSTM, to the probability of the next word.

After Karpathy & Fei-Fei 2015 (arXiv 1412.2306) and Vinyals et al. 2015 (arXiv 1411.4555):

    v = P (features - mean) / std                 the image, as long as a word vector
    x_0, x_1, ... = START, w_1, ...               word vectors; the image comes before, into or beside them
    h_t = max(0, Wxh x_t + Whh h_{t-1} + b)       or the gates of an LSTM; any number of layers
    p(w_{t+1} | w_1 .. w_t, image) = softmax(Why h_t + c)

Of a spatial map the image vector is the mean over its positions. With attention each word has a look at the positions
themselves, z_t = look(h_t) (attention.py): it adds Wz z_t to h_t at the output, and Wg z_t to the next tick's gates.
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
from captionlib.models.captioners.recurrence import recur, recur_attending
from captionlib.models.encoders.top_layers import EncoderTop
from captionlib.models.standardization import Standardization

__all__ = ["Captioner", "CaptionerConfig", "ImageState", "TokenLogProbs"]

_WEIGHT_RANGE = 0.1  # NeuralTalk's U(-0.1, 0.1)


@configclass
class CaptionerConfig:
    """The shape of a captioner.

    Attributes:
        cell: `lstm`, or `rnn`: the talk's h = max(0, Wxh x + Whh h).
        layers: recurrent layers, one upon the other.
        hidden_size: numbers in a layer's state.
        embedding_size: numbers in a word vector, and in the projected image.
        dropout: the share of inputs and outputs of each layer that is dropped in training.
        image_input: where the image enters: as an input of its own before START (`tick`, NeuralTalk's LSTM), added to
            START (`first`, the talk's RNN), added to every word (`every`), or as the initial state (`state`); `none` is
            a language model, which knows no image.
        tie_embeddings: use the word vectors as the weights of the softmax; needs `embedding_size` = `hidden_size`.
        feature_power: each feature is raised to this power, its sign kept, before all else; 0.5 evens out the few that
            answer strongly (Perronnin et al. 2010), 1 leaves them as they are.
        standardize_features: give each feature mean 0 and deviation 1 over the training images.
        principal_components: how many of the features' principal components the projection sees in their place, each of
            deviation 1; 0 leaves the features. What tells images apart often varies far less than what they share.
        attention_size: numbers in the vector of a region that words look at; 0 is a single image_state at the whole image.
            It needs features that are spatial maps.
        encoder_top: a later node of the encoder's network, such as `features.29` where features are the maps of `features.23`:
            what lies between becomes a part of the captioner, and is tuned with it. None takes features as they are.
        weight_init: what training starts from: `neuraltalk`, all from U(-0.1, 0.1); or `pytorch`, as its layers have
            it: word vectors from N(0, 1), the others from U(-r, r) with r = 1 / sqrt(inputs).
    """

    cell: Literal["lstm", "rnn"] = "lstm"
    layers: PositiveInt = 1
    hidden_size: PositiveInt = 512
    embedding_size: PositiveInt = 512
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
            raise ConfigError("captioner: attention_size needs an image to look at, got image_input none")
        if self.tie_embeddings and self.embedding_size != self.hidden_size:
            raise ConfigError(
                "captioner: tie_embeddings makes word vectors the weights of the softmax, so it needs embedding_size = "
                f"hidden_size, got {self.embedding_size} and {self.hidden_size}; set them equal, or leave the vectors free"
            )


class TokenLogProbs(NamedTuple):
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


class ImageState(NamedTuple):
    """What a captioner takes in of images before it writes.

    Attributes:
        vector: `[images, vector_size]`, what the projection sees of them; of a language model `[images, 0]`.
        image: `[images, embedding_size]`, the projected image vectors; of a language model `[images, 0]`.
        state: `[states, images, hidden_size]` before START: the h of each layer and then, of an LSTM, the c of each.
        annotations: `[images, positions, attention_size]`, what words may look at; None without attention.
    """

    vector: Tensor
    image: Tensor
    state: Tensor
    annotations: Tensor | None


class Captioner(nn.Module):
    """Features and captions to log-probabilities. `Decoder` in decoding.py writes sentences with it.

    Weights are drawn from PyTorch's global generator.

    Args:
        config: its shape.
        feature_size: numbers in the feature vector of an image, or channels of its map; 0 for a language model.
        vocabulary_size: classes of the softmax, `len(vocabulary)`.
        encoder_top: what features go through first, where `config` names a node; `feature_size` is then of what it gives.
    """

    components: Tensor | None

    def __init__(
        self, config: CaptionerConfig, feature_size: int, vocabulary_size: int, encoder_top: EncoderTop | None = None
    ) -> None:
        super().__init__()
        if (config.image_input == "none") != (feature_size == 0):
            got = f"{config.image_input} and {feature_size}; it is for language models alone"
            raise ConfigError(f"captioner: image_input none goes with no features, got {got}")
        self.config = config
        self.feature_size = feature_size
        self.vocabulary_size = vocabulary_size
        self.standardization = Standardization(feature_size)
        self.word_vectors = nn.Embedding(vocabulary_size, config.embedding_size)
        self.recurrence: nn.RNNBase = (
            nn.LSTM(config.embedding_size, config.hidden_size, config.layers, dropout=_between_layers(config))
            if config.cell == "lstm"
            else nn.RNN(
                config.embedding_size, config.hidden_size, config.layers, "relu", dropout=_between_layers(config)
            )
        )
        image_size = config.embedding_size
        if config.image_input == "initial_state":
            image_size = config.layers * config.hidden_size * (2 if config.cell == "lstm" else 1)
        components = config.principal_components
        self.register_buffer("components", torch.zeros(components, feature_size) if components else None)
        if config.image_input != "none":
            self.image_projection = nn.Linear(self.vector_size, image_size)
        self.attention: Attention | None = None
        if config.attention_size:
            gates = config.hidden_size * (4 if config.cell == "lstm" else 1)
            self.attention = Attention(feature_size, config.attention_size, config.hidden_size, gates, config.dropout)
        self.output = nn.Linear(config.hidden_size, vocabulary_size)
        self.dropout = nn.Dropout(config.dropout)
        if config.weight_init == "neuraltalk":
            self._draw_weights()
        self.encoder_top = encoder_top  # its weights are drawn nowhere
        if config.tie_embeddings:
            self.output.weight = self.word_vectors.weight

    def _draw_weights(self) -> None:
        for name, parameter in self.named_parameters():
            if "bias" in name:
                nn.init.zeros_(parameter)
            else:
                nn.init.uniform_(parameter, -_WEIGHT_RANGE, _WEIGHT_RANGE)

    def power_normalize(self, features: Tensor) -> Tensor:
        """Features of any shape to the `feature_power`, from which all statistics are taken."""
        power = self.config.feature_power
        if power == 1:
            return features
        sizes = torch.where(
            features == 0, 1, features.abs()
        )  # at 0 the slope is infinite, and what is tuned by it lost
        return features.sign() * sizes**power

    @torch.no_grad()
    def set_principal_components(self, sample: Tensor) -> None:
        """Takes the principal components of training images' features, `[images, feature_size]`.

        Where the images are fewer than the components, those that are left see nothing.
        """
        if self.components is None:
            raise ConfigError("captioner: set principal_components before their values")
        self.standardization.mean.copy_(sample.mean(0))
        _, singular, directions = torch.linalg.svd(sample - self.standardization.mean, full_matrices=False)
        kept = min(len(self.components), int((singular > 1e-4 * singular[0]).sum()))
        self.components[:kept] = directions[:kept] * (len(sample) ** 0.5 / singular[:kept, None])

    @torch.no_grad()
    def initialize_bias(self, log_frequencies: Tensor) -> None:
        """Starts the softmax at the words' frequencies: `[vocabulary_size]`, from `Vocabulary.log_frequencies`."""
        self.output.bias.copy_(log_frequencies)

    def forward(
        self, features: Tensor, captions: Tensor, image_of_sentence: Tensor, mean_log_probs: bool = False
    ) -> TokenLogProbs:
        """Scores captions, each token given the image and the true tokens before it.

        Each image is projected once, whatever the number of its captions, and padding costs nothing.

        Args:
            features: `[images, feature_size]` or `[images, positions, channels]`, as the encoder gave them.
            captions: `[sentences, ticks] int64`, word ids without START and END, then `PAD`.
            image_of_sentence: `[sentences] int64`, the row of `features` that a caption belongs to.
            mean_log_probs: give them too.
        """
        packed = pack_sequences(captions)
        hidden, _ = self._read(features, packed, image_of_sentence)
        logits = self.output(self.dropout(hidden)).float()  # [tokens, vocabulary_size]
        log_probs = -F.cross_entropy(logits, packed.targets, reduction="none")
        if not mean_log_probs:
            return TokenLogProbs(log_probs, packed.sentences)
        of_targets = logits.gather(1, packed.targets[:, None]).squeeze(1)  # ln p(w) = logit(w) - ln Z, so ln Z is known
        return TokenLogProbs(log_probs, packed.sentences, logits.mean(1) - of_targets + log_probs)

    def predict_bag_of_words(self, features: Tensor) -> Tensor:
        """The log-probability of each class as the first word of a sentence, `[images, vocabulary_size] float32`."""
        image_state = self.encode_images(features)
        images = torch.arange(len(features), device=features.device)
        return self.step(torch.full_like(images, END), image_state.state, image_state, images)[0]

    def step(
        self, words: Tensor, state: Tensor, image_state: ImageState, image_of_sentence: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Reads one word of each sentence, so that what it foretells can be learned from; `IncrementalCaptioner` is faster.

        Args:
            words: `[sentences] int64`; END to begin.
            state: `[states, sentences, hidden_size]`; to begin with the image_state's, of each sentence's image.
            image_state: of the images, from `look`.
            image_of_sentence: `[sentences] int64`, the row of the image_state that a sentence belongs to.

        Returns:
            The log-probabilities of the next word, `[sentences, vocabulary_size] float32`, and the state after it.
        """
        inputs = self.word_vectors(words)
        adds = self.config.image_input == "every_step" or (
            self.config.image_input == "first_step" and bool((words == END).all())
        )
        if adds:
            inputs = inputs + image_state.image.index_select(0, image_of_sentence)
        hidden, state, _ = self._recur(inputs, [len(words)], state, image_state, image_of_sentence)
        return F.log_softmax(self.output(self.dropout(hidden)).float(), 1), state

    def attention_weights(self, features: Tensor, captions: Tensor, image_of_sentence: Tensor) -> list[Tensor]:
        """Where the model looks for each token of captions; the arguments are those of `forward`.

        Returns:
            For each caption `[tokens, positions] float32`, END last; each row adds up to 1.

        Raises:
            CheckpointError: the model has no attention.
        """
        packed = pack_sequences(captions)
        _, looks = self._read(features, packed, image_of_sentence)
        if looks is None:
            raise CheckpointError(
                "captioner: expected one with attention, got one that takes the image in at a image_state"
            )
        return [looks[packed.sentences == sentence] for sentence in range(len(captions))]

    def _read(
        self, features: Tensor, packed: PackedSequences, image_of_sentence: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """What the output sees of each token, `[tokens, hidden_size]`, and where it looks, `[tokens, positions]`."""
        image_state = self.encode_images(features)
        rows = image_of_sentence[packed.order]  # the image of each sentence that begins
        inputs = self.word_vectors(packed.words)  # [tokens, embedding_size]
        if self.config.image_input == "first_step":
            inputs = torch.cat([inputs[: len(rows)] + image_state.image.index_select(0, rows), inputs[len(rows) :]])
        elif self.config.image_input == "every_step":
            inputs = inputs + image_state.image.index_select(0, image_of_sentence[packed.sentences])
        hidden, _, looks = self._recur(inputs, packed.sizes, image_state.state.index_select(1, rows), image_state, rows)
        return hidden, looks

    def _recur(
        self, inputs: Tensor, sizes: list[int], state: Tensor, image_state: ImageState, rows: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """What the output sees of each token, the state after the last tick, and where each token looks.

        Args:
            inputs: `[tokens, embedding_size]`, tick by tick.
            sizes: the sentences that have each tick.
            state: before the first.
            image_state: of the images.
            rows: of the image_state, for each sentence that begins.
        """
        inputs = self.dropout(inputs)
        if self.attention is None or image_state.annotations is None:
            return *recur(self.recurrence, self.dropout, inputs, sizes, state), None
        return recur_attending(
            self.recurrence, self.dropout, self.attention, inputs, sizes, state, image_state.annotations, rows
        )

    def transform_features(self, features: Tensor) -> Tensor:
        """What the projection sees of image vectors, `[images, feature_size]`."""
        features = self.power_normalize(features)
        if self.components is not None:
            return (features - self.standardization.mean) @ self.components.t()
        return self.standardization(features) if self.config.standardize_features else features

    def encode_images(self, features: Tensor) -> ImageState:
        """Takes images in, once each.

        Args:
            features: `[images, feature_size]` or `[images, positions, channels]`, as the encoder gave them.

        Raises:
            ConfigError: the model has attention, and the features are no maps.
        """
        return self._encode_features(features if self.encoder_top is None else self.encoder_top(features))

    def encode_average_image(self) -> ImageState:
        """Takes in one image that has the mean of the training images' features, everywhere alike.

        Raises:
            ConfigError: the model does not know it.
        """
        if not (self.config.standardize_features or self.config.principal_components):
            raise ConfigError(
                "captioner: expected one that knows the mean of its training images' features, got "
                "standardize_features false"
            )
        mean = self.standardization.mean
        return self._encode_features((mean.sign() * mean.abs() ** (1 / self.config.feature_power))[None, None])

    def _encode_features(self, features: Tensor) -> ImageState:
        """What `look` takes in of features as the encoder_top gave them."""
        annotations = None
        if self.attention is not None:
            if features.dim() != 3:
                raise DatasetError(
                    f"captioner: attention looks at maps [positions, channels], got vectors of {features.shape[-1]} "
                    "numbers; extract features with pooling none, at a node that is a map"
                )
            annotations = self.attention.embed(self.power_normalize(features))
        if features.dim() == 3:
            features = features.mean(1)
        if self.config.image_input == "none":
            state = features.new_zeros(self.state_count, len(features), self.config.hidden_size)
            return ImageState(features, features, state, None)
        vector = self.transform_features(features)
        image = self.image_projection(vector)
        if self.config.image_input == "initial_state":
            state = image.view(len(image), -1, self.config.hidden_size).transpose(0, 1)
            begun = torch.tanh(state) if self.config.cell == "lstm" else torch.relu(state)
            return ImageState(vector, image, begun, annotations)
        state = image.new_zeros(self.state_count, len(image), self.config.hidden_size)
        if self.config.image_input == "initial_input":
            _, state = recur(self.recurrence, self.dropout, self.dropout(image), [len(image)], state)
        return ImageState(vector, image, state, annotations)

    @property
    def vector_size(self) -> int:
        """Numbers in the vector that an image is projected from: of its features, or of their principal components."""
        return self.feature_size if self.components is None else len(self.components)

    @property
    def state_count(self) -> int:
        """Vectors of `hidden_size` that make up the state: one a layer, two in an LSTM."""
        return self.config.layers * (2 if self.config.cell == "lstm" else 1)


def _between_layers(config: CaptionerConfig) -> float:
    return config.dropout if config.layers > 1 else 0.0
