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


def save_weights(path: Path, encoder: EncoderConfig = WHOLE, change: float = 0.0, leave_out: str = "none") -> str:
    weights = load_encoder(encoder, "cpu").network.export_weights()
    kept = {name: tensor + change for name, tensor in weights.items() if leave_out not in name}
    safetensors.torch.save_file(kept, path)
    return str(path)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_goes_on_where_the_encoder_ends(dtype: Any) -> None:
    before, whole = (load_encoder(dataclasses.replace(config, dtype=dtype), "cpu") for config in (BEFORE, WHOLE))
    encoder_top = load(before.description)
    assert encoder_top.shape == whole.shape
    given = encoder_top(torch.from_numpy(before.encode(IMAGES)))
    assert given.dtype == torch.float32
    tolerance = 1e-5 if dtype == "float32" else 0.02
    expected = whole.encode(IMAGES)
    np.testing.assert_allclose(given.detach().numpy(), expected, atol=tolerance * np.abs(expected).max())


def test_takes_windows_of_a_map_too() -> None:
    encoder = load_encoder(BEFORE, "cpu")
    encoder_top = load(encoder.description)
    maps = torch.from_numpy(encoder.encode(IMAGES)).view(2, 55, 55, -1)
    window = encoder_top(maps[:, 10:30, 20:40].reshape(2, 400, -1)).view(2, 20, 20, -1)
    whole = encoder_top(maps.flatten(1, 2)).view(2, 55, 55, -1)
    torch.testing.assert_close(window[:, 3:-3, 3:-3], whole[:, 13:27, 23:37])  # the edges lack what is around them


def test_has_the_layers_between_alone_and_gradients_reach_them() -> None:
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
        ("features.0", "expected a node that comes after features.2 and is computed from it alone, got features.0"),
        ("features.2", "expected a node that comes after features.2 .*, got features.2"),
        ("features.99", "has no node 'features.99'"),
        ("flatten", "expected a node that is a map, got flatten"),
    ],
)
def test_a_node_that_is_no_map_behind_the_encoder_is_refused(node: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EncoderTop(load_encoder(BEFORE, "cpu").description, node)


def test_what_lies_between_may_not_need_more_than_the_node() -> None:
    with pytest.raises(ConfigError, match=r"layer1\.0\.relu_1 .* alone, got layer1\.0\.conv1"):
        slice_network("resnet18", "layer1.0.relu_1", "layer1.0.conv1")
    with pytest.raises(ConfigError, match="is computed from it alone"):
        slice_network("resnet18", "layer1.0.conv1", "layer1.0.relu_1")  # goes around it, too


@pytest.mark.parametrize("change", [{"shape": [64]}, {"weights": "imported"}])
def test_features_that_are_no_maps_of_a_known_network_are_refused(change: dict[str, Any]) -> None:
    encoder = {**load_encoder(BEFORE, "cpu").description, **change}
    with pytest.raises(ConfigError, match=r"captioner.encoder_top: expected features that are maps of a known network"):
        EncoderTop(encoder, NODE)


def test_weights_of_a_file_have_to_be_given_and_to_be_the_encoders(tmp_path: Path) -> None:
    path = save_weights(tmp_path / "weights.safetensors")
    encoder = load_encoder(dataclasses.replace(BEFORE, weights=path), "cpu").description
    encoder_top = load(encoder, weights=path)
    saved = safetensors.torch.load_file(path)

    def of_tail() -> dict[str, Tensor]:
        return dict(encoder_top.network.state_dict())

    assert all(torch.equal(tensor, saved[name]) for name, tensor in of_tail().items())
    with pytest.raises(ConfigError, match="which came from a file; give its path with --weights"):
        load(encoder)
    with pytest.raises(CheckpointError, match="are not those of the encoder"):
        load(encoder, weights=save_weights(tmp_path / "other.safetensors", change=1.0))
    with pytest.raises(ConfigError, match=r"lack what captioner\.encoder_top .* needs: features\.4\.expand1x1\.bias"):
        load(encoder, weights=save_weights(tmp_path / "part.safetensors", leave_out="features.4.expand1x1"))
