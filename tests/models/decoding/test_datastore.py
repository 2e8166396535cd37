from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch

from captionlib.errors import ConfigError
from captionlib.models.captioners.captioner import CaptionerConfig
from captionlib.models.decoding.config import DecodingConfig
from captionlib.models.decoding.datastore import Datastore
from captionlib.models.decoding.decoder import Decoder
from captionlib.models.decoding.rerank import RerankConfig
from tests.models.tiny_captioners import CONFIGS, build, features

WORDS = pa.list_(pa.list_(pa.int32()))


def memory(vectors: list[list[float]], sentences: list[list[list[int]]]) -> Datastore:
    ids = [f"image {number}" for number in range(len(vectors))]
    return Datastore(ids, np.array(vectors, np.float32), pa.array(sentences, WORDS), "its own")


FOUR = memory([[1, 0], [0, 1], [-1, 0], [0, -1]], [[[2]], [[3], [4]], [[5]], [[6]]])  # already of mean 0


def test_the_most_alike_count_most_whatever_the_number_of_their_sentences() -> None:
    (said,) = FOUR.find_neighbors(np.array([[1, 0.9]], np.float32), 2)
    of_first = 1 / (1 + np.exp(-(1 - 0.9) / np.hypot(1, 0.9) / 0.06))  # of the softmax of two cosines
    by_sentence = dict(zip(map(tuple, said.references), said.weights, strict=True))
    assert by_sentence == pytest.approx({(2,): of_first, (3,): (1 - of_first) / 2, (4,): (1 - of_first) / 2})


def test_an_image_is_no_neighbour_of_its_own() -> None:
    image = np.array([[1, 0]], np.float32)
    assert FOUR.find_neighbors(image, 1)[0].references == [[2]]
    assert FOUR.find_neighbors(image, 1, ["another"])[0].references == [[2]]
    assert FOUR.find_neighbors(image, 1, ["image 0"])[0].references in ([[3], [4]], [[6]])


def test_there_are_no_more_neighbours_than_images() -> None:
    (said,) = FOUR.find_neighbors(np.array([[1, 0]], np.float32), 9)
    assert sorted(said.references) == [[2], [3], [4], [5], [6]]
    assert said.weights.sum() == pytest.approx(1)


def test_numbers_are_compared_by_how_they_vary() -> None:
    # The first number is large and hardly varies; only by the second are the images told apart.
    some = memory([[1000, 1], [1001, 1], [1000, -1], [1001, -1]], [[[2]], [[3]], [[4]], [[5]]])
    (said,) = some.find_neighbors(np.array([[1000.5, 2]], np.float32), 2)
    assert sorted(said.references) == [[2], [3]]


def test_a_number_that_never_varies_and_an_image_like_none_do_no_harm() -> None:
    some = memory([[1, 5], [-1, 5]], [[[2]], [[3]]])
    for said in some.find_neighbors(np.array([[0, 5], [1, 5]], np.float32), 2):
        assert np.isfinite(said.weights).all()


@pytest.mark.parametrize("config", [CONFIGS[0], CONFIGS[4]])
def test_batch_mates_change_no_choice_and_neighbours_do(config: CaptionerConfig) -> None:
    model, images = build(config, seed=3), features(6, seed=3)
    with torch.inference_mode():
        vectors = model.encode_images(features(20, seed=4)).features.numpy()
    sentences = [[[2 + number % 7, 2 + number % 5, 2 + number % 3]] for number in range(20)]
    remembered = Datastore([str(number) for number in range(20)], vectors, pa.array(sentences, WORDS), "its own")
    decoding = DecodingConfig(
        beam_width=8, n_best=8, rerank=RerankConfig("mbr", temperature=5.0, neighbors=4), max_tokens=6
    )
    decoder = Decoder(model, decoding, datastore=remembered)
    together = decoder.decode(images)
    alone = [decoder.decode(image[None])[0] for image in images]
    assert [[one.token_ids for one in some] for some in together] == [[one.token_ids for one in some] for some in alone]
    without = Decoder(model, replace(decoding, rerank=RerankConfig("mbr", temperature=5.0))).decode(images)
    assert together != without
    for some, others in zip(together, without, strict=True):
        assert sorted(one.token_ids for one in some) == sorted(one.token_ids for one in others)


def test_neighbours_need_a_memory() -> None:
    with pytest.raises(ConfigError, match=r"rerank\.neighbors 4 need the captioner's datastore, got none"):
        Decoder(build(CONFIGS[0], seed=0), DecodingConfig(rerank=RerankConfig("mbr", neighbors=4)))
