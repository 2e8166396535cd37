"""Writes sentences: beam search over many images at once.

A hypothesis that has reached END is finished: it is kept and not extended, and it leaves its place in the beam, so that
the beam of an image narrows until nothing is left to extend. Only hypotheses that are alive are computed, whichever
image they belong to.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from captionlib.data.vocabulary import END, UNKNOWN
from captionlib.errors import ConfigError, DatasetError
from captionlib.models.captioner import Captioner
from captionlib.models.stepping import State, Stepper

__all__ = ["Candidate", "Decoder", "DecodingConfig"]


@dataclass(frozen=True)
class DecodingConfig:
    """How sentences are searched for.

    Attributes:
        beam_width: hypotheses an image; 1 is greedy decoding.
        n_best: candidates returned for an image, at most `beam_width`.
        max_tokens: words of a sentence, END among them; longer ones are cut off. NeuralTalk's is 20.
        length_normalisation: candidates are ordered by log_prob / tokens ** it; 0 orders by log-probability and
            favours short sentences.
    """

    beam_width: int = 5
    n_best: int = 1
    max_tokens: int = 20
    length_normalisation: float = 0.7

    def __post_init__(self) -> None:
        for name in ("beam_width", "n_best", "max_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"decoding: {name} must be at least 1, got {getattr(self, name)}")
        if self.n_best > self.beam_width:
            raise ConfigError(
                f"decoding: n_best must be at most the beam's width {self.beam_width}, got {self.n_best}; "
                "widen the beam or ask for fewer"
            )
        if self.length_normalisation < 0:
            raise ConfigError(f"decoding: length_normalisation must not be negative, got {self.length_normalisation}")


@dataclass(frozen=True)
class Candidate:
    """A sentence for an image.

    Attributes:
        words: ids, without START and END.
        log_prob: ln p(sentence | image): the sum over its tokens, whatever `length_normalisation`.
        tokens: words and END; without END where the sentence was cut off at `max_tokens`.
    """

    words: list[int]
    log_prob: float
    tokens: int


class _Beam(NamedTuple):
    """The hypotheses that are alive, image by image, the likeliest of an image first.

    Attributes:
        image: `[rows] int64`, whose sentence it is; ascending.
        log_prob: `[rows] float32`, of the words so far.
        words: `[rows, ticks] int64`, START and the words so far.
        state: of the captioner, after all words but the last.
    """

    image: Tensor
    log_prob: Tensor
    words: Tensor
    state: State


class _Ended(NamedTuple):
    """Hypotheses that came to their end at the same tick.

    Attributes:
        image: `[hypotheses] int64`.
        log_prob: `[hypotheses] float32`.
        words: `[hypotheses, tokens] int64`, END among them where it was reached.
    """

    image: Tensor
    log_prob: Tensor
    words: Tensor


class Decoder:
    """Writes sentences for images with a snapshot of a captioner. After a change of the weights make a new one.

    Args:
        model: the captioner; decoding runs on its device.
        config: how sentences are searched for.
        dtype: what the captioner computes in, float32 or bfloat16; probabilities are summed in float32.
    """

    def __init__(
        self, model: Captioner, config: DecodingConfig | None = None, dtype: torch.dtype = torch.float32
    ) -> None:
        self.config = config or DecodingConfig()
        self._stepper = Stepper(model, dtype)

    @torch.inference_mode()
    def decode(self, features: Tensor | npt.NDArray[np.float32]) -> list[list[Candidate]]:
        """The likeliest sentences for each image, the best first.

        UNKNOWN is never written; its probability is not given to others, so log-probabilities remain the model's own.

        Args:
            features: `[images, feature_size]`, as the encoder gave them; 100 images are a good batch.

        Returns:
            For each image one to `n_best` candidates, all different.

        Raises:
            DatasetError: features are infinite or no numbers, as after an overflow of float16.
        """
        features = torch.as_tensor(features)
        finite = features.isfinite().all(1)
        if not finite.all():
            rows = ", ".join(map(str, (~finite).nonzero()[:5, 0].tolist()))
            raise DatasetError(
                f"features: expected finite numbers, got others in row {rows} of the batch; extract anew"
            )
        search = _Search(self._stepper, self.config, features)
        while search.is_alive:
            search.extend()
        return search.candidates()


class _Search:
    """The search for the sentences of a batch of images, a word at a time."""

    def __init__(self, stepper: Stepper, config: DecodingConfig, features: Tensor) -> None:
        device = stepper.device
        self._stepper = stepper
        self._config = config
        self._images = len(features)
        self._tokens = 0  # of the hypotheses so far
        self._beam = _Beam(
            image=torch.arange(self._images, device=device),
            log_prob=torch.zeros(self._images, device=device),
            words=torch.full((self._images, 1), END, device=device),
            state=stepper.start(features),
        )
        self._ended: list[_Ended] = []
        self._places = torch.full((self._images, 1), config.beam_width, device=device)
        self._best_scores = torch.full((self._images, config.n_best), -torch.inf, device=device)  # of the ended
        self._ranks = torch.arange(config.beam_width, device=device)

    @property
    def is_alive(self) -> bool:
        return len(self._beam.image) > 0

    def extend(self) -> None:
        """Adds a token to each hypothesis that is alive, and keeps the likeliest."""
        self._tokens += 1
        beam = self._beam
        log_probs, state = self._stepper.step(beam.state, beam.words[:, -1])
        log_probs[:, UNKNOWN] = -torch.inf
        width = min(self._config.beam_width, log_probs.shape[1])
        log_prob, word = log_probs.topk(width, dim=1)  # [rows, width]
        log_prob += beam.log_prob[:, None]
        log_prob, row, column = self._rank(log_prob)  # [images, beam_width]
        word = word[row, column]

        taken = (log_prob > -torch.inf) & (self._ranks < self._places)
        ending = taken & (word == END)
        if self._tokens == self._config.max_tokens:
            ending = taken
        self._end(ending, log_prob, row, word)
        alive = taken & ~ending & self._can_improve(taken & ~ending, log_prob)
        image, rank = alive.nonzero(as_tuple=True)
        rows = row[image, rank]
        words = torch.cat([beam.words[rows], word[image, rank][:, None]], 1)
        self._beam = _Beam(image, log_prob[image, rank], words, state.select(rows))

    def _rank(self, log_prob: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The likeliest continuations of each image.

        Args:
            log_prob: `[rows, width] float32`, of the continuations of each row of the beam.

        Returns:
            Log-probability, row and column of each, `[images, beam_width]`; -inf where there are fewer.
        """
        image, (rows, width), beam_width = self._beam.image, log_prob.shape, self._config.beam_width
        first_row = torch.searchsorted(image, torch.arange(self._images, device=image.device))
        slot = torch.arange(rows, device=image.device) - first_row[image]
        by_image = log_prob.new_full((self._images, beam_width, width), -torch.inf)
        by_image[image, slot] = log_prob
        best, position = by_image.flatten(1).topk(beam_width, dim=1)
        row = first_row[:, None] + position.div(width, rounding_mode="floor")
        return best, row.clamp(max=rows - 1), position % width

    def _end(self, ending: Tensor, log_prob: Tensor, row: Tensor, word: Tensor) -> None:
        """Keeps the hypotheses that end, `[images, beam_width]` each, and frees their places in the beam."""
        image, rank = ending.nonzero(as_tuple=True)
        words = torch.cat([self._beam.words[row[image, rank], 1:], word[image, rank][:, None]], 1)
        self._ended.append(_Ended(image, log_prob[image, rank], words))
        self._places = self._places - ending.sum(1, keepdim=True)
        scores = (log_prob / self._tokens**self._config.length_normalisation).where(ending, -torch.inf)
        self._best_scores = torch.cat([self._best_scores, scores], 1).topk(self._config.n_best, dim=1).values

    def _can_improve(self, alive: Tensor, log_prob: Tensor) -> Tensor:
        """Whether an image's likeliest hypothesis could still come among its n best, `[images, 1] bool`.

        The log-probability of a sentence only falls as it grows, so its score is at most this one at full length.
        """
        likeliest = log_prob.where(alive, -torch.inf).amax(1, keepdim=True)
        bound = likeliest / self._config.max_tokens**self._config.length_normalisation
        can_improve: Tensor = bound > self._best_scores[:, -1:]
        return can_improve

    def candidates(self) -> list[list[Candidate]]:
        """The best of the hypotheses that have ended, image by image."""
        found: list[list[Candidate]] = [[] for _ in range(self._images)]
        for ended in self._ended:
            rows = zip(ended.image.tolist(), ended.log_prob.tolist(), ended.words.tolist(), strict=True)
            for image, log_prob, words in rows:
                cut = words[:-1] if words[-1] == END else words
                found[image].append(Candidate(cut, log_prob, tokens=len(words)))
        exponent = self._config.length_normalisation
        for candidates in found:
            candidates.sort(key=lambda candidate: candidate.log_prob / candidate.tokens**exponent, reverse=True)
        return [candidates[: self._config.n_best] for candidates in found]
