from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torchvision.models.feature_extraction import create_feature_extractor

from captionlib.data.images.decoding import decode_image
from captionlib.errors import ConfigError, DecodeError, FetchError
from captionlib.models.encoders.activations import ActivationConfig, compute_activations, find_convolutions
from captionlib.models.encoders.weights import resolve_preprocessing

MODEL = "squeezenet1_1"


@pytest.fixture
def image(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 255, (60, 90, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    return tmp_path / "image.png"


@pytest.fixture(scope="module")
def network() -> torch.nn.Module:
    torch.manual_seed(0)
    model: torch.nn.Module = torchvision.models.get_model(MODEL, weights=None).eval()
    return model


@pytest.fixture
def weights(tmp_path: Path, network: torch.nn.Module) -> Path:
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    return tmp_path / "weights.pth"


@pytest.fixture
def trunk_weights(tmp_path: Path, network: torch.nn.Module) -> Path:
    tensors = {name: tensor for name, tensor in network.state_dict().items() if name.startswith("features")}
    torch.save(tensors, tmp_path / "trunk.pth")
    return tmp_path / "trunk.pth"


def test_find_convolutions_returns_the_activation_after_each_convolution() -> None:
    vgg = find_convolutions(torchvision.models.get_model("vgg16", weights=None).eval())
    assert vgg == [f"features.{number}" for number in (1, 3, 6, 8, 11, 13, 15, 18, 20, 22, 25, 27, 29)]
    resnet = find_convolutions(torchvision.models.get_model("resnet18", weights=None).eval())
    assert resnet[:4] == ["relu", "layer1.0.relu", "layer1.0.bn2", "layer1.1.relu"]
    assert len(resnet) == 20


def test_maps_and_classes_equal_those_of_torchvision(image: Path, weights: Path, network: torch.nn.Module) -> None:
    config = ActivationConfig(MODEL, str(weights), nodes=("features.1", "features.12.cat"))
    activations = compute_activations(image, config)
    preprocessing = resolve_preprocessing(MODEL, "IMAGENET1K_V1")
    np.testing.assert_array_equal(activations.image, decode_image(image.read_bytes(), preprocessing).pixels)
    preset = torchvision.models.get_model_weights(MODEL).DEFAULT.transforms()
    pixels = preset(Image.open(image))[None]
    with torch.inference_mode():
        outputs = create_feature_extractor(network, ["features.1", "features.12.cat"])(pixels)
        probabilities = network(pixels)[0].softmax(0)
    assert [layer.node for layer in activations.layers] == ["features.1", "features.12.cat"]
    for layer in activations.layers:
        np.testing.assert_allclose(layer.maps, outputs[layer.node][0], atol=1e-4)
    top = probabilities.topk(10)
    names = torchvision.models.get_model_weights(MODEL).DEFAULT.meta["categories"]
    assert [name for name, _ in activations.classes] == [names[index] for index in top.indices]
    assert [value for _, value in activations.classes] == pytest.approx(top.values.tolist(), rel=1e-4)
    assert activations.note == ""


def test_weights_without_a_classifier_yield_a_note_instead_of_classes(image: Path, trunk_weights: Path) -> None:
    activations = compute_activations(image, ActivationConfig(MODEL, str(trunk_weights), max_layers=4))
    assert len(activations.layers) == 3  # the fourth convolution is part of the classifier
    assert activations.classes == []
    assert "no classifier: classifier.1.bias and 1 more tensors are missing" in activations.note


def test_random_weights_yield_a_note_instead_of_classes(image: Path) -> None:
    activations = compute_activations(image, ActivationConfig(MODEL, "random:0", nodes=("features.1",)))
    assert activations.classes == []
    assert "weights are random" in activations.note


def test_max_layers_chooses_layers_at_even_intervals(image: Path) -> None:
    activations = compute_activations(image, ActivationConfig(MODEL, "random:0", max_layers=3))
    assert [layer.node for layer in activations.layers] == [
        "features.1",
        "features.7.expand3x3_activation",
        "classifier.2",
    ]


@pytest.mark.parametrize(
    ("nodes", "message"),
    [
        (("features.99",), "has no node 'features.99'; its nodes: x, features.0"),
        (("flatten",), "expected feature maps, got flatten"),
    ],
)
def test_unknown_nodes_and_nodes_without_maps_are_rejected(image: Path, nodes: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        compute_activations(image, ActivationConfig(MODEL, "random:0", nodes=nodes))


def test_weights_that_lack_a_requested_layer_are_rejected(
    image: Path, tmp_path: Path, network: torch.nn.Module
) -> None:
    tensors = {name: tensor for name, tensor in network.state_dict().items() if name.startswith("features.0")}
    torch.save(tensors, tmp_path / "partial.pth")
    with pytest.raises(ConfigError, match=r"partial.pth lack \d+ of the \d+ tensors"):
        compute_activations(image, ActivationConfig(MODEL, str(tmp_path / "partial.pth"), nodes=("features.12.cat",)))


def test_missing_and_undecodable_images_raise_image_errors(tmp_path: Path) -> None:
    config = ActivationConfig(MODEL, "random:0", nodes=("features.1",))
    with pytest.raises(FetchError):
        compute_activations(tmp_path / "missing.jpg", config)
    (tmp_path / "text.jpg").write_text("not an image")
    with pytest.raises(DecodeError):
        compute_activations(tmp_path / "text.jpg", config)
