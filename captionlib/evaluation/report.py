"""A static page of pictures and what was said of them: a folder to open from disk, without a server.

folder/
  index.html       the page
  data.js          what was said of each picture, and where the captioner looked for each word, if that was kept; the
                   page shows some at a time, so there may be thousands
  thumbnails/      the pictures, as the encoder sees them
"""

import base64
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from captionlib.data.images.decoding import Preprocessing
from captionlib.data.images.encoding import encode_jpeg
from captionlib.data.images.loading import LoadingConfig, open_loader
from captionlib.errors import DatasetError, ImageError
from captionlib.evaluation.charts import draw_charts
from captionlib.evaluation.image_views import Sight
from captionlib.evaluation.pages import render_page
from captionlib.evaluation.predictions import Prediction
from captionlib.progress import progress_bar
from captionlib.storage.folders import TEMPORARY_FOLDER, Folder

__all__ = ["write_report"]

PAGE = "index.html"
DATA = "data.js"
THUMBNAILS = "thumbnails"

# The square in the middle, as most encoders see it.
_THUMBNAIL = Preprocessing(
    resize_size=224, crop_size=224, interpolation="bilinear", mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)
)
_FOLDER_THUMBNAILS = 1000  # in one folder


def write_report(
    folder: str | os.PathLike[str],
    title: str,
    predictions: Sequence[Prediction],
    *,
    note: str = "",
    figures: Sequence[tuple[str, str, str]] = (),
    cider: Mapping[str, float] | None = None,
    marks: Mapping[str, Mapping[str, bool]] | None = None,
    history: Sequence[Mapping[str, Any]] = (),
    sight: Sight | None = None,
    progress: bool = False,
) -> str:
    """Writes the page, its data and its thumbnails; a page that was there is replaced.

    Args:
        folder: where to; it is made.
        title: of the page.
        predictions: in the order they are shown in at first.
        note: a sentence under the title.
        figures: names, values and details that stand above the pictures.
        cider: of images, by their ids.
        marks: judgements such as `colour` by the images' ids, and whether the caption is right in it.
        history: what training told epoch by epoch.
        sight: what of the pictures the captioner saw, and where it looked.
        progress: show a bar.

    Returns:
        The page's path or address.

    Raises:
        DatasetError: the folder holds something else.
    """
    target = Folder(folder)
    sight = sight or Sight()
    _claim(target)
    items = []
    pictures = _write_thumbnails(target, predictions, _crop_of(sight.preprocessing))
    with progress_bar("report", len(predictions), "images", progress) as bar:
        for one, thumbnail in zip(predictions, pictures, strict=True):
            items.append(
                {
                    **_to_item(one),
                    "cider": _finite((cider or {}).get(one.image_id)),
                    "marks": dict((marks or {}).get(one.image_id, {})),
                    "looks": [base64.b64encode(look.tobytes()).decode() for look in sight.maps.get(one.image_id, ())],
                    "thumbnail": thumbnail,
                }
            )
            bar.update(1)
    target.write(DATA, _to_script(items))
    page = render_page(
        "report.html",
        title=title,
        note=note,
        figures=figures,
        charts=draw_charts(history),
        count=len(items),
        looks=any(item["looks"] for item in items),
    )
    target.write(PAGE, page)
    target.remove(TEMPORARY_FOLDER)
    return target.address(PAGE)


def _claim(folder: Folder) -> None:
    """Refuses the folder of something else, and clears away the pictures of an older page."""
    names = [name for name in folder.list() if name != TEMPORARY_FOLDER]
    own = (PAGE, DATA, THUMBNAILS) if DATA in names else (THUMBNAILS,)  # a page without data is someone else's
    if strangers := [name for name in names if name not in own]:
        raise DatasetError(
            f"{folder.uri} holds files that are no report's ({', '.join(strangers[:3])}); give an empty or a new folder"
        )
    folder.remove(THUMBNAILS)


def _crop_of(preprocessing: Preprocessing | None) -> Preprocessing:
    """What an encoder sees of a picture, in the size of a thumbnail."""
    if preprocessing is None:
        return _THUMBNAIL
    side = _THUMBNAIL.crop_size
    return replace(
        preprocessing, crop_size=side, resize_size=round(side * preprocessing.resize_size / preprocessing.crop_size)
    )


def _write_thumbnails(folder: Folder, predictions: Sequence[Prediction], crop: Preprocessing) -> Iterator[str | None]:
    """The thumbnail of each picture, relative to the page; None where the picture cannot be had."""
    made: set[str] = set()
    with open_loader(LoadingConfig(), crop) as load:
        for number, (_, image) in enumerate(load({"uri": one.uri} for one in predictions)):
            if isinstance(image, ImageError):
                yield None
                continue
            subfolder = f"{THUMBNAILS}/{number // _FOLDER_THUMBNAILS:03d}"
            if subfolder not in made:
                folder.fs.makedirs(folder.path(subfolder), exist_ok=True)
                made.add(subfolder)
            name = f"{subfolder}/{number:06d}.jpg"
            folder.fs.pipe_file(folder.path(name), encode_jpeg(image))
            yield name


def _to_item(one: Prediction) -> dict[str, Any]:
    return {
        "id": one.image_id,
        "caption": one.caption,
        "split": one.split,
        "logProb": _finite(one.log_prob),
        "candidates": [[text, _finite(log_prob)] for text, log_prob in one.candidates],
        "references": list(one.references),
    }


def _to_script(items: Sequence[Mapping[str, Any]]) -> bytes:
    """The data as a script, which a page may load from disk, as it may not load JSON; ASCII, and free of tags."""
    lines = ",\n".join(json.dumps(item, allow_nan=False).replace("<", "\\u003c") for item in items)
    return f"window.captionlibReport = [\n{lines}\n];\n".encode()


def _finite(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else round(value, 4)
