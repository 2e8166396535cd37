import math

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from pycocoevalcap.cider.cider import Cider

from captionlib.errors import DatasetError
from captionlib.models.decoding.cider_d import CiderD

sentences = st.lists(st.integers(0, 4), max_size=9)
nonempty = st.lists(st.integers(0, 4), min_size=1, max_size=9)
images = st.tuples(st.lists(nonempty, min_size=1, max_size=4), sentences)


@settings(max_examples=50, deadline=None)
@given(st.lists(images, min_size=2, max_size=6))
def test_score_equals_pycocoevalcap(corpus: list[tuple[list[list[int]], list[int]]]) -> None:
    cider = CiderD(references for references, _ in corpus)
    scores = [cider.score([sentence], references)[0] for references, sentence in corpus]
    _, expected = Cider().compute_score(
        {number: list(map(to_text, references)) for number, (references, _) in enumerate(corpus)},
        {number: [to_text(sentence)] for number, (_, sentence) in enumerate(corpus)},
    )
    np.testing.assert_allclose(scores, expected, atol=1e-9)


def to_text(sentence: list[int]) -> str:
    return " ".join(map(str, sentence))


def test_score_matches_hand_computed_values() -> None:
    cider = CiderD([[[2, 3]], [[4]]])
    # Every n-gram occurs in one image, so all weights are equal. Of four cosines, two are 1, or one is 1 / sqrt(2).
    one_of_two = 10 / 4 * math.sqrt(0.5) * math.exp(-1 / 72)
    assert cider.score([[2, 3], [2], [5], []], [[2, 3]]) == pytest.approx([10 / 4 * 2, one_of_two, 0, 0])


def test_single_training_image_is_rejected() -> None:
    with pytest.raises(DatasetError, match="expected at least two training images, got 1"):
        CiderD([[[2, 3]]])
