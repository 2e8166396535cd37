import numpy as np
import pytest
from hypothesis import given, strategies as st

from captionlib.errors import ConfigError, DatasetError
from captionlib.evaluation.retrieval import (
    PROTOCOLS,
    RetrievalProtocol,
    rank_images,
    rank_references,
    score_retrieval,
)

EYE = np.eye(4, dtype=np.float32)


def unit(rows: list[list[float]]) -> np.ndarray:
    vectors = np.array(rows, np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def test_ranks_computed_by_hand() -> None:
    images = unit([[1, 0], [0, 1]])
    # References 0 and 1 describe image 0, and reference 2 describes image 1. Sorted by similarity to image 0, the
    # references are 2, 1, 0; sorted by similarity to image 1, they are 0, 1, 2.
    references = unit([[0.1, 1], [1, 1.1], [1, 0.5]])
    image_of_reference = np.array([0, 0, 1])
    assert rank_references(images, references, image_of_reference).tolist() == [2, 3]
    assert rank_images(images, references, image_of_reference).tolist() == [2, 2, 2]
    scores = score_retrieval(images, references, image_of_reference)
    assert (scores.images, scores.references, scores.folds) == (2, 3, 1)
    assert scores.image_to_text.recall_at_1 == 0
    assert scores.image_to_text.recall_at_5 == 1
    assert scores.image_to_text.median_rank == 2  # 2.5, rounded down
    assert scores.image_to_text.mean_rank == 2.5
    assert scores.text_to_image.mean_rank == 2
    assert scores.mean_recall == pytest.approx(4 / 6)


def test_perfect_ranking_has_recall_1() -> None:
    scores = score_retrieval(EYE, EYE.repeat([1, 3, 2, 5], axis=0), np.repeat(np.arange(4), [1, 3, 2, 5]))
    assert scores.mean_recall == 1
    assert scores.image_to_text.mean_rank == scores.text_to_image.mean_rank == 1


def test_equal_similarities_rank_as_chance() -> None:
    same = np.ones((101, 1), np.float32)
    scores = score_retrieval(same, same, np.arange(101))
    assert scores.image_to_text.median_rank == scores.text_to_image.median_rank == 51


def test_images_without_references_are_ignored() -> None:
    scores = score_retrieval(EYE, EYE[[1, 3]], np.array([1, 3]))
    assert (scores.images, scores.references) == (2, 2)
    assert scores.mean_recall == 1


def test_folds_are_ranked_separately_and_averaged() -> None:
    images = np.concatenate([EYE, EYE, EYE[:1]])
    references = np.concatenate([EYE, EYE[[1, 0, 3, 2]], EYE[:1]])
    scores = score_retrieval(images, references, np.arange(9), RetrievalProtocol(fold_images=4))
    assert (scores.images, scores.folds) == (8, 2)  # the ninth image does not fill a fold
    assert scores.image_to_text.recall_at_1 == 0.5
    with pytest.raises(ConfigError, match="expected at least 1,000 images with references, got 9"):
        score_retrieval(images, references, np.arange(9), PROTOCOLS["coco-1k"])


def test_protocol_uses_the_first_images_and_references() -> None:
    image_of_reference = np.repeat(np.arange(4), 3)
    scores = score_retrieval(
        EYE, EYE[image_of_reference], image_of_reference, RetrievalProtocol(images=3, references_per_image=2)
    )
    assert (scores.images, scores.references) == (3, 6)


def test_no_references_are_rejected() -> None:
    with pytest.raises(DatasetError, match="expected references to rank, got none"):
        score_retrieval(EYE, EYE[:0], np.array([], np.int64))


@given(st.integers(0, 10_000))
def test_ranks_are_positions_in_the_sorted_similarities(seed: int) -> None:
    rng = np.random.default_rng(seed)
    image_of_reference = np.repeat(np.arange(6), rng.integers(1, 4, 6))
    images, references = (
        unit(rng.normal(size=(6, 3)).tolist()),
        unit(rng.normal(size=(len(image_of_reference), 3)).tolist()),
    )
    scores = images @ references.T
    for image, rank in enumerate(rank_references(images, references, image_of_reference)):
        positions = np.flatnonzero(image_of_reference[np.argsort(-scores[image])] == image)
        assert rank == positions[0] + 1
    for reference, rank in enumerate(rank_images(images, references, image_of_reference)):
        assert np.argsort(-scores[:, reference])[rank - 1] == image_of_reference[reference]
