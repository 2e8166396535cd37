"""Image encoders from the library timm, with weights from a local file."""

import difflib
import math
from typing import Any

import timm
import torch
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from captionlib.data.images.decoding import Preprocessing
from captionlib.errors import ConfigError
from captionlib.models.encoders.encoder import Encoder, EncoderConfig, load_network_weights
from captionlib.models.encoders.weights import hash_weights
from captionlib.models.families.nodes import Node, check_node, select_class_token, to_feature_map

__all__ = ["load"]


class _TimmNetwork(nn.Module):
    """A timm model without its classifier. `node` selects the output that is used as features."""

    def __init__(self, model: Any, node: Node, address: str) -> None:
        super().__init__()
        self.model = model
        self._node, self._address = node, address

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        """Computes features, `[batch, channels]` or `[batch, channels, height, width]`."""
        output = self.model.forward_features(pixels)
        if self._node == "pooled":
            return {"features": self.model.forward_head(output, pre_logits=True).flatten(1)}
        if self._node == "class_token":
            has_class_token = getattr(self.model, "cls_token", None) is not None
            return {"features": select_class_token(output, self._address, has_class_token)}
        if output.dim() == 4 and getattr(self.model, "output_fmt", "NCHW") == "NHWC":
            output = output.permute(0, 3, 1, 2)
        patches = getattr(self.model, "patch_embed", None)
        return {"features": to_feature_map(output, self._address, *getattr(patches, "grid_size", (0, 0)))}


def load(name: str, config: EncoderConfig, device: torch.device) -> Encoder:
    """Builds a timm model and loads its weights from a file; see `open_encoder`."""
    address = f"timm:{name}"
    node = check_node(address, config.node)
    if not config.weights.endswith(".safetensors") and not config.weights.startswith("random:"):
        raise ConfigError(
            f"encoder.weights: {address} needs the path of a .safetensors file, or random:SEED, got {config.weights}"
        )
    model = _build_model(name)
    preprocessing = _find_preprocessing(model, address)
    weights, config = load_network_weights(model, config)
    model.load_state_dict(weights)
    return Encoder(_TimmNetwork(model, node, address), config, preprocessing, device, hash_weights(weights))


def _build_model(name: str) -> nn.Module:
    names = timm.list_models()
    if name.partition(".")[0] not in names:
        close = difflib.get_close_matches(name, names) or names[:5]
        raise ConfigError(f"unknown model timm:{name}; timm has {len(names)} models, among them {', '.join(close)}")
    try:
        with torch.random.fork_rng(devices=[]):  # restores the caller's random state
            torch.manual_seed(0)  # for the weights that random:SEED does not sample
            model: nn.Module = timm.create_model(name, pretrained=False, num_classes=0)
    except RuntimeError as error:  # such as an unknown tag after the dot
        raise ConfigError(f"unknown model timm:{name}: {error}; `timm.list_pretrained()` lists all models") from error
    return model.eval()


def _find_preprocessing(model: nn.Module, address: str) -> Preprocessing:
    settings = resolve_model_data_config(model)
    _, height, width = settings["input_size"]
    if height != width or settings["crop_mode"] not in ("center", "squash"):
        raise ConfigError(
            f"{address}: expected square images that are cropped or stretched, got {height} x {width} pixels with crop "
            f"mode {settings['crop_mode']}; use a different model"
        )
    return Preprocessing(
        resize_size=math.floor(height / settings["crop_pct"]),
        crop_size=height,
        interpolation=settings["interpolation"],
        mean=tuple(settings["mean"]),
        std=tuple(settings["std"]),
        stretch=settings["crop_mode"] == "squash",
    )
