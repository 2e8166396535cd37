"""Image encoders from Hugging Face Transformers: vision transformers such as CLIP, SigLIP, DINOv2 and ViT."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoImageProcessor, AutoModel

from captionlib.data.images.decoding import Preprocessing
from captionlib.errors import CheckpointError, ConfigError
from captionlib.models.encoders.encoder import Encoder, EncoderConfig
from captionlib.models.families.huggingface import ModelFolder, find_preprocessing
from captionlib.models.families.nodes import Node, check_node, select_class_token, to_feature_map

__all__ = ["load"]


class _VisionTower(nn.Module):
    def __init__(self, model: Any, node: Node, address: str) -> None:
        super().__init__()
        self.model = model
        self._node, self._address = node, address

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        """Computes features, `[batch, channels]` or `[batch, channels, height, width]`."""
        output = self.model(pixel_values=pixels)
        last = output.last_hidden_state
        if self._node == "pooled":
            pooled = output.get("pooler_output")
            if pooled is None:
                raise ConfigError(f"encoder.node: {self._address} has no pooled output; use class_token or feature_map")
            return {"features": pooled.flatten(1)}
        patch = getattr(self.model.config, "patch_size", 0)
        rows, columns = (side // patch if patch else 0 for side in pixels.shape[2:])
        if self._node == "class_token":
            return {"features": select_class_token(last, self._address, 0 < rows * columns < last.shape[1])}
        return {"features": to_feature_map(last, self._address, rows, columns)}


def load(location: str, config: EncoderConfig, device: torch.device) -> Encoder:
    """Loads the image part of a model from a folder or from `ORGANIZATION/NAME@REVISION`; see `open_encoder`."""
    address = f"hf:{location}"
    node = check_node(address, config.node)
    if config.weights != EncoderConfig.weights or config.missing_weights != "error":
        raise ConfigError(
            f"encoder.weights: the folder of {address} contains the weights; omit encoder.weights and "
            "encoder.missing_weights"
        )
    folder = ModelFolder(location)
    preprocessing = find_preprocessing(folder.load(AutoImageProcessor))
    if not isinstance(preprocessing, Preprocessing):
        raise CheckpointError(
            f"{address}: expected an image processor that resizes images to one size, crops and normalizes them, got "
            "one that does not; use a different model"
        )
    tower = _VisionTower(_load_tower(folder, node), node, address)
    # A local folder is identified by the hash of its files, not by its location.
    name = tower.model.config.model_type if folder.is_local else location
    config = replace(config, model=f"hf:{name}", weights="folder" if folder.is_local else "hub")
    return Encoder(tower, config, preprocessing, device, folder.compute_fingerprint())


def _load_tower(folder: ModelFolder, node: Node) -> Any:
    model, missing = folder.load_model(AutoModel)
    tower = getattr(model, "vision_model", model)
    if tower.main_input_name != "pixel_values":
        raise CheckpointError(
            f"hf:{folder.location}: expected a model with an image encoder, got {type(model).__name__}"
        )
    prefix = "" if tower is model else "vision_model."
    tower_missing = [name for name in missing if name.startswith(prefix)]
    missing_pooler = [name for name in tower_missing if "pooler" in name]
    if node == "pooled" and missing_pooler:
        raise ConfigError(
            f"encoder.node: hf:{folder.location} has no trained weights for pooled ({missing_pooler[0]}); "
            "use class_token or feature_map"
        )
    folder.require_weights(set(tower_missing) - set(missing_pooler))
    return tower
