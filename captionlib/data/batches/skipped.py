"""The images that a training run could not have: skipped, kept with their reasons, and too many of them end it."""

from collections import Counter
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from captionlib.data.shards.markers import FAILURES_FOLDER, part_name
from captionlib.data.shards.schemas import FAILURES_SCHEMA
from captionlib.errors import FailureRatioError, ImageError
from captionlib.storage.folders import Folder

__all__ = ["SkippedImages"]

Row = dict[str, Any]


class SkippedImages:
    """Images that could not be had, each once, however often it was asked for.

    They are kept in the run's folder as datasets keep theirs, in `_failures/`; each process of a run has a file there.

    Args:
        output: the run's folder; what it knows of images that were skipped before is read.
        process: the number of this process.
        images: how many there are in all.
        max_ratio: of them; more skipped images end the run.
    """

    def __init__(self, output: Folder, process: int, images: int, max_ratio: float) -> None:
        self._output = output
        self._name = f"{FAILURES_FOLDER}/{part_name(process)}.parquet"
        self._images = images
        self._max_ratio = max_ratio
        self._rows: dict[str, Row] = {}
        if output.exists(self._name):
            with output.open(self._name) as file:
                self._rows = {row["image_id"]: row for row in pq.read_table(file).to_pylist()}

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, row: Row, error: ImageError) -> None:
        """Notes an image, by its row of the manifest.

        Raises:
            FailureRatioError: there are more than the run allows.
        """
        self._rows[row["image_id"]] = {
            "image_id": row["image_id"],
            "uri": row["uri"],
            "stage": error.stage,
            "error": error.reason,
            "message": str(error),
        }
        if len(self._rows) > self._max_ratio * self._images:
            raise FailureRatioError(
                f"{self.describe()}; {self._max_ratio:.1%} are allowed. The last is {row['uri']}: {error}. Check that "
                "the images are where the manifest says, or set a higher max_failure_ratio; the run goes on where its "
                "state was last saved"
            )

    def describe(self) -> str:
        """How many there are, and why, for people."""
        reasons = Counter(row["error"] for row in self._rows.values())
        counted = ", ".join(f"{reason}: {count}" for reason, count in reasons.most_common())
        return f"{len(self._rows)} of {self._images} images could not be had ({counted})"

    def write(self) -> None:
        """Keeps them in the run's folder."""
        if self._rows:
            with self._output.stage(self._name) as path:
                pq.write_table(pa.Table.from_pylist(list(self._rows.values()), FAILURES_SCHEMA), path)
