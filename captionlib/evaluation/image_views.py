"""How a captioner saw the pictures, as a report shows it: which part of them, and where it looked word by word."""

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

__all__ = ["Sight", "read_sight", "sight_of"]

Maps = npt.NDArray[np.uint8]
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Sight:
    """How pictures were seen.

    Attributes:
        preprocessing: the encoder's; None where it is not known.
        maps: by image id `[tokens, side, side] uint8`: where the captioner looked for each word of the caption and, if
            that was reached, for its end, each map from 0 to its own peak. They cover the square that the encoder sees.
    """

    preprocessing: Preprocessing | None = None
    maps: Mapping[str, Maps] = field(default_factory=dict)


def read_sight(source: str | os.PathLike[str], image_ids: Collection[str]) -> Sight:
    """How the images of some ids were seen, from where their captions are; files of results know nothing of it.

    Raises:
        DatasetError: the maps are not square.
    """
    if not is_dataset(source):
        return Sight()
    dataset = open_dataset(source, "captions").require_complete()
    preprocessing = _preprocessing_of(dataset.config.get("encoder", {}))
    if "attention" not in dataset.schema.names:
        return Sight(preprocessing)
    wanted = pa.array(image_ids, pa.string())
    maps: dict[str, Maps] = {}
    for shard in range(dataset.shards):
        for rows in dataset.read_batches(shard, ["image_id", "attention"]):
            if len(maps) == len(wanted):
                return Sight(preprocessing, maps)
            kept = rows.filter(pc.is_in(rows["image_id"], value_set=wanted))
            maps.update(zip(kept["image_id"].to_pylist(), map(_to_maps, _split(kept["attention"])), strict=True))
    return Sight(preprocessing, maps)


def sight_of(rows: Iterable[Row], encoder: Mapping[str, Any]) -> Sight:
    """How the images of rows of `captions/` were seen.

    Args:
        rows: plain values, with `attention` or without.
        encoder: the description of the captioner's encoder.

    Raises:
        DatasetError: the maps are not square.
    """
    looks = {row["image_id"]: np.array(row["attention"], np.float32) for row in rows if "attention" in row}
    return Sight(_preprocessing_of(encoder), {image_id: _to_maps(look) for image_id, look in looks.items()})


def _preprocessing_of(encoder: Mapping[str, Any]) -> Preprocessing | None:
    """None of imported features, whose pictures were prepared elsewhere."""
    return Preprocessing(**encoder["preprocessing"]) if "preprocessing" in encoder else None


def _split(attention: pa.ListArray) -> list[npt.NDArray[np.floating]]:
    """The looks of each image, `[tokens, positions]`."""
    numbers = vectors_to_numpy(attention.flatten())
    lengths = pc.list_value_length(attention).to_numpy()
    return [numbers[end - length : end] for length, end in zip(lengths, np.cumsum(lengths), strict=True)]


def _to_maps(looks: npt.NDArray[np.floating]) -> Maps:
    """`[tokens, positions]` to `[tokens, side, side]`, 255 where a token's look is strongest."""
    tokens, positions = looks.shape
    side = math.isqrt(positions)
    if side * side != positions:
        raise DatasetError(
            f"attention: expected maps that are square, as encoders see squares, got {positions} positions; "
            "their height and width are not known, so make the captions without attention_maps to show them"
        )
    scaled = 255 * looks.astype(np.float32) / looks.max(1, keepdims=True)
    maps: Maps = scaled.round().astype(np.uint8).reshape(tokens, side, side)
    return maps
