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
from captionlib.models.encoders.encoder import resolve_preprocessing

MODEL = "squeezenet1_1"


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 255, (60, 90, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


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
def trunk(tmp_path: Path, network: torch.nn.Module) -> Path:
    kept = {name: tensor for name, tensor in network.state_dict().items() if name.startswith("features")}
    torch.save(kept, tmp_path / "trunk.pth")
    return tmp_path / "trunk.pth"


def test_the_layers_are_those_after_each_convolution() -> None:
    vgg = find_convolutions(torchvision.models.get_model("vgg16", weights=None).eval())
    assert vgg == [f"features.{number}" for number in (1, 3, 6, 8, 11, 13, 15, 18, 20, 22, 25, 27, 29)]
    resnet = find_convolutions(torchvision.models.get_model("resnet18", weights=None).eval())
    assert resnet[:4] == ["relu", "layer1.0.relu", "layer1.0.bn2", "layer1.1.relu"]
    assert len(resnet) == 20


def test_maps_and_classes_are_the_networks_own(photo: Path, weights: Path, network: torch.nn.Module) -> None:
    config = ActivationConfig(MODEL, str(weights), nodes=("features.1", "features.12.cat"), classes=3)
    found = compute_activations(photo, config)
    preprocessing = resolve_preprocessing(MODEL, "IMAGENET1K_V1")
    np.testing.assert_array_equal(found.image, decode_image(photo.read_bytes(), preprocessing))
    preset = torchvision.models.get_model_weights(MODEL).DEFAULT.transforms()
    pixels = preset(Image.open(photo))[None]
    with torch.inference_mode():
        outputs = create_feature_extractor(network, ["features.1", "features.12.cat"])(pixels)
        probabilities = network(pixels)[0].softmax(0)
    assert [layer.node for layer in found.layers] == ["features.1", "features.12.cat"]
    for layer in found.layers:
        np.testing.assert_allclose(layer.maps, outputs[layer.node][0], atol=1e-4)
    top = probabilities.topk(3)
    names = torchvision.models.get_model_weights(MODEL).DEFAULT.meta["categories"]
    assert [name for name, _ in found.classes] == [names[index] for index in top.indices]
    assert [value for _, value in found.classes] == pytest.approx(top.values.tolist(), rel=1e-4)
    assert found.note == ""


def test_weights_without_a_classifier_say_so(photo: Path, trunk: Path) -> None:
    found = compute_activations(photo, ActivationConfig(MODEL, str(trunk), max_layers=4))
    assert len(found.layers) == 3  # the fourth convolution is the classifier's own
    assert found.classes == []
    assert "no classifier (they lack classifier.1.bias and 1 more)" in found.note


def test_random_weights_name_no_classes(photo: Path) -> None:
    found = compute_activations(photo, ActivationConfig(MODEL, "random:0", nodes=("features.1",)))
    assert found.classes == []
    assert "drawn at random" in found.note


def test_layers_are_taken_evenly_where_there_are_many(photo: Path) -> None:
    found = compute_activations(photo, ActivationConfig(MODEL, "random:0", max_layers=3))
    assert [layer.node for layer in found.layers] == ["features.1", "features.7.expand3x3_activation", "classifier.2"]


@pytest.mark.parametrize(
    ("nodes", "message"),
    [(("features.99",), "has no node 'features.99'; it has x, features.0"), (("flatten",), "no channel maps")],
)
def test_nodes_that_cannot_be_shown_are_refused(photo: Path, nodes: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        compute_activations(photo, ActivationConfig(MODEL, "random:0", nodes=nodes))


def test_weights_that_lack_a_shown_layer_are_refused(photo: Path, tmp_path: Path, network: torch.nn.Module) -> None:
    kept = {name: tensor for name, tensor in network.state_dict().items() if name.startswith("features.0")}
    torch.save(kept, tmp_path / "few.pth")
    with pytest.raises(ConfigError, match=r"few.pth lack \d+ of the \d+ tensors"):
        compute_activations(photo, ActivationConfig(MODEL, str(tmp_path / "few.pth"), nodes=("features.12.cat",)))


def test_an_image_that_cannot_be_had_is_told(tmp_path: Path) -> None:
    config = ActivationConfig(MODEL, "random:0", nodes=("features.1",))
    with pytest.raises(FetchError):
        compute_activations(tmp_path / "nowhere.jpg", config)
    (tmp_path / "text.jpg").write_text("no image")
    with pytest.raises(DecodeError):
        compute_activations(tmp_path / "text.jpg", config)
