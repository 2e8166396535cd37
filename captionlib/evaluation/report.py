"""Writes a report: a folder with a static web page of images, captions and scores.

    folder/
      index.html       the page
      data.js          captions and scores of all images; the page shows 60 images at a time
      thumbnails/      images, cropped as the encoder received them
      attention/       attention maps; the page loads only those of the images that it shows

The page can be opened from disk and needs no server.
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
from captionlib.data.shards.inspection import FailureReport
from captionlib.errors import DatasetError, ImageError
from captionlib.evaluation.charts import build_charts
from captionlib.evaluation.comparison import Comparison
from captionlib.evaluation.image_display import AttentionMaps, ImageDisplay
from captionlib.evaluation.pages import render_page
from captionlib.evaluation.predictions import Prediction
from captionlib.progress import progress_bar
from captionlib.storage.folders import TEMPORARY_FOLDER, Folder

__all__ = ["write_report"]

PAGE = "index.html"
DATA = "data.js"
THUMBNAILS = "thumbnails"
ATTENTION = "attention"

# A central square crop, as in the preprocessing of most encoders.
_THUMBNAIL = Preprocessing(
    resize_size=224, crop_size=224, interpolation="bilinear", mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)
)
_FILES_PER_FOLDER = 1000


def write_report(
    folder: str | os.PathLike[str],
    title: str,
    predictions: Sequence[Prediction],
    *,
    note: str = "",
    scores: Sequence[tuple[str, str, str]] = (),
    cider: Mapping[str, float] | None = None,
    attributes: Mapping[str, Mapping[str, bool]] | None = None,
    history: Sequence[Mapping[str, Any]] = (),
    display: ImageDisplay = ImageDisplay(),
    failures: Mapping[str, FailureReport] | None = None,
    comparison: Comparison | None = None,
    progress: bool = False,
) -> str:
    """Writes a report, which replaces an earlier report in the same folder.

    Args:
        folder: folder of the report.
        title: title of the page.
        predictions: the captions to show.
        note: text below the title.
        scores: name, value and detail of each score. The detail is, for example, a confidence interval.
        cider: CIDEr of each caption by image id.
        attributes: for each image id, the attributes that the caption mentions, such as `color`, and whether each of
            them is correct.
        history: metrics of each training epoch, shown as curves.
        display: the part of each image to show, and the attention maps.
        failures: images without a caption, by reason.
        comparison: captions of a baseline for the same images, to show beside the captions.
        progress: show a progress bar.

    Returns:
        The path or URI of the page.

    Raises:
        DatasetError: the folder contains files that do not belong to a report.
    """
    output = Folder(folder)
    _clear(output)
    items = []
    with progress_bar("report", len(predictions), "images", progress) as bar:
        crop = _crop_for_thumbnails(display.preprocessing)
        thumbnails = bar.track(_write_thumbnails(output, predictions, crop))
        for index, (prediction, thumbnail) in enumerate(zip(predictions, thumbnails, strict=True)):
            image_id = prediction.image_id
            maps = display.attention_maps.get(image_id)
            items.append(
                {
                    **_to_item(prediction),
                    "cider": _round((cider or {}).get(image_id)),
                    "attributes": dict((attributes or {}).get(image_id, {})),
                    "attention": None if maps is None else _write_maps(output, index, maps),
                    "thumbnail": thumbnail,
                    "baseline": None if comparison is None else _to_baseline(comparison, image_id),
                }
            )
    output.write(DATA, _to_script(items))
    page = render_page(
        "report.html",
        title=title,
        note=note,
        scores=scores,
        charts=build_charts(history),
        count=len(items),
        has_attention=any(item["attention"] for item in items),
        failures=failures or {},
        failed=sum(failure.count for failure in (failures or {}).values()),
        comparison=comparison,
    )
    output.write(PAGE, page)
    output.remove(TEMPORARY_FOLDER)
    return output.address(PAGE)


def _clear(folder: Folder) -> None:
    """Removes the thumbnails and attention maps of an earlier report.

    Raises:
        DatasetError: the folder contains other files.
    """
    names = [name for name in folder.list() if name != TEMPORARY_FOLDER]
    expected = [THUMBNAILS, ATTENTION]
    if DATA in names:  # PAGE without DATA may be the user's own
        expected += [PAGE, DATA]
    if others := [name for name in names if name not in expected]:
        raise DatasetError(
            f"{folder.uri} contains files that are not from a report ({', '.join(others[:3])}); specify an empty folder"
        )
    for name in (THUMBNAILS, ATTENTION):
        folder.remove(name)


def _crop_for_thumbnails(preprocessing: Preprocessing | None) -> Preprocessing:
    if preprocessing is None:
        return _THUMBNAIL
    side = _THUMBNAIL.crop_size
    return replace(
        preprocessing, crop_size=side, resize_size=round(side * preprocessing.resize_size / preprocessing.crop_size)
    )


def _write_thumbnails(folder: Folder, predictions: Sequence[Prediction], crop: Preprocessing) -> Iterator[str | None]:
    """Writes a thumbnail of each image and yields its path relative to the page, or None for an unreadable image."""
    with open_loader(LoadingConfig(), crop) as load:
        for index, (_, image) in enumerate(load({"uri": prediction.uri} for prediction in predictions)):
            if isinstance(image, ImageError):
                yield None
                continue
            yield _write_file(folder, THUMBNAILS, index, "jpg", encode_jpeg(image.pixels))


def _write_maps(folder: Folder, index: int, maps: AttentionMaps) -> str:
    texts = [base64.b64encode(attention_map.tobytes()).decode() for attention_map in maps]
    return _write_file(folder, ATTENTION, index, "js", f"captionlibMaps({index}, {json.dumps(texts)});\n".encode())


def _write_file(folder: Folder, kind: str, index: int, extension: str, content: bytes) -> str:
    name = f"{kind}/{index // _FILES_PER_FOLDER:03d}/{index:06d}.{extension}"
    try:
        folder.fs.pipe_file(folder.path(name), content)
    except FileNotFoundError:  # the first file of a subfolder, on a file system with folders
        folder.fs.makedirs(folder.path(name.rpartition("/")[0]), exist_ok=True)
        folder.fs.pipe_file(folder.path(name), content)
    return name


def _to_item(prediction: Prediction) -> dict[str, Any]:
    return {
        "id": prediction.image_id,
        "caption": prediction.caption,
        "split": prediction.split,
        "logProb": _round(prediction.log_prob),
        "imageTextScore": _round(prediction.image_text_score),
        "candidates": [[caption, _round(log_prob)] for caption, log_prob in prediction.candidates],
        "references": list(prediction.references),
    }


def _to_baseline(comparison: Comparison, image_id: str) -> dict[str, Any]:
    prediction, cider = comparison.baseline[image_id], comparison.baseline_cider.get(image_id)
    gain = None if cider is None else comparison.cider[image_id] - cider
    return {
        "caption": prediction.caption,
        "logProb": _round(prediction.log_prob),
        "cider": _round(cider),
        "gain": _round(gain),
    }


def _to_script(items: Sequence[Mapping[str, Any]]) -> bytes:
    """Returns the data as an ASCII script in which `<` is escaped. A page opened from disk cannot load JSON."""
    lines = ",\n".join(json.dumps(item, allow_nan=False).replace("<", "\\u003c") for item in items)
    return f"window.captionlibReport = [\n{lines}\n];\n".encode()


def _round(value: float | None) -> float | None:
    """Rounds a value. NaN and infinity become None because JSON does not support them."""
    return None if value is None or not math.isfinite(value) else round(value, 4)
