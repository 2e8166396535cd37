"""Provides training batches of text for language models: whole sentences, or sequences of one continuous text.

All tokens are held in memory. A continuous text is split into sequences at a different random offset in each epoch.
"""

from array import array
from collections.abc import Iterable, Iterator

import numpy as np
import numpy.typing as npt

from captionlib.data.text.vocabulary import PAD
from captionlib.errors import DatasetError

__all__ = ["SentenceBatches", "SequenceBatches", "TextBatches"]

Ids = npt.NDArray[np.int64]


class SentenceBatches:
    """Batches of whole sentences, `[sentences, time steps] int64`, padded with PAD.

    The same seed and epoch give the same batches. After each sentence, the model learns to predict END.

    Args:
        sentences: token ids of each sentence. Empty sentences are skipped. A token takes 4 bytes of memory.
        batch_size: maximum number of sentences per batch.
        max_batch_tokens: maximum number of tokens per batch of `in_order`, including padding. A longer sentence is a
            batch of its own.
    """

    rows_are_sentences = True

    def __init__(self, sentences: Iterable[list[int]], batch_size: int, max_batch_tokens: int) -> None:
        ids, starts = array("i"), array("q", [0])
        for sentence in filter(None, sentences):
            ids.extend(sentence)
            starts.append(len(ids))
        self._ids = np.frombuffer(ids, np.int32)  # [tokens], all sentences concatenated
        self._starts = np.frombuffer(starts, np.int64)  # [sentences + 1]
        self._lengths = np.diff(self._starts)
        self._batch_size = batch_size
        self._max_batch_tokens = max_batch_tokens

    def count(self) -> int:
        """Returns the number of batches that `shuffled` yields; `in_order` may yield more."""
        return -(-len(self._lengths) // self._batch_size)

    def shuffled(self, seed: int, epoch: int) -> Iterator[Ids]:
        order = np.random.default_rng([seed, epoch]).permutation(len(self._lengths))
        for begin in range(0, len(order), self._batch_size):
            yield self._pad(order[begin : begin + self._batch_size])

    def in_order(self) -> Iterator[Ids]:
        """Yields the longest sentences first. Sentences of similar length need little padding."""
        order = np.argsort(-self._lengths, kind="stable")
        begin = 0
        while begin < len(order):
            longest = int(self._lengths[order[begin]])
            size = min(self._batch_size, max(1, self._max_batch_tokens // longest))
            yield self._pad(order[begin : begin + size])
            begin += size

    def _pad(self, sentences: npt.NDArray[np.int64]) -> Ids:
        lengths = self._lengths[sentences]
        batch = np.full((len(sentences), lengths.max()), PAD, np.int64)
        batch[np.arange(batch.shape[1]) < lengths[:, None]] = np.concatenate(
            [self._ids[self._starts[sentence] : self._starts[sentence + 1]] for sentence in sentences]
        )
        return batch


class SequenceBatches:
    """Batches of equally long sequences from one text, `[sequences, time steps] int64`.

    The same seed and epoch give the same batches. A token takes 4 bytes of memory.

    Raises:
        DatasetError: the text is shorter than two sequences.
    """

    rows_are_sentences = False

    def __init__(self, text: Iterable[int], sequence_length: int, batch_size: int) -> None:
        self._ids = np.frombuffer(array("i", text), np.int32)
        if len(self._ids) < 2 * sequence_length:
            raise DatasetError(
                f"expected training and validation texts of at least two sequences of {sequence_length} tokens each, "
                f"got {len(self._ids)} tokens; use a longer text or a smaller sequence_length"
            )
        self._sequence_length = sequence_length
        self._batch_size = batch_size

    def count(self) -> int:
        return -(-(len(self._ids) // self._sequence_length - 1) // self._batch_size)

    def shuffled(self, seed: int, epoch: int) -> Iterator[Ids]:
        generator = np.random.default_rng([seed, epoch])
        offset = int(generator.integers(self._sequence_length))
        sequences = generator.permutation(len(self._ids) // self._sequence_length - 1)
        return self._batches(sequences * self._sequence_length + offset)

    def in_order(self) -> Iterator[Ids]:
        return self._batches(np.arange(len(self._ids) // self._sequence_length) * self._sequence_length)

    def _batches(self, starts: npt.NDArray[np.int64]) -> Iterator[Ids]:
        for begin in range(0, len(starts), self._batch_size):
            positions = starts[begin : begin + self._batch_size, None] + np.arange(self._sequence_length)
            yield self._ids[positions].astype(np.int64)


TextBatches = SentenceBatches | SequenceBatches
