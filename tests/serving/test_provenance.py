from typing import Any

import pytest

from captionlib.serving.provenance import describe_provenance, make_attention

ENCODER = {
    "preprocessing": {"resize_size": 256, "crop_size": 224, "interpolation": "bilinear", "mean": [0], "std": [1]}
}
WEIGHTS = [[1.0, 0.0, 0.0, 0.5]]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, {}),
        ({"encoder": {"model": "/private/clip/"}}, {"Encoder": "clip"}),
        ({"encoder": {"model": "vgg16", "node": "fc7"}}, {"Encoder": "vgg16, fc7"}),
        ({"captioner": "a" * 20, "ranker": "b" * 20}, {"Captioner": "a" * 12, "Ranker": "b" * 12}),
        ({"decoding": {"strategy": "beam", "beam_width": 5}}, {"Decoding": "beam, width 5"}),
        ({"decoding": {"strategy": "sample", "beam_width": 5}}, {"Decoding": "sample"}),
        ({"decoding": {"strategy": "beam", "rerank": {"method": "mbr"}}}, {"Decoding": "beam", "Reranking": "mbr"}),
        ({"decoding": {"rerank": {"method": "none"}}}, {}),
    ],
)
def test_models_and_settings_are_described_without_paths(config: dict[str, Any], expected: dict[str, str]) -> None:
    assert describe_provenance(config) == expected


@pytest.mark.parametrize(
    ("stretch", "crop"), [(False, [0.28125, 0.0625, 0.4375, 0.875]), (True, [0.0625, 0.0625, 0.875, 0.875])]
)
def test_maps_cover_the_crop_of_the_encoder(stretch: bool, crop: list[float]) -> None:
    encoder = {"preprocessing": {**ENCODER["preprocessing"], "stretch": stretch}}
    attention = make_attention(WEIGHTS, {"encoder": encoder}, {"width": 200, "height": 100})
    assert attention is not None
    assert list(attention.crop) == crop
    assert attention.maps == ["/wAAgA=="]


@pytest.mark.parametrize(
    ("weights", "encoder", "size"),
    [
        (None, ENCODER, (200, 100)),
        ([[1.0, 0.0, 0.5]], ENCODER, (200, 100)),
        (WEIGHTS, {}, (200, 100)),
        (None, {"model": "pixels", "preprocessing": {"max_size": 1000}}, (200, 100)),
        (WEIGHTS, ENCODER, (None, 100)),
        (WEIGHTS, ENCODER, (200, None)),
    ],
)
def test_maps_need_a_square_a_preprocessing_and_a_size(weights: Any, encoder: Any, size: Any) -> None:
    assert make_attention(weights, {"encoder": encoder}, dict(zip(("width", "height"), size, strict=True))) is None
