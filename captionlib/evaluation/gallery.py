"""A static page of pictures and what was said of them: one file, no server, opened from disk."""

import base64
import io
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image

from captionlib.data.fetch import ImageFetcher
from captionlib.data.images import Preprocessing, decode_image
from captionlib.errors import ImageError

__all__ = ["GalleryItem", "write_gallery"]

# The square in the middle, as the encoder sees it.
_THUMBNAIL = Preprocessing(
    resize_size=224, crop_size=224, interpolation="bilinear", mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)
)


@dataclass(frozen=True)
class GalleryItem:
    """A picture and what was said of it.

    Attributes:
        image_id: its id.
        image: the picture's file or address.
        caption: what the model says.
        log_prob: of the caption.
        candidates: all captions of the beam with their log-probabilities, the best first.
        references: what people say.
        marks: judgements such as `colour`, and whether the caption is right in it.
    """

    image_id: str
    image: str | os.PathLike[str]
    caption: str
    log_prob: float
    candidates: Sequence[tuple[str, float]] = ()
    references: Sequence[str] = ()
    marks: dict[str, bool] = field(default_factory=dict)


def write_gallery(
    path: Path, title: str, items: Sequence[GalleryItem], figures: Sequence[tuple[str, str]] = (), note: str = ""
) -> Path:
    """Writes the page, with thumbnails inside it; all text is escaped.

    Args:
        path: the HTML file.
        title: of the page.
        items: in the order they are shown in at first.
        figures: names and values that stand above the pictures.
        note: a sentence under the title.

    Returns:
        `path`.
    """
    environment = Environment(
        loader=PackageLoader("captionlib.evaluation"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["percent"] = _percent
    with ImageFetcher() as fetcher:
        cards = [{"item": item, "thumbnail": _thumbnail(fetcher, item.image)} for item in items]
    page = environment.get_template("gallery.html").render(title=title, note=note, figures=figures, cards=cards)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
    return path


def _thumbnail(fetcher: ImageFetcher, image: str | os.PathLike[str]) -> str | None:
    """The picture as a data URI, small; None where it cannot be had."""
    try:
        pixels = decode_image(fetcher.fetch(os.fspath(image)), _THUMBNAIL)
    except ImageError:
        return None
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _percent(log_prob: float) -> str:
    """A probability with two digits that count, however small it is."""
    return f"{100 * math.exp(log_prob):.2g}%"
