"""Writes a self-contained HTML page that shows the activation map of each channel, layer by layer, for one image."""

import base64
import io
import os
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from captionlib.data.images.encoding import encode_jpeg
from captionlib.evaluation.pages import render_page
from captionlib.models.encoders.activations import Activations, LayerActivations
from captionlib.storage.folders import write_file

__all__ = ["write_activation_page"]

_MAX_SIDE = 112  # maximum side of a map in pixels; larger maps are downsampled by averaging
_COLUMNS = 16  # maps per row of a sprite, the image that tiles all maps of a layer
_VISIBLE_CHANNELS = 48  # channels shown per layer; a button shows the rest


def write_activation_page(path: str | os.PathLike[str], title: str, activations: Activations, network: str) -> None:
    """Writes the page for `activations` to `path`. `network` is the displayed name of the network and its weights."""
    page = render_page(
        "activations.html",
        title=title,
        network=network,
        image=_to_data_uri(encode_jpeg(activations.image, quality=90), "jpeg"),
        classes=activations.classes,
        note=activations.note,
        layers=[_describe_layer(layer) for layer in activations.layers],
        visible=_VISIBLE_CHANNELS,
    )
    write_file(path, page)


def _describe_layer(layer: LayerActivations) -> dict[str, Any]:
    """Returns the values of the template. The sprite contains all maps, sorted by descending maximum (peak)."""
    channels, height, width = layer.maps.shape
    peaks = layer.maps.reshape(channels, -1).max(1)
    order = np.argsort(-peaks, kind="stable")
    maps = _shrink(layer.maps[order])
    rows = -(-channels // _COLUMNS)
    return {
        "node": layer.node,
        "channels": channels,
        "size": f"{width} x {height}",
        "aspect_ratio": f"{maps.shape[2]} / {maps.shape[1]}",
        "sprite": _to_data_uri(_encode_sprite(_scale(maps), rows, _COLUMNS), "png"),
        # The mean of the maps, each scaled to its own peak, so that a few strong channels do not hide the others.
        "mean": _to_data_uri(_encode_sprite(_scale(_scale(maps).mean(0, np.float32, keepdims=True)), 1, 1), "png"),
        "inactive": int((peaks <= 0).sum()),
        "columns": _COLUMNS,
        "rows": rows,
        "maps": [
            {
                "channel": int(channel),
                "peak": float(peaks[channel]),
                # CSS background positions: 0% is the first tile of a row or column, 100% the last one.
                "x": 100 * (position % _COLUMNS) / (_COLUMNS - 1),
                "y": 100 * (position // _COLUMNS) / max(1, rows - 1),
            }
            for position, channel in enumerate(order)
        ],
    }


def _shrink(maps: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Downsamples by block averaging so that no side exceeds `_MAX_SIDE`. Incomplete edge blocks are dropped."""
    channels, height, width = maps.shape
    block = -(-max(height, width) // _MAX_SIDE)
    if block == 1:
        return maps
    height, width = height // block, width // block
    blocks = maps[:, : height * block, : width * block].reshape(channels, height, block, width, block)
    means: npt.NDArray[np.float32] = blocks.mean((2, 4))
    return means


def _scale(maps: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
    """Scales each map linearly from [min(0, minimum), maximum] to [0, 255]."""
    low = np.minimum(maps.min((1, 2), keepdims=True), 0)
    span = maps.max((1, 2), keepdims=True) - low
    scaled = np.divide(maps - low, span, out=np.zeros_like(maps), where=span > 0)
    return np.asarray((255 * scaled).round(), np.uint8)


def _encode_sprite(maps: npt.NDArray[np.uint8], rows: int, columns: int) -> bytes:
    from matplotlib import colormaps

    channels, height, width = maps.shape
    tiles = np.zeros((rows * columns, height, width), np.uint8)
    tiles[:channels] = maps
    grid = tiles.reshape(rows, columns, height, width).transpose(0, 2, 1, 3).reshape(rows * height, columns * width)
    sprite = Image.fromarray(np.ascontiguousarray(grid), "P")
    palette = (255 * colormaps["inferno"](np.arange(256))[:, :3]).round().astype(np.uint8)
    sprite.putpalette(palette.tobytes())
    buffer = io.BytesIO()
    sprite.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _to_data_uri(content: bytes, file_format: str) -> str:
    return f"data:image/{file_format};base64,{base64.b64encode(content).decode()}"
