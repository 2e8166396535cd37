import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from captionlib.errors import ConfigError, DatasetError
from captionlib.evaluation.retrieval import (
    PROTOCOLS,
    RankingProtocol,
    rank_images,
    rank_sentences,
    score_ranking,
)

EYE = np.eye(4, dtype=np.float32)


def unit(rows: list[list[float]]) -> np.ndarray:
    vectors = np.array(rows, np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def test_ranks_are_counted_by_hand() -> None:
    images = unit([[1, 0], [0, 1]])
    # Of image 0: one beside image 1, one in between; of image 1: one nearer to image 0 than that one in between.
    sentences = unit([[0.1, 1], [1, 1.1], [1, 0.5]])
    owners = np.array([0, 0, 1])
    assert rank_sentences(images, sentences, owners).tolist() == [2, 3]
    assert rank_images(images, sentences, owners).tolist() == [2, 2, 2]
    scores = score_ranking(images, sentences, owners)
    assert (scores.images, scores.sentences, scores.folds) == (2, 3, 1)
    assert scores.image_to_sentence.recall_at_1 == 0
    assert scores.image_to_sentence.recall_at_5 == 1
    assert scores.image_to_sentence.median_rank == 2  # 2.5, rounded down
    assert scores.image_to_sentence.mean_rank == 2.5
    assert scores.sentence_to_image.mean_rank == 2
    assert scores.mean_recall == pytest.approx(4 / 6)


def test_the_right_order_is_perfect() -> None:
    scores = score_ranking(EYE, EYE.repeat([1, 3, 2, 5], axis=0), np.repeat(np.arange(4), [1, 3, 2, 5]))
    assert scores.mean_recall == 1
    assert scores.image_to_sentence.mean_rank == scores.sentence_to_image.mean_rank == 1


def test_a_model_that_finds_all_alike_ranks_as_chance() -> None:
    same = np.ones((101, 1), np.float32)
    scores = score_ranking(same, same, np.arange(101))
    assert scores.image_to_sentence.median_rank == scores.sentence_to_image.median_rank == 51


def test_images_without_sentences_are_left_out() -> None:
    scores = score_ranking(EYE, EYE[[1, 3]], np.array([1, 3]))
    assert (scores.images, scores.sentences) == (2, 2)
    assert scores.mean_recall == 1


def test_folds_are_ranked_alone_and_averaged() -> None:
    images = np.concatenate([EYE, EYE, EYE[:1]])
    sentences = np.concatenate([EYE, EYE[[1, 0, 3, 2]], EYE[:1]])
    scores = score_ranking(images, sentences, np.arange(9), RankingProtocol(fold_images=4))
    assert (scores.images, scores.folds) == (8, 2)  # the ninth fills no fold
    assert scores.image_to_sentence.recall_at_1 == 0.5
    with pytest.raises(ConfigError, match="expected at least 1,000 images with sentences, got 9"):
        score_ranking(images, sentences, np.arange(9), PROTOCOLS["coco-1k"])


def test_a_protocol_takes_the_first_images_and_sentences() -> None:
    owners = np.repeat(np.arange(4), 3)
    scores = score_ranking(EYE, EYE[owners], owners, RankingProtocol(images=3, sentences=2))
    assert (scores.images, scores.sentences) == (3, 6)


def test_no_sentences_is_an_error() -> None:
    with pytest.raises(DatasetError, match="expected sentences to rank, got none"):
        score_ranking(EYE, EYE[:0], np.array([], np.int64))


@given(st.integers(0, 10_000))
def test_ranks_are_places_in_the_sorted_scores(seed: int) -> None:
    draw = np.random.default_rng(seed)
    owners = np.repeat(np.arange(6), draw.integers(1, 4, 6))
    images, sentences = unit(draw.normal(size=(6, 3)).tolist()), unit(draw.normal(size=(len(owners), 3)).tolist())
    scores = images @ sentences.T
    for image, rank in enumerate(rank_sentences(images, sentences, owners)):
        places = np.flatnonzero(owners[np.argsort(-scores[image])] == image)
        assert rank == places[0] + 1
    for sentence, rank in enumerate(rank_images(images, sentences, owners)):
        assert np.argsort(-scores[:, sentence])[rank - 1] == owners[sentence]
