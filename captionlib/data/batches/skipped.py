"""Records the images that a training run skips because they cannot be read."""

from collections import Counter
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from captionlib.data.shards.markers import FAILURES_FOLDER, part_name
from captionlib.data.shards.schemas import FAILURES_SCHEMA, failure_row
from captionlib.errors import FailureRatioError, ImageError
from captionlib.storage.folders import Folder

__all__ = ["SkippedImages"]

Row = dict[str, Any]


class SkippedImages:
    """Records each unreadable image and the reason. A resumed run continues the record of the interrupted run.

    Args:
        output: output folder of the run. The images are recorded in its subfolder `__failures/`.
        rank: rank of this process. Each process writes its own file.
        images: number of images in the training data.
        max_ratio: maximum fraction of `images` that may be skipped. If None, all but one may be skipped.
    """

    def __init__(self, output: Folder, rank: int, images: int, max_ratio: float | None) -> None:
        self._output, self._images, self._max_ratio = output, images, max_ratio
        self._file = f"{FAILURES_FOLDER}/{part_name(rank)}.parquet"
        self._rows: dict[str, Row] = {}
        if output.exists(self._file):
            with output.open(self._file) as file:
                self._rows = {row["image_id"]: row for row in pq.ParquetFile(file).read(use_threads=False).to_pylist()}

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, row: Row, error: ImageError) -> None:
        """Records an unreadable image. `row` contains its image_id and uri.

        Raises:
            FailureRatioError: the run has skipped more images than `max_ratio` allows.
        """
        self._rows[row["image_id"]] = failure_row(row, error)
        limit = self._images - 1 if self._max_ratio is None else self._max_ratio * self._images
        if len(self._rows) > limit:
            raise FailureRatioError(
                f"{self.describe()}; the run allows {limit / self._images:.1%}. The last is {row['uri']}: {error}. "
                "Check that the image paths in the manifest are correct, or set a higher max_failure_ratio; the same "
                "command then resumes from the last saved state"
            )

    def describe(self) -> str:
        """Formats the number of skipped images and the reasons on one line."""
        reasons = Counter(row["error"] for row in self._rows.values())
        counts = ", ".join(f"{reason}: {count}" for reason, count in reasons.most_common())
        return f"{len(self._rows)} of {self._images} images are unreadable ({counts})"

    def write(self) -> None:
        if self._rows:
            with self._output.stage(self._file) as path:
                pq.write_table(pa.Table.from_pylist(list(self._rows.values()), FAILURES_SCHEMA), path)
