import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from captionlib.data.batches.text import SentenceBatches, SequenceBatches
from captionlib.data.text.vocabulary import PAD
from captionlib.errors import DatasetError


def unpad(batches: list[np.ndarray]) -> list[list[int]]:
    return [[token for token in row if token != PAD] for batch in batches for row in batch.tolist()]


@given(st.lists(st.lists(st.integers(1, 9), max_size=4), min_size=1), st.integers(1, 5), st.integers(0, 3))
def test_every_sentence_comes_once_an_epoch(sentences: list[list[int]], size: int, epoch: int) -> None:
    batches = SentenceBatches(sentences, size)
    real = [sentence for sentence in sentences if sentence]
    assert unpad(list(batches.in_order())) == real
    mixed = list(batches.epoch(0, epoch))
    assert sorted(unpad(mixed)) == sorted(real)
    assert len(mixed) == batches.count()
    assert all(len(batch) <= size for batch in mixed)


def test_the_seed_and_the_epoch_decide_the_order() -> None:
    for batches in (SentenceBatches([[number] for number in range(1, 50)], 10), SequenceBatches(range(500), 7, 10)):
        orders = [np.concatenate(list(batches.epoch(*which))).tolist() for which in ((0, 0), (0, 0), (0, 1), (1, 0))]
        assert orders[0] == orders[1]
        assert orders[0] != orders[2]
        assert orders[0] != orders[3]


@given(st.integers(10, 100), st.integers(1, 5), st.integers(1, 4), st.integers(0, 9))
def test_windows_are_pieces_of_the_text_that_do_not_overlap(length: int, window: int, size: int, epoch: int) -> None:
    batches = SequenceBatches(range(length), window, size)
    epoch_batches = list(batches.epoch(0, epoch))
    rows = sorted(np.concatenate(epoch_batches).tolist())
    assert len(epoch_batches) == batches.count()
    assert [token for row in rows for token in row] == list(range(rows[0][0], rows[-1][-1] + 1))
    assert len(rows) == length // window - 1
    everything = np.concatenate(list(batches.in_order()))
    assert everything.ravel().tolist() == list(range(length // window * window))


def test_windows_begin_elsewhere_in_every_epoch() -> None:
    batches = SequenceBatches(range(200), 20, 4)
    firsts = {int(np.concatenate(list(batches.epoch(0, epoch))).min()) for epoch in range(10)}
    assert len(firsts) > 4
    assert firsts <= set(range(20))


def test_a_text_shorter_than_two_windows_is_refused() -> None:
    with pytest.raises(DatasetError, match=r"at least two windows of 10 tokens, .* got one of 19"):
        SequenceBatches(range(19), 10, 4)
