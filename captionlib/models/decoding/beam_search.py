"""Beam search over many images at once.

A hypothesis that reaches END is finished: it is stored, is not extended, and frees its place in the beam. The beam of
an image narrows until nothing is left to extend. A step computes the unfinished hypotheses of all images together.

In diverse beam search (Vijayakumar et al. 2016, arXiv 1610.02424) each image has several groups of hypotheses. All
groups are computed together; then they choose their words in turn, and a word costs more the more hypotheses of earlier
groups chose it at this time step. Log-probabilities remain those of the model.
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
    """The continuations that each group chose, `[groups, width]` each, the best first.

    Attributes:
        log_prob: of all words; -inf if there are fewer continuations.
        row: the hypothesis that is extended.
        word: the word that extends it.
    """

    log_prob: Tensor
    row: Tensor
    word: Tensor


def search_beam(
    incremental: IncrementalCaptioner, config: DecodingConfig, constraints: Constraints, start: Hypotheses
) -> list[list[Candidate]]:
    """Searches for the most probable sentences of each image, from one hypothesis per image.

    Returns:
        At least `config.pool_size` candidates per image if there are as many, in no particular order.
    """
    search = _BeamSearch(incremental, config, constraints, start)
    while search.is_alive:
        search.extend()
    return search.candidates()


class _BeamSearch:
    """The search for the sentences of a batch of images; `extend` adds a word.

    Group g of an image is number image * beam_groups + g. The hypotheses of a group stand together, the best first.
    """

    def __init__(
        self, incremental: IncrementalCaptioner, config: DecodingConfig, constraints: Constraints, start: Hypotheses
    ) -> None:
        device = incremental.device
        self._incremental = incremental
        self._config = config
        self._constraints = constraints
        self._images = len(start.words)
        self._width = config.beam_width // config.beam_groups
        self._tokens = start.words.shape[1] - 1  # of each hypothesis so far
        if config.beam_groups > 1:
            start = start.select(torch.arange(self._images, device=device).repeat_interleave(config.beam_groups))
        groups = len(start.words)
        self._beam = start
        self._group = torch.arange(groups, device=device)  # of each hypothesis; ascending
        # Groups, log-probabilities, and words (END included) of the hypotheses that finished at each time step.
        self._finished: list[tuple[Tensor, Tensor, Tensor]] = []
        self._free = torch.full((groups, 1), self._width, device=device)  # places of unfinished hypotheses
        self._best_scores = torch.full((groups, config.pool_size), -torch.inf, device=device)  # of finished ones
        self._ranks = torch.arange(self._width, device=device)

    @property
    def is_alive(self) -> bool:
        return len(self._group) > 0

    def extend(self) -> None:
        """Extends each hypothesis by a word, and keeps the most probable continuations."""
        self._tokens += 1
        beam = self._beam
        log_probs, state = self._incremental.step(beam.state, beam.words[:, -1])
        self._constraints.apply(log_probs, beam.words[:, 1:])
        is_diverse = self._config.beam_groups > 1
        chosen = self._choose_diverse(log_probs) if is_diverse else self._choose(log_probs)
        log_prob, row, word = chosen
        selected = (log_prob > -torch.inf) & (self._ranks < self._free)
        finishing = selected & (word == END)
        if self._tokens == self._config.max_tokens:
            finishing = selected
        self._finish(finishing, chosen)
        alive = selected & ~finishing
        if not is_diverse:  # pruning would change the penalties of the groups that follow
            alive &= self._can_improve(log_prob)
        self._group, rank = alive.nonzero(as_tuple=True)
        rows = row[self._group, rank]
        words = torch.cat([beam.words[rows], word[self._group, rank][:, None]], 1)
        self._beam = Hypotheses(log_prob[self._group, rank], words, state.select(rows))

    def candidates(self) -> list[list[Candidate]]:
        """Returns the finished hypotheses of each image; those that several groups found are listed once."""
        per_image: list[dict[tuple[int, ...], Candidate]] = [{} for _ in range(self._images)]
        for finished in self._finished:
            for group, log_prob, words in zip(*(values.tolist() for values in finished), strict=True):
                token_ids = words[:-1] if words[-1] == END else words
                candidate = Candidate(token_ids, log_prob, token_count=len(words))
                per_image[group // self._config.beam_groups].setdefault(tuple(words), candidate)
        return [list(candidates.values()) for candidates in per_image]

    def _choose(self, log_probs: Tensor) -> _Continuations:
        """Chooses the most probable continuations of each group, from `[rows, vocabulary_size] float32`."""
        log_prob, word = log_probs.topk(min(self._width, log_probs.shape[1]), dim=1)
        log_prob += self._beam.log_prob[:, None]
        best, row, column = _top_continuations(log_prob, self._group, len(self._free), self._width)
        return _Continuations(best, row, word[row, column])

    def _choose_diverse(self, log_probs: Tensor) -> _Continuations:
        """Chooses as `_choose` does, group by group, with a penalty on the words of the earlier groups of the image."""
        group_log_prob, groups = self._beam.log_prob, self._config.beam_groups
        chosen = _Continuations(
            log_probs.new_full((len(self._free), self._width), -torch.inf),
            self._free.new_zeros(len(self._free), self._width),
            self._free.new_zeros(len(self._free), self._width),
        )
        penalty = log_probs.new_zeros(self._images, log_probs.shape[1])
        for turn in range(groups):
            rows = (self._group % groups == turn).nonzero()[:, 0]
            if not len(rows):
                continue
            image = self._group[rows] // groups
            scores, word = (log_probs[rows] - penalty[image]).topk(min(self._width, log_probs.shape[1]), dim=1)
            scores += group_log_prob[rows, None]
            best, row, column = _top_continuations(scores, image, self._images, self._width)
            word, row = word[row, column], rows[row]
            log_prob = (group_log_prob[row] + log_probs[row, word]).where(best > -torch.inf, -torch.inf)
            for values, of_turn in zip(chosen, (log_prob, row, word), strict=True):
                values[turn::groups] = of_turn
            selected = (best > -torch.inf) & (self._ranks < self._free[turn::groups])
            penalty.scatter_add_(1, word, self._config.diversity_penalty * selected.float())
        return chosen

    def _finish(self, finishing: Tensor, chosen: _Continuations) -> None:
        """Stores the hypotheses that finish, `[groups, width] bool`, and frees their places."""
        group, rank = finishing.nonzero(as_tuple=True)
        rows, word = chosen.row[group, rank], chosen.word[group, rank]
        words = torch.cat([self._beam.words[rows, 1:], word[:, None]], 1)
        self._finished.append((group, chosen.log_prob[group, rank], words))
        self._free = self._free - finishing.sum(1, keepdim=True)
        scores = (chosen.log_prob / self._tokens**self._config.length_penalty).where(finishing, -torch.inf)
        self._best_scores = torch.cat([self._best_scores, scores], 1).topk(self._config.pool_size, dim=1).values

    def _can_improve(self, log_prob: Tensor) -> Tensor:
        """Returns which hypotheses can still enter the pool of their group, `[groups, width] bool`.

        A log-probability only falls as the sentence grows, so its score is at most that of today's log-probability at
        the maximum length. All hypotheses of this length that are less probable are pruned too, so pruning one frees no
        place for another.
        """
        bound = log_prob / self._config.max_tokens**self._config.length_penalty
        can_improve: Tensor = bound > self._best_scores[:, -1:]
        return can_improve


def _top_continuations(scores: Tensor, group: Tensor, groups: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Finds the `width` best continuations of each group.

    `scores` is `[rows, columns] float32`, and `group` is `[rows] int64` in ascending order.

    Returns:
        Score, row and column of each, `[groups, width]`; the score is -inf if there are fewer.
    """
    rows, columns = scores.shape
    first_row = torch.searchsorted(group, torch.arange(groups, device=group.device))
    slot = torch.arange(rows, device=group.device) - first_row[group]
    by_group = scores.new_full((groups, width, columns), -torch.inf)
    by_group[group, slot] = scores
    best, position = by_group.flatten(1).topk(width, dim=1)
    row = first_row[:, None] + position.div(columns, rounding_mode="floor")
    return best, row.clamp(max=rows - 1), position % columns
