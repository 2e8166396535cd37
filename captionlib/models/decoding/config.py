"""What may be asked of decoding, and what it gives."""

from dataclasses import dataclass
from typing import Literal

from captionlib.errors import ConfigError

__all__ = ["Candidate", "DecodingConfig"]


@dataclass(frozen=True)
class DecodingConfig:
    """How sentences are searched for, or drawn.

    Attributes:
        strategy: `beam` searches for the likeliest sentences, `sample` draws them as the model finds them likely.
        beam_width: hypotheses an image; 1 is greedy decoding.
        n_best: candidates returned for an image: at most `beam_width`; or the sentences drawn, of which equal ones are
            returned once.
        max_tokens: words of a sentence, END among them; longer ones are cut off. NeuralTalk's is 20.
        length_penalty: candidates are found and ordered by log_prob / tokens ** it; 0 orders by log-probability
            and favours short sentences.
        consensus: above 0, what comes first is the candidate of the beam that the others agree with most, each counting
            as p ** (1 / consensus) (minimum Bayes risk, see consensus.py); 3 did well with a beam of 30. 0 takes the
            likeliest.
        candidates: with `consensus`, how many of the beam's best it is among; None is all.
        neighbors: with `consensus`, how many of the training images that are most like the image have a say as well,
            by what people said of them; the captioner must remember them (`captionlib build-datastore`). 60 did well, and with
            them a `consensus` of 4 to 8 and as wide a beam as there is time for.
        specificity: with `consensus`, how much it counts that a candidate is likelier here than for the average image
            that the captioner learned from (see consensus.py); 0.02 did well.
        min_words: no sentence ends with fewer, unless nothing else may be written.
        no_repeat_ngram: so many words in a row come once in a sentence at the most; 0 lets all be repeated.
        forbidden_words: never written.
        beam_groups: parts of equal width that the beam is cut into: diverse beam search (Vijayakumar et al. 2016, arXiv
            1610.02424).
        diversity: what a word loses in log-probability for each hypothesis of the groups before that writes it at the
            same place (the paper's lambda; 0.2 to 0.8 did well).
        temperature: of drawing: p ** (1 / temperature), brought to sum 1; below 1 favours what is likely.
        top_k: drawing is among so many of the likeliest words; None is all.
        top_p: drawing is among the likeliest words that together have this probability (Holtzman et al. 2020, arXiv
            1904.09751), after temperature and `top_k`.
        seed: of drawing.
    """

    strategy: Literal["beam", "sample"] = "beam"
    beam_width: int = 5
    n_best: int = 1
    max_tokens: int = 20
    length_penalty: float = 0.7
    consensus: float = 0.0
    candidates: int | None = None
    neighbors: int = 0
    specificity: float = 0.0
    min_words: int = 0
    no_repeat_ngram: int = 0
    forbidden_words: tuple[str, ...] = ()
    beam_groups: int = 1
    diversity: float = 0.5
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("beam_width", "n_best", "max_tokens", "beam_groups"):
            if getattr(self, name) < 1:
                raise ConfigError(f"decoding: {name} must be at least 1, got {getattr(self, name)}")
        for name in (
            "length_penalty",
            "consensus",
            "neighbors",
            "specificity",
            "min_words",
            "no_repeat_ngram",
            "diversity",
            "seed",
        ):
            if getattr(self, name) < 0:
                raise ConfigError(f"decoding: {name} must not be negative, got {getattr(self, name)}")
        for name in ("candidates", "neighbors", "specificity"):
            if getattr(self, name) and not self.consensus:
                raise ConfigError(
                    f"decoding: {name} {getattr(self, name)} has a say where there is a consensus, got consensus 0; "
                    "set it too, such as to 6"
                )
        if self.min_words > self.max_tokens:
            raise ConfigError(
                f"decoding: min_words must be at most max_tokens {self.max_tokens}, got {self.min_words}; "
                "allow longer sentences or ask for fewer words"
            )
        if self.strategy == "beam":
            self._check_beam()
        else:
            self._check_drawing()

    @property
    def pool(self) -> int:
        """How many candidates are found for an image, among which the first are chosen."""
        return (self.candidates or self.beam_width) if self.consensus else self.n_best

    def _check_beam(self) -> None:
        if self.n_best > self.beam_width:
            raise ConfigError(
                f"decoding: n_best must be at most the beam's width {self.beam_width}, got {self.n_best}; "
                f"widen the beam, or set decoding.n_best to {self.beam_width} or less"
            )
        if self.beam_width % self.beam_groups:
            raise ConfigError(
                f"decoding: expected a beam_width that beam_groups divides, got {self.beam_width} and "
                f"{self.beam_groups}; each group has the same part of the beam"
            )
        if self.consensus and self.beam_width == 1:
            raise ConfigError(
                "decoding: consensus is among the candidates of a beam, got beam_width 1; widen it, such as to 20"
            )
        if self.candidates is not None and not self.n_best <= self.candidates <= self.beam_width:
            raise ConfigError(
                f"decoding: expected candidates from n_best {self.n_best} to beam_width {self.beam_width}, got "
                f"{self.candidates}; leave it out to take the whole beam"
            )
        for name, default in (("temperature", 1.0), ("top_k", None), ("top_p", 1.0)):
            if getattr(self, name) != default:
                raise ConfigError(f"decoding: {name} is for strategy sample, got strategy beam; set both, or neither")

    def _check_drawing(self) -> None:
        if self.beam_groups > 1:
            raise ConfigError("decoding: beam_groups is for strategy beam, got strategy sample; set one of the two")
        if self.consensus:
            raise ConfigError("decoding: consensus is for strategy beam, got strategy sample; set one of the two")
        if not self.temperature > 0:
            raise ConfigError(f"decoding: temperature must be above 0, got {self.temperature}; greedy is beam_width 1")
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"decoding: top_k must be at least 1, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"decoding: top_p must be above 0 and at most 1, got {self.top_p}")


@dataclass(frozen=True)
class Candidate:
    """A sentence for an image.

    Attributes:
        words: ids, without START and END.
        log_prob: ln p(sentence | image): the sum over its tokens, whatever the strategy and `length_penalty`.
        tokens: words and END; without END where the sentence was cut off at `max_tokens`.
    """

    words: list[int]
    log_prob: float
    tokens: int
