"""The configuration of decoding: beam search, sampling, constraints and reranking."""

from dataclasses import field
from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from captionlib.config import configclass
from captionlib.errors import ConfigError
from captionlib.models.decoding.rerank import RerankConfig

__all__ = ["DecodingConfig"]

_DEFAULT_MAX_TOKENS = {"words": 20, "characters": 100, "subwords": 40}


@configclass
class DecodingConfig:
    """How to decode captions.

    Attributes:
        strategy: `beam` searches for the most probable sentences, `sample` samples from the model.
        beam_width: hypotheses per image; 1 is greedy decoding.
        n_best: maximum number of candidates returned per image, at most `beam_width`. With `sample`, this many
            sentences are sampled, and duplicates are dropped.
        max_tokens: maximum number of tokens in a sentence (words, characters or subwords, and END); longer sentences
            are truncated. If None, it is 20 words, 100 characters or 40 subwords, but at least `min_words`.
        length_penalty: the beam ranks candidates by log_prob / token_count ** length_penalty; 0 ranks by
            log-probability and favors short sentences.
        rerank: how to rerank the candidates of the beam.
        min_words: minimum number of tokens before END. A shorter sentence ends only if no other token is allowed.
        no_repeat_ngram_size: an n-gram of this size occurs at most once per sentence; 0 allows repetition.
        forbidden_words: words that are never generated. Models of subwords do not support this setting.
        beam_groups: number of equally wide groups for diverse beam search (Vijayakumar et al. 2016, arXiv 1610.02424);
            must divide `beam_width`.
        diversity_penalty: penalty on a word's log-probability for each hypothesis of an earlier group with the same
            word at the same time step (lambda in the paper; 0.2 to 0.8 work well).
        temperature: sampling temperature; below 1 sharpens the distribution, above 1 flattens it.
        top_k: sample from the k most probable words. If None, all words are used.
        top_p: sample from the smallest set of most probable words with at least this total probability (Holtzman et al.
            2020, arXiv 1904.09751), after `temperature` and `top_k`.
        seed: seed for sampling.
    """

    strategy: Literal["beam", "sample"] = "beam"
    beam_width: PositiveInt = 5
    n_best: PositiveInt = 1
    max_tokens: PositiveInt | None = None
    length_penalty: NonNegativeFloat = 0.7
    rerank: RerankConfig = field(default_factory=RerankConfig)
    min_words: NonNegativeInt = 0
    no_repeat_ngram_size: NonNegativeInt = 0
    forbidden_words: tuple[str, ...] = ()
    beam_groups: PositiveInt = 1
    diversity_penalty: NonNegativeFloat = 0.5
    temperature: PositiveFloat = 1.0
    top_k: PositiveInt | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    seed: NonNegativeInt = 0

    def __post_init__(self) -> None:
        if self.max_tokens is not None and self.min_words > self.max_tokens:
            raise ConfigError(
                f"decoding: min_words must be at most max_tokens {self.max_tokens}, got {self.min_words}; "
                "raise max_tokens or lower min_words"
            )
        if self.strategy == "beam":
            self._check_beam()
        elif self.beam_groups > 1:
            raise ConfigError("decoding: beam_groups is for strategy beam, got strategy sample; change one of them")
        elif self.rerank.method != "none":
            raise ConfigError("decoding: rerank is for strategy beam, got strategy sample; change one of them")

    def find_max_tokens(self, unit: str = "words") -> int:
        """Returns `max_tokens`, or its default for a vocabulary of words, characters or subwords."""
        return self.max_tokens or max(_DEFAULT_MAX_TOKENS[unit], self.min_words)

    @property
    def candidate_count(self) -> int:
        """Number of candidates to decode per image: `n_best`, or the number of candidates to rerank."""
        return self.n_best if self.rerank.method == "none" else self.rerank.pool_size or self.beam_width

    def _check_beam(self) -> None:
        if self.n_best > self.beam_width:
            raise ConfigError(
                f"decoding: n_best must be at most beam_width {self.beam_width}, got {self.n_best}; "
                f"widen the beam, or set decoding.n_best to {self.beam_width} or less"
            )
        if self.beam_width % self.beam_groups:
            raise ConfigError(
                f"decoding: beam_width must be a multiple of beam_groups {self.beam_groups}, got {self.beam_width}; "
                "all groups have the same width"
            )
        if self.rerank.method != "none" and self.beam_width == 1:
            raise ConfigError(
                "decoding: rerank compares the candidates of a beam, got beam_width 1; "
                "set beam_width to 20, for example"
            )
        pool_size = self.rerank.pool_size
        if pool_size is not None and not self.n_best <= pool_size <= self.beam_width:
            raise ConfigError(
                f"decoding: expected rerank.pool_size from n_best {self.n_best} to beam_width {self.beam_width}, got "
                f"{pool_size}; leave it out to rerank the whole beam"
            )
        for name, default in (("temperature", 1.0), ("top_k", None), ("top_p", 1.0)):
            if getattr(self, name) != default:
                raise ConfigError(f"decoding: {name} is for strategy sample, got strategy beam; change one of them")
