"""The images that a training run skipped because they are unreadable."""

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
    """Records unreadable images, each once, with the reason.

    The run's folder keeps them in `_failures/`, as datasets do, in one file per process. A resumed run reads its file.

    The run fails if more than `max_ratio` of all `images` are skipped.
    """

    def __init__(self, output: Folder, rank: int, images: int, max_ratio: float) -> None:
        self._output, self._images, self._max_ratio = output, images, max_ratio
        self._file = f"{FAILURES_FOLDER}/{part_name(rank)}.parquet"
        self._rows: dict[str, Row] = {}
        if output.exists(self._file):
            with output.open(self._file) as file:
                self._rows = {row["image_id"]: row for row in pq.read_table(file).to_pylist()}

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, row: Row, error: ImageError) -> None:
        """Records an image by its row of the manifest.

        Raises:
            FailureRatioError: the run has skipped more images than it allows.
        """
        self._rows[row["image_id"]] = failure_row(row["image_id"], row["uri"], error)
        if len(self._rows) > self._max_ratio * self._images:
            raise FailureRatioError(
                f"{self.describe()}; the run allows {self._max_ratio:.1%}. The last is {row['uri']}: {error}. Check "
                "that the images are where the manifest says, or set a higher max_failure_ratio; the same command then "
                "resumes from the last saved state"
            )

    def describe(self) -> str:
        """Returns the number of skipped images and their reasons as one line."""
        reasons = Counter(row["error"] for row in self._rows.values())
        counts = ", ".join(f"{reason}: {count}" for reason, count in reasons.most_common())
        return f"{len(self._rows)} of {self._images} images are unreadable ({counts})"

    def write(self) -> None:
        if self._rows:
            with self._output.stage(self._file) as path:
                pq.write_table(pa.Table.from_pylist(list(self._rows.values()), FAILURES_SCHEMA), path)
