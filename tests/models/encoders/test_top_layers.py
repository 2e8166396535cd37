import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor

from captionlib.errors import CheckpointError, ConfigError
from captionlib.models.encoders.encoder import EncoderConfig, load_encoder
from captionlib.models.encoders.network import slice_network
from captionlib.models.encoders.top_layers import EncoderTop

BEFORE = EncoderConfig("squeezenet1_1", "features.2", "random:0", stored_dtype="float32", resize_size=224)
NODE = "features.4.cat"
WHOLE = dataclasses.replace(BEFORE, node=NODE)
IMAGES = np.random.default_rng(0).integers(0, 256, (2, 224, 224, 3), np.uint8)


def load(encoder: dict[str, Any], node: str = NODE, weights: str | None = None) -> EncoderTop:
    encoder_top = EncoderTop(encoder, node)
    encoder_top.load_weights(weights)
    return encoder_top


def save_weights(path: Path, encoder: EncoderConfig = WHOLE, offset: float = 0.0, omit: str = "none") -> str:
    weights = load_encoder(encoder, "cpu").network.export_weights()
    tensors = {name: tensor + offset for name, tensor in weights.items() if omit not in name}
    safetensors.torch.save_file(tensors, path)
    return str(path)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_output_equals_that_of_the_whole_encoder(dtype: Any) -> None:
    before, whole = (load_encoder(dataclasses.replace(config, dtype=dtype), "cpu") for config in (BEFORE, WHOLE))
    encoder_top = load(before.description)
    assert encoder_top.shape == whole.shape
    output = encoder_top(torch.from_numpy(before.encode(IMAGES)))
    assert output.dtype == torch.float32
    tolerance = 1e-5 if dtype == "float32" else 0.02
    expected = whole.encode(IMAGES)
    np.testing.assert_allclose(output.detach().numpy(), expected, atol=tolerance * np.abs(expected).max())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_allocates_no_memory_on_the_meta_device(dtype: Any) -> None:
    encoder = load_encoder(dataclasses.replace(BEFORE, dtype=dtype), "cpu")
    with torch.device("meta"):
        encoder_top = EncoderTop(encoder.description, NODE)
    assert encoder_top.shape == EncoderTop(encoder.description, NODE).shape
    assert all(parameter.is_meta for parameter in encoder_top.parameters())


def test_accepts_crops_of_a_map() -> None:
    encoder = load_encoder(BEFORE, "cpu")
    encoder_top = load(encoder.description)
    maps = torch.from_numpy(encoder.encode(IMAGES)).view(2, 55, 55, -1)
    crop = encoder_top(maps[:, 10:30, 20:40].reshape(2, 400, -1)).view(2, 20, 20, -1)
    whole = encoder_top(maps.flatten(1, 2)).view(2, 55, 55, -1)
    torch.testing.assert_close(crop[:, 3:-3, 3:-3], whole[:, 13:27, 23:37])  # values near the edges depend on padding


def test_contains_only_the_layers_after_the_node_and_they_get_gradients() -> None:
    encoder_top = load(load_encoder(BEFORE, "cpu").description)
    names = set(encoder_top.network.state_dict())
    assert all(name.startswith(("features.3.", "features.4.")) for name in names)
    encoder_top.train()
    assert not any(module.training for module in encoder_top.modules())
    encoder_top(torch.ones(1, 16, 64)).sum().backward()
    assert all(parameter.grad is not None for parameter in encoder_top.parameters())


@pytest.mark.parametrize(
    ("node", "message"),
    [
        ("features.0", "expected a node that comes after features.2 and depends on it alone, got features.0"),
        ("features.2", "expected a node that comes after features.2 .*, got features.2"),
        ("features.99", "has no node 'features.99'"),
        ("flatten", "expected a node that outputs a feature map, got flatten"),
    ],
)
def test_nodes_without_maps_after_the_encoder_are_rejected(node: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EncoderTop(load_encoder(BEFORE, "cpu").description, node)


def test_slice_network_rejects_layers_with_other_inputs() -> None:
    with pytest.raises(ConfigError, match=r"layer1\.0\.relu_1 .* alone, got layer1\.0\.conv1"):
        slice_network("resnet18", "layer1.0.relu_1", "layer1.0.conv1")
    with pytest.raises(ConfigError, match="depends on it alone"):
        slice_network("resnet18", "layer1.0.conv1", "layer1.0.relu_1")  # a skip connection bypasses the node


@pytest.mark.parametrize("change", [{"shape": [64]}, {"weights": "imported"}])
def test_pooled_and_imported_features_are_rejected(change: dict[str, Any]) -> None:
    encoder = {**load_encoder(BEFORE, "cpu").description, **change}
    with pytest.raises(ConfigError, match=r"captioner.encoder_top: expected feature maps of a torchvision network"):
        EncoderTop(encoder, NODE)


def test_weights_files_are_required_and_must_match_the_encoder(tmp_path: Path) -> None:
    path = save_weights(tmp_path / "weights.safetensors")
    encoder = load_encoder(dataclasses.replace(BEFORE, weights=path), "cpu").description
    encoder_top = load(encoder, weights=path)
    saved = safetensors.torch.load_file(path)

    def top_weights() -> dict[str, Tensor]:
        return dict(encoder_top.network.state_dict())

    assert all(torch.equal(tensor, saved[name]) for name, tensor in top_weights().items())
    with pytest.raises(ConfigError, match="which came from a file; specify its path with --weights"):
        load(encoder)
    with pytest.raises(CheckpointError, match="differ from the weights of the encoder"):
        load(encoder, weights=save_weights(tmp_path / "other.safetensors", offset=1.0))
    with pytest.raises(
        ConfigError, match=r"lack tensors that captioner\.encoder_top .* needs: features\.4\.expand1x1\.bias"
    ):
        load(encoder, weights=save_weights(tmp_path / "part.safetensors", omit="features.4.expand1x1"))
