"""Reads what a page needs to display images: the crop that the encoder received, and an attention map per token."""

import math
import os
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from captionlib.data.arrays import vectors_to_numpy
from captionlib.data.images.decoding import Preprocessing
from captionlib.data.shards.dataset import open_dataset
from captionlib.errors import DatasetError
from captionlib.evaluation.predictions import is_dataset

__all__ = [
    "AttentionMaps",
    "ImageDisplay",
    "build_image_display",
    "make_attention_maps",
    "parse_preprocessing",
    "read_image_display",
]

AttentionMaps = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class ImageDisplay:
    """How to display a set of images: the encoder's preprocessing if known, and attention maps by image id.

    The maps of an image, `[tokens, side, side] uint8`, cover the crop of the preprocessing. See `make_attention_maps`.
    """

    preprocessing: Preprocessing | None = None
    attention_maps: Mapping[str, AttentionMaps] = field(default_factory=dict)


def read_image_display(source: str | os.PathLike[str], image_ids: Collection[str]) -> ImageDisplay:
    """Reads the crop and the attention maps of images. Only a captions dataset contains them, not a JSON file."""
    if not is_dataset(source):
        return ImageDisplay()
    dataset = open_dataset(source, "captions").require_complete()
    preprocessing = parse_preprocessing(dataset.config.get("encoder", {}))
    if "attention" not in dataset.schema.names:
        return ImageDisplay(preprocessing)
    wanted = pa.array(image_ids, pa.string())
    maps: dict[str, AttentionMaps] = {}
    for shard in range(dataset.shards):
        for rows in dataset.read_batches(shard, ["image_id", "attention"]):
            if len(maps) == len(wanted):
                return ImageDisplay(preprocessing, maps)
            matches = rows.filter(pc.is_in(rows["image_id"], value_set=wanted))
            image_maps = map(make_attention_maps, _split_by_image(matches["attention"]))
            maps.update(zip(matches["image_id"].to_pylist(), image_maps, strict=True))
    return ImageDisplay(preprocessing, maps)


def build_image_display(rows: Iterable[Mapping[str, Any]], encoder: Mapping[str, Any]) -> ImageDisplay:
    """Builds an `ImageDisplay` from rows of captions, with or without `attention`, and the encoder's description."""
    maps = {
        row["image_id"]: make_attention_maps(np.array(row["attention"], np.float32))
        for row in rows
        if "attention" in row
    }
    return ImageDisplay(parse_preprocessing(encoder), maps)


def parse_preprocessing(encoder: Mapping[str, Any]) -> Preprocessing | None:
    """Returns the encoder's preprocessing, or None if the features were imported or the model resizes the images."""
    preprocessing = encoder.get("preprocessing", {})
    return Preprocessing(**preprocessing) if "crop_size" in preprocessing else None


def _split_by_image(attention: pa.ListArray) -> list[npt.NDArray[np.floating]]:
    """Returns the attention weights of each image, `[tokens, positions]`."""
    weights = vectors_to_numpy(attention.flatten())
    lengths = pc.list_value_length(attention).to_numpy()
    return [weights[end - length : end] for length, end in zip(lengths, np.cumsum(lengths), strict=True)]


def make_attention_maps(weights: npt.NDArray[np.floating]) -> AttentionMaps:
    """Converts attention weights, `[tokens, positions]`, to maps, `[tokens, side, side]`, with a peak of 255.

    Raises:
        DatasetError: the number of positions is not a square.
    """
    tokens, positions = weights.shape
    side = math.isqrt(positions)
    if side * side != positions:
        raise DatasetError(
            f"attention: expected square maps, got {positions} positions, whose height and width are unknown; "
            "to write a report, generate the captions without attention_maps"
        )
    scaled = 255 * weights.astype(np.float32) / weights.max(1, keepdims=True)
    maps: AttentionMaps = scaled.round().astype(np.uint8).reshape(tokens, side, side)
    return maps
