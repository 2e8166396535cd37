"""Beam search over many images at once.

A hypothesis that has reached END is finished: it is kept and not extended, and it leaves its place in the beam, so that
the beam of an image narrows until nothing is left to extend. Only hypotheses that are alive are computed, whichever
image they belong to.

In diverse beam search (Vijayakumar et al. 2016, arXiv 1610.02424) each image has several beams, its groups. All are
computed together; then each group in its turn chooses its words, and a word that the groups before it chose at this
place costs it something in the choice. Log-probabilities remain the model's own.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from captionlib.data.text.vocabulary import END
from captionlib.models.decoding.candidate import Candidate
from captionlib.models.decoding.config import DecodingConfig
from captionlib.models.decoding.constraints import Constraints
from captionlib.models.decoding.incremental import DecoderState, Hypotheses, IncrementalCaptioner

__all__ = ["search_beam"]


class _Beam(NamedTuple):
    """The hypotheses that are alive, group by group, the likeliest of a group first.

    Attributes:
        group: `[rows] int64`, whose beam it is in; ascending. Group g of an image is image * groups + g.
        log_prob: `[rows] float32`, of the words so far.
        words: `[rows, ticks] int64`, START and the words so far.
        state: of the captioner, after all words but the last.
    """

    group: Tensor
    log_prob: Tensor
    words: Tensor
    state: DecoderState


class _Ended(NamedTuple):
    """Hypotheses that came to their end at the same tick.

    Attributes:
        group: `[hypotheses] int64`.
        log_prob: `[hypotheses] float32`.
        words: `[hypotheses, tokens] int64`, END among them where it was reached.
    """

    group: Tensor
    log_prob: Tensor
    words: Tensor


class _Choice(NamedTuple):
    """The continuations chosen for each group, `[groups, width]` each, the best first.

    Attributes:
        log_prob: of all words, -inf where there are fewer continuations.
        row: of the beam that goes on.
        word: that it goes on with.
    """

    log_prob: Tensor
    row: Tensor
    word: Tensor


def search_beam(
    incremental: IncrementalCaptioner, config: DecodingConfig, constraints: Constraints, start: Hypotheses
) -> list[list[Candidate]]:
    """The likeliest sentences for each image, in any order and at least as many as are asked for, if there are.

    Args:
        incremental: the captioner.
        config: how they are searched for.
        constraints: what they may not contain.
        start: the images, and how their sentences begin.
    """
    search = _Search(incremental, config, constraints, start)
    while search.is_alive:
        search.extend()
    return search.candidates()


class _Search:
    """The search for the sentences of a batch of images, a word at a time."""

    def __init__(
        self, incremental: IncrementalCaptioner, config: DecodingConfig, constraints: Constraints, start: Hypotheses
    ) -> None:
        device = incremental.device
        groups = len(start.words) * config.beam_groups
        self._incremental = incremental
        self._config = config
        self._constraints = constraints
        self._images = len(start.words)
        self._width = config.beam_width // config.beam_groups
        self._tokens = start.words.shape[1] - 1  # of the hypotheses so far
        if config.beam_groups > 1:
            start = start.select(torch.arange(self._images, device=device).repeat_interleave(config.beam_groups))
        self._beam = _Beam(torch.arange(groups, device=device), start.log_prob, start.words, start.state)
        self._ended: list[_Ended] = []
        self._places = torch.full((groups, 1), self._width, device=device)
        self._best_scores = torch.full((groups, config.pool_size), -torch.inf, device=device)  # of the ended
        self._ranks = torch.arange(self._width, device=device)

    @property
    def is_alive(self) -> bool:
        return len(self._beam.group) > 0

    def extend(self) -> None:
        """Adds a token to each hypothesis that is alive, and keeps the likeliest."""
        self._tokens += 1
        beam = self._beam
        log_probs, state = self._incremental.step(beam.state, beam.words[:, -1])
        self._constraints.apply(log_probs, beam.words[:, 1:])
        chosen = self._choose(log_probs) if self._config.beam_groups == 1 else self._choose_in_turn(log_probs)
        log_prob, row, word = chosen
        taken = (log_prob > -torch.inf) & (self._ranks < self._places)
        ending = taken & (word == END)
        if self._tokens == self._config.max_tokens:
            ending = taken
        self._end(ending, chosen)
        alive = taken & ~ending
        if self._config.beam_groups == 1:  # what a group gives up would weigh upon the groups after it
            alive &= self._can_improve(log_prob)
        group, rank = alive.nonzero(as_tuple=True)
        rows = row[group, rank]
        words = torch.cat([beam.words[rows], word[group, rank][:, None]], 1)
        self._beam = _Beam(group, log_prob[group, rank], words, state.select(rows))

    def _choose(self, log_probs: Tensor) -> _Choice:
        """The likeliest continuations of each group, from `[rows, vocabulary_size] float32`."""
        log_prob, word = log_probs.topk(min(self._width, log_probs.shape[1]), dim=1)
        log_prob += self._beam.log_prob[:, None]
        best, row, column = _rank(log_prob, self._beam.group, len(self._places), self._width)
        return _Choice(best, row, word[row, column])

    def _choose_in_turn(self, log_probs: Tensor) -> _Choice:
        """The same where a word costs more the more hypotheses of the image's groups before have just chosen it."""
        beam, count = self._beam, self._config.beam_groups
        chosen = _Choice(
            log_probs.new_full((len(self._places), self._width), -torch.inf),
            self._places.new_zeros(len(self._places), self._width),
            self._places.new_zeros(len(self._places), self._width),
        )
        cost = log_probs.new_zeros(self._images, log_probs.shape[1])
        for turn in range(count):
            rows = (beam.group % count == turn).nonzero()[:, 0]
            if not len(rows):
                continue
            image = beam.group[rows] // count
            scores, word = (log_probs[rows] - cost[image]).topk(min(self._width, log_probs.shape[1]), dim=1)
            scores += beam.log_prob[rows, None]
            best, row, column = _rank(scores, image, self._images, self._width)
            word, row = word[row, column], rows[row]
            log_prob = (beam.log_prob[row] + log_probs[row, word]).where(best > -torch.inf, -torch.inf)
            for values, found in zip(chosen, (log_prob, row, word), strict=True):
                values[turn::count] = found
            taken = (best > -torch.inf) & (self._ranks < self._places[turn::count])
            cost.scatter_add_(1, word, self._config.diversity_penalty * taken.float())
        return chosen

    def _end(self, ending: Tensor, chosen: _Choice) -> None:
        """Keeps the hypotheses that end, `[groups, width] bool`, and frees their places in the beam."""
        group, rank = ending.nonzero(as_tuple=True)
        rows, word = chosen.row[group, rank], chosen.word[group, rank]
        words = torch.cat([self._beam.words[rows, 1:], word[:, None]], 1)
        self._ended.append(_Ended(group, chosen.log_prob[group, rank], words))
        self._places = self._places - ending.sum(1, keepdim=True)
        scores = (chosen.log_prob / self._tokens**self._config.length_penalty).where(ending, -torch.inf)
        self._best_scores = torch.cat([self._best_scores, scores], 1).topk(self._config.pool_size, dim=1).values

    def _can_improve(self, log_prob: Tensor) -> Tensor:
        """Which hypotheses could still come among those of their group that are asked for, `[groups, width] bool`.

        The log-probability of a sentence only falls as it grows, so its score is at most this one at full length. What
        cannot improve takes no place from what can: all that is less likely at this length cannot either.
        """
        bound = log_prob / self._config.max_tokens**self._config.length_penalty
        can_improve: Tensor = bound > self._best_scores[:, -1:]
        return can_improve

    def candidates(self) -> list[list[Candidate]]:
        """The hypotheses that have ended, image by image; one that several groups found is told once."""
        found: list[dict[tuple[int, ...], Candidate]] = [{} for _ in range(self._images)]
        for ended in self._ended:
            rows = zip(ended.group.tolist(), ended.log_prob.tolist(), ended.words.tolist(), strict=True)
            for group, log_prob, words in rows:
                cut = words[:-1] if words[-1] == END else words
                candidate = Candidate(cut, log_prob, token_count=len(words))
                found[group // self._config.beam_groups].setdefault(tuple(words), candidate)
        return [list(candidates.values()) for candidates in found]


def _rank(scores: Tensor, group: Tensor, groups: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """The best continuations of each group.

    Args:
        scores: `[rows, columns] float32`, of the continuations of each row.
        group: `[rows] int64`, ascending.
        groups: how many there are.
        width: the most that are wanted of each.

    Returns:
        Score, row and column of each, `[groups, width]`; -inf where there are fewer.
    """
    rows, columns = scores.shape
    first_row = torch.searchsorted(group, torch.arange(groups, device=group.device))
    slot = torch.arange(rows, device=group.device) - first_row[group]
    by_group = scores.new_full((groups, width, columns), -torch.inf)
    by_group[group, slot] = scores
    best, position = by_group.flatten(1).topk(width, dim=1)
    row = first_row[:, None] + position.div(columns, rounding_mode="floor")
    return best, row.clamp(max=rows - 1), position % columns
