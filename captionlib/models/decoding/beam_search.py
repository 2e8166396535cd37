"""Beam search over many images at once.

A hypothesis that reaches END is stored and no longer extended, so the beam of its image becomes narrower. The search
ends when no hypothesis is left to extend.

In diverse beam search (Vijayakumar et al. 2016, arXiv 1610.02424) the beam of an image is divided into groups, which
choose their words one after another at each time step. A word is penalized once for each hypothesis of earlier groups
that chose it. The reported log-probabilities do not include the penalty.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from captionlib.data.text.vocabulary import END
from captionlib.models.decoding.config import DecodingConfig
from captionlib.models.decoding.constraints import Constraints
from captionlib.models.decoding.incremental import Candidate, Hypotheses, IncrementalCaptioner

__all__ = ["search_beam"]


class _Continuations(NamedTuple):
    """The continuations that each group chose, best first. All tensors are `[groups, width]`."""

    log_prob: Tensor  # -inf if a group has fewer than `width` continuations
    row: Tensor  # of the extended hypothesis in the batch
    word: Tensor


def search_beam(
    captioner: IncrementalCaptioner, config: DecodingConfig, constraints: Constraints, start: Hypotheses
) -> list[list[Candidate]]:
    """Searches for the most probable sentences of each image, starting from one hypothesis per image.

    Returns:
        At least `config.candidate_count` candidates per image, or all if there are fewer, in any order.
    """
    search = _BeamSearch(captioner, config, constraints, start)
    while search.is_running:
        search.extend()
    return search.candidates()


class _BeamSearch:
    """The state of the search for a batch of images.

    Group g of an image has the number image * beam_groups + g. The hypotheses of a group are adjacent, best first.
    """

    def __init__(
        self, captioner: IncrementalCaptioner, config: DecodingConfig, constraints: Constraints, start: Hypotheses
    ) -> None:
        device = captioner.device
        self._captioner = captioner
        self._config = config
        self._constraints = constraints
        self._images = len(start.words)
        self._width = config.beam_width // config.beam_groups
        self._max_tokens = config.find_max_tokens()
        self._length = start.words.shape[1] - 1  # tokens in each hypothesis so far
        if config.beam_groups > 1:
            start = start.select(torch.arange(self._images, device=device).repeat_interleave(config.beam_groups))
        groups = len(start.words)
        self._beam = start
        self._group = torch.arange(groups, device=device)  # group number of each hypothesis, ascending
        # Groups, log-probabilities, and words (END included) of the hypotheses that finished at each time step.
        self._finished: list[tuple[Tensor, Tensor, Tensor]] = []
        self._max_unfinished = torch.full((groups, 1), self._width, device=device)  # hypotheses of each group
        self._best_scores = torch.full((groups, config.candidate_count), -torch.inf, device=device)  # of finished ones
        self._ranks = torch.arange(self._width, device=device)

    @property
    def is_running(self) -> bool:
        return len(self._group) > 0

    def extend(self) -> None:
        """Extends each hypothesis by one word, and keeps the most probable continuations."""
        self._length += 1
        beam = self._beam
        log_probs, state = self._captioner.step(beam.state, beam.words[:, -1])
        self._constraints.apply(log_probs, beam.words[:, 1:])
        is_diverse = self._config.beam_groups > 1
        chosen = self._choose_diverse(log_probs) if is_diverse else self._choose(log_probs)
        log_prob, row, word = chosen
        selected = (log_prob > -torch.inf) & (self._ranks < self._max_unfinished)
        finishing = selected & (word == END)
        if self._length == self._max_tokens:
            finishing = selected
        self._finish(finishing, chosen)
        unfinished = selected & ~finishing
        if not is_diverse:  # pruning would change the penalties of later groups
            unfinished &= self._can_improve(log_prob)
        self._group, rank = unfinished.nonzero(as_tuple=True)
        rows = row[self._group, rank]
        words = torch.cat([beam.words[rows], word[self._group, rank][:, None]], 1)
        self._beam = Hypotheses(log_prob[self._group, rank], words, state.select(rows))

    def candidates(self) -> list[list[Candidate]]:
        per_image: list[dict[tuple[int, ...], Candidate]] = [{} for _ in range(self._images)]
        for finished in self._finished:
            for group, log_prob, words in zip(*(values.tolist() for values in finished), strict=True):
                token_ids = words[:-1] if words[-1] == END else words
                candidate = Candidate(token_ids, log_prob, token_count=len(words))
                per_image[group // self._config.beam_groups].setdefault(tuple(words), candidate)
        return [list(candidates.values()) for candidates in per_image]

    def _choose(self, log_probs: Tensor) -> _Continuations:
        log_prob, word = log_probs.topk(min(self._width, log_probs.shape[1]), dim=1)
        log_prob += self._beam.log_prob[:, None]
        best, row, column = _top_continuations(log_prob, self._group, len(self._max_unfinished), self._width)
        return _Continuations(best, row, word[row, column])

    def _choose_diverse(self, log_probs: Tensor) -> _Continuations:
        beam_log_prob, groups = self._beam.log_prob, self._config.beam_groups
        chosen = _Continuations(
            log_probs.new_full((len(self._max_unfinished), self._width), -torch.inf),
            self._max_unfinished.new_zeros(len(self._max_unfinished), self._width),
            self._max_unfinished.new_zeros(len(self._max_unfinished), self._width),
        )
        penalty = log_probs.new_zeros(self._images, log_probs.shape[1])
        for index in range(groups):
            rows = (self._group % groups == index).nonzero()[:, 0]
            if not len(rows):
                continue
            image = self._group[rows] // groups
            scores, word = (log_probs[rows] - penalty[image]).topk(min(self._width, log_probs.shape[1]), dim=1)
            scores += beam_log_prob[rows, None]
            best, row, column = _top_continuations(scores, image, self._images, self._width)
            word, row = word[row, column], rows[row]
            log_prob = (beam_log_prob[row] + log_probs[row, word]).where(best > -torch.inf, -torch.inf)
            for values, group_values in zip(chosen, (log_prob, row, word), strict=True):
                values[index::groups] = group_values
            selected = (best > -torch.inf) & (self._ranks < self._max_unfinished[index::groups])
            penalty.scatter_add_(1, word, self._config.diversity_penalty * selected.float())
        return chosen

    def _finish(self, finishing: Tensor, chosen: _Continuations) -> None:
        group, rank = finishing.nonzero(as_tuple=True)
        rows, word = chosen.row[group, rank], chosen.word[group, rank]
        words = torch.cat([self._beam.words[rows, 1:], word[:, None]], 1)
        self._finished.append((group, chosen.log_prob[group, rank], words))
        self._max_unfinished = self._max_unfinished - finishing.sum(1, keepdim=True)
        scores = (chosen.log_prob / self._length**self._config.length_penalty).where(finishing, -torch.inf)
        self._best_scores = torch.cat([self._best_scores, scores], 1).topk(self._config.candidate_count, dim=1).values

    def _can_improve(self, log_prob: Tensor) -> Tensor:
        """Returns whether each hypothesis can still be among the `candidate_count` best of its group."""
        # Log-probabilities only decrease as a sentence grows.
        bound = log_prob / self._max_tokens**self._config.length_penalty
        can_improve: Tensor = bound > self._best_scores[:, -1:]
        return can_improve


def _top_continuations(scores: Tensor, group: Tensor, groups: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns score, row and column of the `width` best continuations of each group, padded with scores of -inf.

    Each column of `scores` is a word that may extend the hypothesis of a row. `group` must be sorted.
    """
    rows, columns = scores.shape
    first_row = torch.searchsorted(group, torch.arange(groups, device=group.device))
    rank = torch.arange(rows, device=group.device) - first_row[group]  # of each row within its group
    by_group = scores.new_full((groups, width, columns), -torch.inf)
    by_group[group, rank] = scores
    best, position = by_group.flatten(1).topk(width, dim=1)
    row = first_row[:, None] + position.div(columns, rounding_mode="floor")
    return best, row.clamp(max=rows - 1), position % columns
