"""Describes where a caption comes from: its models and settings, and the attention maps of its words."""

import base64
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from captionlib.data.images.decoding import Preprocessing
from captionlib.errors import DatasetError
from captionlib.evaluation.image_display import make_attention_maps, parse_preprocessing
from captionlib.serving.responses import Attention

__all__ = ["describe_provenance", "make_attention"]

_SHOWN_HASH_LENGTH = 12  # a model is shown as the first characters of the hash that identifies it


def describe_provenance(config: Mapping[str, Any]) -> dict[str, str]:
    """Returns the models and settings in the configuration of a captions dataset, without paths."""
    encoder, decoding = config.get("encoder", {}), config.get("decoding", {})
    model = str(encoder.get("model", "")).rstrip("/").rpartition("/")[2]  # the path of a model is private
    node = encoder.get("node")  # the layer of the network whose output is used
    strategy = decoding.get("strategy")
    width = f", width {decoding['beam_width']}" if strategy == "beam" and "beam_width" in decoding else ""
    rerank = decoding.get("rerank", {}).get("method", "none")
    described = {
        "Captioner": str(config.get("captioner", ""))[:_SHOWN_HASH_LENGTH],
        "Encoder": f"{model}, {node}" if model and node else model,
        "Decoding": f"{strategy}{width}" if strategy else "",
        "Reranking": "" if rerank == "none" else str(rerank),
        "Ranker": str(config.get("ranker", ""))[:_SHOWN_HASH_LENGTH],
    }
    return {name: value for name, value in described.items() if value}


def make_attention(
    weights: Sequence[Sequence[float]] | None, config: Mapping[str, Any], row: Mapping[str, Any]
) -> Attention | None:
    """Returns the attention maps of a caption from its attention weights, `[tokens, positions]`.

    They are None if there are no weights, the maps are not square, or the preprocessing (in `config`, the configuration
    of the captions dataset) or the size of the image (in `row`) is unknown.
    """
    preprocessing = parse_preprocessing(config.get("encoder", {}))
    if preprocessing is None or not weights or not row["width"] or not row["height"]:
        return None
    try:
        maps = make_attention_maps(np.array(weights, np.float32))
    except DatasetError:  # the maps are not square
        return None
    crop = _find_crop(preprocessing, row["width"], row["height"])
    return Attention(maps=[base64.b64encode(each.tobytes()).decode() for each in maps], crop=crop)


def _find_crop(preprocessing: Preprocessing, width: int, height: int) -> tuple[float, float, float, float]:
    """Returns left, top, width and height of the crop as fractions of the image."""
    side = preprocessing.crop_size / preprocessing.resize_size
    shorter = min(width, height)
    fractions = (side, side) if preprocessing.stretch else (side * shorter / width, side * shorter / height)
    return (1 - fractions[0]) / 2, (1 - fractions[1]) / 2, fractions[0], fractions[1]
