"""A page of channel maps: what each convolution layer sees in one image. One file, to open from disk."""

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

_LARGEST = 112  # pixels of a map's sides; larger maps are averaged down
_ACROSS = 16  # maps in a row of a layer's one picture
_SHOWN = 48  # channels before the rest is asked for


def write_activation_page(path: str | os.PathLike[str], title: str, activations: Activations, network: str) -> None:
    """Writes the page.

    Args:
        path: the HTML file, or its address.
        title: of the page, such as the image's name.
        activations: what is shown.
        network: what the network is, a phrase.

    Raises:
        StorageError: the file cannot be written.
    """
    page = render_page(
        "activations.html",
        title=title,
        network=network,
        photo=_to_uri(encode_jpeg(activations.image, quality=90), "jpeg"),
        classes=activations.classes,
        note=activations.note,
        layers=[_to_section(layer) for layer in activations.layers],
        shown=_SHOWN,
    )
    write_file(path, page)


def _to_section(layer: LayerActivations) -> dict[str, Any]:
    """A layer as the template shows it: one picture of all maps, the channels with the highest peaks first."""
    channels, height, width = layer.maps.shape
    peaks = layer.maps.reshape(channels, -1).max(1)
    order = np.argsort(-peaks, kind="stable")
    small = _shrink(layer.maps[order])
    rows = -(-channels // _ACROSS)
    return {
        "node": layer.node,
        "channels": channels,
        "size": f"{width} x {height}",
        "ratio": f"{small.shape[2]} / {small.shape[1]}",
        "picture": _to_uri(_arrange(_scale(small), rows), "png"),
        "silent": int((peaks <= 0).sum()),
        "across": _ACROSS,
        "down": rows,
        "maps": [
            {
                "channel": int(channel),
                "peak": float(peaks[channel]),
                # Of a background that is n times its box, percentages run from the first tile to the last.
                "x": 100 * (place % _ACROSS) / (_ACROSS - 1),
                "y": 100 * (place // _ACROSS) / max(1, rows - 1),
            }
            for place, channel in enumerate(order)
        ],
    }


def _shrink(maps: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Maps of at most `_LARGEST` pixels a side, each the mean of a block; what does not fill a block is cut off."""
    channels, height, width = maps.shape
    block = -(-max(height, width) // _LARGEST)
    if block == 1:
        return maps
    height, width = height // block, width // block
    blocks = maps[:, : height * block, : width * block].reshape(channels, height, block, width, block)
    small: npt.NDArray[np.float32] = blocks.mean((2, 4))
    return small


def _scale(maps: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
    """Each map from 0, or its lowest value where that is below, to its own peak; a map that is 0 stays dark."""
    low = np.minimum(maps.min((1, 2), keepdims=True), 0)
    span = maps.max((1, 2), keepdims=True) - low
    scaled = np.divide(maps - low, span, out=np.zeros_like(maps), where=span > 0)
    return np.asarray((255 * scaled).round(), np.uint8)


def _arrange(maps: npt.NDArray[np.uint8], rows: int) -> bytes:
    """Arranges all maps in one PNG image, row by row."""
    from matplotlib import colormaps

    channels, height, width = maps.shape
    filled = np.zeros((rows * _ACROSS, height, width), np.uint8)
    filled[:channels] = maps
    grid = filled.reshape(rows, _ACROSS, height, width).transpose(0, 2, 1, 3).reshape(rows * height, _ACROSS * width)
    picture = Image.fromarray(np.ascontiguousarray(grid), "P")
    colours = (255 * colormaps["inferno"](np.arange(256))[:, :3]).round().astype(np.uint8)
    picture.putpalette(colours.tobytes())
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _to_uri(content: bytes, form: str) -> str:
    return f"data:image/{form};base64,{base64.b64encode(content).decode()}"
