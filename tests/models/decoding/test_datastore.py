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

REFERENCES = pa.list_(pa.list_(pa.int32()))


def build_datastore(vectors: list[list[float]], references: list[list[list[int]]]) -> Datastore:
    ids = [f"image {number}" for number in range(len(vectors))]
    return Datastore(ids, np.array(vectors, np.float32), pa.array(references, REFERENCES))


FOUR = build_datastore([[1, 0], [0, 1], [-1, 0], [0, -1]], [[[2]], [[3], [4]], [[5]], [[6]]])  # the mean is 0


def test_neighbor_weight_is_split_among_its_references() -> None:
    (neighbors,) = FOUR.find_neighbors(np.array([[1, 0.9]], np.float32), 2)
    of_first = 1 / (1 + np.exp(-(1 - 0.9) / np.hypot(1, 0.9) / 0.06))  # softmax of two cosines
    by_reference = dict(zip(map(tuple, neighbors.references), neighbors.weights, strict=True))
    assert by_reference == pytest.approx({(2,): of_first, (3,): (1 - of_first) / 2, (4,): (1 - of_first) / 2})


def test_image_is_not_its_own_neighbor() -> None:
    image = np.array([[1, 0]], np.float32)
    assert FOUR.find_neighbors(image, 1)[0].references == [[2]]
    assert FOUR.find_neighbors(image, 1, ["another"])[0].references == [[2]]
    assert FOUR.find_neighbors(image, 1, ["image 0"])[0].references in ([[3], [4]], [[6]])


def test_neighbors_are_limited_to_datastore_size() -> None:
    (neighbors,) = FOUR.find_neighbors(np.array([[1, 0]], np.float32), 9)
    assert sorted(neighbors.references) == [[2], [3], [4], [5], [6]]
    assert neighbors.weights.sum() == pytest.approx(1)


def test_similarity_standardizes_dimensions() -> None:
    # The first dimension is large and hardly varies; the second separates the images.
    datastore = build_datastore([[1000, 1], [1001, 1], [1000, -1], [1001, -1]], [[[2]], [[3]], [[4]], [[5]]])
    (neighbors,) = datastore.find_neighbors(np.array([[1000.5, 2]], np.float32), 2)
    assert sorted(neighbors.references) == [[2], [3]]


def test_constant_dimension_and_zero_vector_give_finite_weights() -> None:
    datastore = build_datastore([[1, 5], [-1, 5]], [[[2]], [[3]]])
    for neighbors in datastore.find_neighbors(np.array([[0, 5], [1, 5]], np.float32), 2):
        assert np.isfinite(neighbors.weights).all()


@pytest.mark.parametrize("config", [CONFIGS[0], CONFIGS[4]])
def test_reranking_depends_on_neighbors_and_not_on_batch(config: CaptionerConfig) -> None:
    model, images = build(config, seed=3), features(6, seed=3)
    with torch.inference_mode():
        vectors = model.encode_images(features(20, seed=4)).features.numpy()
    references = [[[2 + number % 7, 2 + number % 5, 2 + number % 3]] for number in range(20)]
    datastore = Datastore([str(number) for number in range(20)], vectors, pa.array(references, REFERENCES))
    decoding = DecodingConfig(
        beam_width=8, n_best=8, rerank=RerankConfig("mbr", temperature=5.0, neighbors=4), max_tokens=6
    )
    decoder = Decoder(model, decoding, datastore=datastore)
    together = decoder.decode(images)
    alone = [decoder.decode(image[None])[0] for image in images]
    assert [[one.token_ids for one in some] for some in together] == [[one.token_ids for one in some] for some in alone]
    without_neighbors = Decoder(model, replace(decoding, rerank=RerankConfig("mbr", temperature=5.0))).decode(images)
    assert together != without_neighbors
    for some, others in zip(together, without_neighbors, strict=True):
        assert sorted(one.token_ids for one in some) == sorted(one.token_ids for one in others)


def test_decoder_rejects_neighbors_without_datastore() -> None:
    with pytest.raises(ConfigError, match=r"rerank\.neighbors 4 needs the captioner's datastore, got none"):
        Decoder(build(CONFIGS[0], seed=0), DecodingConfig(rerank=RerankConfig("mbr", neighbors=4)))
