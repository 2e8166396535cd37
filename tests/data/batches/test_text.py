import numpy as np
import pytest
from hypothesis import given, strategies as st

from captionlib.data.batches.text import SentenceBatches, SequenceBatches
from captionlib.data.text.vocabulary import PAD
from captionlib.errors import DatasetError


def unpad(batches: list[np.ndarray]) -> list[list[int]]:
    return [[token for token in row if token != PAD] for batch in batches for row in batch.tolist()]


@given(st.lists(st.lists(st.integers(1, 9), max_size=4), min_size=1), st.integers(1, 5), st.integers(0, 3))
def test_epoch_has_each_sentence_once(sentences: list[list[int]], size: int, epoch: int) -> None:
    batches = SentenceBatches(sentences, size, size * 3)
    nonempty = [sentence for sentence in sentences if sentence]
    assert unpad(list(batches.in_order())) == sorted(nonempty, key=len, reverse=True)
    shuffled = list(batches.shuffled(0, epoch))
    assert sorted(unpad(shuffled)) == sorted(nonempty)
    assert len(shuffled) == batches.count()
    assert all(len(batch) <= size for batch in shuffled)


def test_long_sentence_is_a_batch_of_its_own() -> None:
    sentences = [[1] * length for length in (3, 5000, 7, *[2] * 250, 120)]
    batches = list(SentenceBatches(sentences, batch_size=100, max_batch_tokens=1000).in_order())
    assert [batch.shape for batch in batches] == [(1, 5000), (8, 120), (100, 2), (100, 2), (45, 2)]
    assert sorted(unpad(batches)) == sorted(sentences)


def test_order_depends_only_on_seed_and_epoch() -> None:
    for batches in (SentenceBatches([[number] for number in range(1, 50)], 10, 10), SequenceBatches(range(500), 7, 10)):
        orders = [np.concatenate(list(batches.shuffled(*which))).tolist() for which in ((0, 0), (0, 0), (0, 1), (1, 0))]
        assert orders[0] == orders[1]
        assert orders[0] != orders[2]
        assert orders[0] != orders[3]


@given(st.integers(10, 100), st.integers(1, 5), st.integers(1, 4), st.integers(0, 9))
def test_sequences_cover_the_text_without_overlap(length: int, sequence_length: int, size: int, epoch: int) -> None:
    batches = SequenceBatches(range(length), sequence_length, size)
    epoch_batches = list(batches.shuffled(0, epoch))
    rows = sorted(np.concatenate(epoch_batches).tolist())
    assert len(epoch_batches) == batches.count()
    assert [token for row in rows for token in row] == list(range(rows[0][0], rows[-1][-1] + 1))
    assert len(rows) == length // sequence_length - 1
    everything = np.concatenate(list(batches.in_order()))
    assert everything.ravel().tolist() == list(range(length // sequence_length * sequence_length))


def test_sequences_start_at_a_new_offset_in_each_epoch() -> None:
    batches = SequenceBatches(range(200), 20, 4)
    firsts = {int(np.concatenate(list(batches.shuffled(0, epoch))).min()) for epoch in range(10)}
    assert len(firsts) > 4
    assert firsts <= set(range(20))


def test_rejects_text_shorter_than_two_sequences() -> None:
    with pytest.raises(DatasetError, match=r"at least two sequences of 10 tokens .* got 19 tokens"):
        SequenceBatches(range(19), 10, 4)
