"""Training batches of text alone: sentences of any length, or windows of one running text.

The state is not carried from window to window: each is read from the first state, as a sample is written from it. So
windows can be mixed, and a run that was stopped goes on from any batch with nothing to remember but the weights. The
first characters of a window have less before them, which costs the less the longer it is; and in every epoch windows
begin elsewhere, so that no cut comes twice.
"""

from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from captionlib.data.text.vocabulary import PAD
from captionlib.errors import DatasetError

__all__ = ["SentenceBatches", "SequenceBatches", "TextBatches"]

Ids = npt.NDArray[np.int64]


class TextBatches(Protocol):
    """Batches of word ids, `[sentences, ticks] int64`, then `PAD`."""

    @property
    def sentences_end(self) -> bool:
        """Whether END comes after each row, or the text goes on."""

    def count(self) -> int:
        """About how many batches an epoch has."""

    def epoch(self, seed: int, epoch: int) -> Iterator[Ids]:
        """All of the text once, mixed by `seed` and `epoch`."""

    def in_order(self) -> Iterator[Ids]:
        """All of the text once, as it was written."""


@dataclass(frozen=True)
class _Tokens:
    """Sentences end to end.

    Attributes:
        ids: `[tokens] int32`.
        starts: `[sentences + 1] int64`, where each begins, and where the last ends.
    """

    ids: npt.NDArray[np.int32]
    starts: npt.NDArray[np.int64]


class SentenceBatches:
    """Batches of whole sentences; the same seed and epoch give the same batches.

    Args:
        sentences: word ids of each; empty ones are left out. Held in memory, 4 bytes a token.
        size: sentences a batch.
    """

    sentences_end = True

    def __init__(self, sentences: Iterable[list[int]], size: int) -> None:
        self._tokens = _concatenate(sentences)
        self._size = size

    def count(self) -> int:
        return -(-(len(self._tokens.starts) - 1) // self._size)

    def epoch(self, seed: int, epoch: int) -> Iterator[Ids]:
        return self._batches(np.random.default_rng([seed, epoch]).permutation(len(self._tokens.starts) - 1))

    def in_order(self) -> Iterator[Ids]:
        return self._batches(np.arange(len(self._tokens.starts) - 1))

    def _batches(self, order: npt.NDArray[np.int64]) -> Iterator[Ids]:
        ids, starts = self._tokens.ids, self._tokens.starts
        for begin in range(0, len(order), self._size):
            chosen = order[begin : begin + self._size]
            lengths = starts[chosen + 1] - starts[chosen]
            batch = np.full((len(chosen), lengths.max()), PAD, np.int64)
            batch[np.arange(batch.shape[1]) < lengths[:, None]] = np.concatenate(
                [ids[starts[number] : starts[number + 1]] for number in chosen]
            )
            yield batch


class SequenceBatches:
    """Batches of windows of one text, all of the same length; the same seed and epoch give the same batches.

    Args:
        text: word or character ids. Held in memory, 4 bytes a token.
        window: tokens of a window; what is left of the text after the last is left out.
        size: windows a batch.

    Raises:
        DatasetError: the text is shorter than two windows.
    """

    sentences_end = False

    def __init__(self, text: Iterable[int], window: int, size: int) -> None:
        self._ids = np.frombuffer(array("i", text), np.int32)
        if len(self._ids) < 2 * window:
            raise DatasetError(
                f"expected a text of at least two windows of {window} tokens, to learn from as well as held out, got "
                f"one of {len(self._ids)}; give a longer text, or a smaller window"
            )
        self._window = window
        self._size = size

    def count(self) -> int:
        return -(-(len(self._ids) // self._window - 1) // self._size)

    def epoch(self, seed: int, epoch: int) -> Iterator[Ids]:
        order = np.random.default_rng([seed, epoch])
        first = int(order.integers(self._window))
        return self._batches(order.permutation(len(self._ids) // self._window - 1) * self._window + first)

    def in_order(self) -> Iterator[Ids]:
        return self._batches(np.arange(len(self._ids) // self._window) * self._window)

    def _batches(self, starts: npt.NDArray[np.int64]) -> Iterator[Ids]:
        for begin in range(0, len(starts), self._size):
            places = starts[begin : begin + self._size, None] + np.arange(self._window)
            yield self._ids[places].astype(np.int64)


def _concatenate(sentences: Iterable[list[int]]) -> _Tokens:
    ids, starts = array("i"), array("q", [0])
    for sentence in sentences:
        if sentence:
            ids.extend(sentence)
            starts.append(len(ids))
    return _Tokens(np.frombuffer(ids, np.int32), np.frombuffer(starts, np.int64))
