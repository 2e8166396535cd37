"""The language model: a captioner without an image."""

from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from captionlib.config import configclass
from captionlib.models.captioners.captioner import CaptionerConfig, CaptionerNetwork

__all__ = ["LanguageModelConfig", "build_language_model"]


@configclass
class LanguageModelConfig:
    """The architecture of a language model: the fields of `CaptionerConfig` that do not concern images.

    Attributes:
        cell: type of the layers: `lstm`, `rnn` with ReLU units, or `transformer`.
        layers: number of layers.
        hidden_size: dimensions of a layer's hidden state.
        embedding_size: dimensions of a token embedding; a Transformer requires `embedding_size` = `hidden_size`.
        heads: number of attention heads of a Transformer, which must divide `hidden_size`.
        dropout: dropout probability of the inputs and outputs of each layer.
        tie_embeddings: use the embeddings as the softmax weights; requires `embedding_size` = `hidden_size`.
    """

    cell: Literal["lstm", "rnn", "transformer"] = "lstm"
    layers: Annotated[int, Field(ge=1, le=100)] = 1
    hidden_size: PositiveInt = 512
    embedding_size: PositiveInt = 512
    heads: PositiveInt = 8
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.5
    tie_embeddings: bool = False

    def __post_init__(self) -> None:
        self.to_captioner_config()

    def to_captioner_config(self) -> CaptionerConfig:
        """Returns the configuration of the equivalent captioner. Raises ConfigError if fields contradict each other."""
        return CaptionerConfig(**vars(self), image_input="none", standardize_features=False)


def build_language_model(config: LanguageModelConfig, vocabulary_size: int) -> CaptionerNetwork:
    return CaptionerNetwork(config.to_captioner_config(), 0, vocabulary_size)
