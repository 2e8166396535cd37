import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torchvision
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

from captionlib.models.encoders.network import truncate_network
from captionlib.models.encoders.vgg import VGG_URLS, VGG_WEIGHTS, truncate_vgg
from captionlib.models.encoders.weights import hash_weights, resolve_preprocessing, sample_weights

NODES = [
    "features.0",
    "features.7",
    "features.20",
    "avgpool",
    "flatten",
    "classifier.1",
    "classifier.5",
    "classifier.6",
]


@pytest.mark.parametrize("name", VGG_URLS)
def test_layers_equal_those_of_torchvision(name: str) -> None:
    with torch.device("meta"):
        whole = torchvision.models.get_model(name, weights=None, init_weights=False).eval()
        images = torch.empty(2, 3, 224, 224)
        for node in NODES:
            ours, theirs = truncate_vgg(name, node), create_feature_extractor(whole, {node: "features"})
            assert ours is not None
            assert ours(images)["features"].shape == theirs(images)["features"].shape
            shapes, expected = (
                {key: value.shape for key, value in each.state_dict().items()} for each in (ours, theirs)
            )
            assert shapes == expected
        assert get_graph_node_names(whole)[1][-1] == NODES[-1]


@pytest.mark.parametrize("node", ["features.9", "flatten"])
def test_features_and_sampled_weights_equal_those_of_torchvision(node: str) -> None:
    ours = truncate_network("vgg11_bn", node)
    theirs = create_feature_extractor(torchvision.models.vgg11_bn(weights=None, init_weights=False).eval(), [node])
    assert hash_weights(sample_weights(ours, "random:3")) == hash_weights(sample_weights(theirs, "random:3"))
    images = torch.rand(1, 3, 64, 64)
    with torch.inference_mode():
        torch.testing.assert_close(ours(images)["features"], theirs(images)[node], rtol=0, atol=0)


def test_urls_and_preprocessing_equal_those_of_torchvision() -> None:
    assert VGG_URLS.keys() == set(torchvision.models.list_models(include="vgg*"))
    for name, url in VGG_URLS.items():
        entries = torchvision.models.get_model_weights(name)
        assert entries[VGG_WEIGHTS].url == url
        assert entries.DEFAULT.name == VGG_WEIGHTS
        preset = entries[VGG_WEIGHTS].transforms()
        for weights in (VGG_WEIGHTS, "random:0", "own.pth"):
            preprocessing = resolve_preprocessing(name, weights)
            assert [preprocessing.resize_size] == preset.resize_size
            assert [preprocessing.crop_size] == preset.crop_size
            assert preprocessing.interpolation == preset.interpolation.value
            assert (list(preprocessing.mean), list(preprocessing.std)) == (preset.mean, preset.std)
    assert resolve_preprocessing("vgg16", "IMAGENET1K_FEATURES").std == (1 / 255,) * 3


def test_networks_are_built_without_slow_imports(tmp_path: Path) -> None:
    code = """
import sys, torch
from captionlib.models.captioners.captioner import CaptionerConfig, CaptionerNetwork
from captionlib.models.encoders.encoder import EncoderConfig, load_encoder
from captionlib.models.rankers.ranker import RankerConfig, RankerNetwork

with torch.device("meta"):
    for cell, weight_init in (("lstm", "pytorch"), ("rnn", "neuraltalk"), ("transformer", "neuraltalk")):
        CaptionerNetwork(CaptionerConfig(cell=cell, weight_init=weight_init), 8, 20)
    RankerNetwork(RankerConfig(), 8, 20)
load_encoder(EncoderConfig("vgg11", "features.0", sys.argv[1]), "cpu")
print([name for name in ("torchvision", "torch._dynamo", "sympy") if name in sys.modules])
"""
    weights = tmp_path / "weights.pth"
    torch.save({"features.0.weight": torch.zeros(64, 3, 3, 3), "features.0.bias": torch.zeros(64)}, weights)
    command = [sys.executable, "-c", code, str(weights)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (result.stdout, result.stderr) == ("[]\n", "")
