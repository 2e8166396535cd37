"""The exceptions that captionlib raises on purpose.

CaptionlibError
├── ConfigError            an option or a configuration file is wrong; nothing was started
├── DatasetError           a dataset, or the data to import, is invalid or not of the expected kind
│   ├── FingerprintError   the folder holds a dataset with a different fingerprint (hash of its configuration)
│   ├── DamagedShardError  a file of a dataset was changed or damaged after it was written
│   ├── DuplicateIdError   two images in a dataset have the same id
│   ├── EntryError         an entry of the data to import, such as a row of a table, is invalid
│   └── FailureRatioError  more images failed than the run allows
├── StorageError           files cannot be read or written
├── LockError              another process is changing the same folder
├── CheckpointError        a checkpoint is missing or damaged, or does not fit the data or the configuration
├── QueryError             a query cannot be executed
├── BusyError              the server is already processing its maximum number of requests
├── RunnerError            a Beam runner failed or cannot be reached
├── SubprocessError        a helper process, such as Java or an image decoder, failed
├── TrainingDiverged       training stopped because its loss is not finite or the model learns nothing
├── TrainingInterrupted    training stopped on request, after saving its state
└── ImageError             an image cannot be read; the run records the failure and continues
    ├── FetchError         the bytes of the image cannot be fetched
    └── DecodeError        the bytes cannot be decoded as an image

Messages say what happened, what was expected, what was found instead, and what to do.
"""

import difflib
import signal
from collections.abc import Iterable
from typing import ClassVar

__all__ = [
    "BusyError",
    "CaptionlibError",
    "CheckpointError",
    "ConfigError",
    "DamagedShardError",
    "DatasetError",
    "DecodeError",
    "DuplicateIdError",
    "EntryError",
    "FailureRatioError",
    "FetchError",
    "FingerprintError",
    "ImageError",
    "LockError",
    "QueryError",
    "RunnerError",
    "StorageError",
    "SubprocessError",
    "TrainingDiverged",
    "TrainingInterrupted",
    "suggest",
]


class CaptionlibError(Exception):
    """Base class of all exceptions that captionlib raises on purpose."""


class ConfigError(CaptionlibError):
    """An option or a configuration file is wrong; nothing was started."""


class DatasetError(CaptionlibError):
    """A dataset, or the data to import, is invalid or not of the expected kind."""


class FingerprintError(DatasetError):
    """A folder holds a dataset with a different fingerprint (hash of its configuration)."""


class DamagedShardError(DatasetError):
    """A file of a dataset is missing, or was changed or damaged after it was written."""


class DuplicateIdError(DatasetError):
    """Two images in a dataset have the same id."""


class EntryError(DatasetError):
    """An entry of the data to import, such as a row of a table, is invalid.

    Attributes:
        reason: short category under which the entry is counted if it is skipped, such as `invalid url`.
        problem: location of the entry, expected value and actual value.
    """

    def __init__(self, reason: str, problem: str) -> None:
        super().__init__(f"{problem}; correct or remove the entry")
        self.reason = reason
        self.problem = problem


class FailureRatioError(DatasetError):
    """More images failed than the run allows."""


class StorageError(CaptionlibError):
    """Files cannot be read or written."""


class LockError(CaptionlibError):
    """Another process is changing the same folder."""


class CheckpointError(CaptionlibError):
    """A checkpoint is missing or damaged, or does not fit the data or the configuration."""


class QueryError(CaptionlibError):
    """A query cannot be executed."""


class BusyError(CaptionlibError):
    """The server is already processing its maximum number of requests."""


class RunnerError(CaptionlibError):
    """A Beam runner failed or cannot be reached. Finished shards of the output are kept."""


class SubprocessError(CaptionlibError):
    """A helper process, such as Java or an image decoder, failed or cannot be started."""


class TrainingDiverged(CaptionlibError):  # noqa: N818 - reads better than TrainingDivergedError
    """Training stopped because its loss is not finite or the model learns nothing. The best checkpoint is kept."""


class TrainingInterrupted(CaptionlibError):  # noqa: N818 - the user requested it, so it is not an error
    """Training stopped on Ctrl-C or SIGTERM, after saving its state. The same command resumes it.

    Attributes:
        signal_number: the signal that stopped it.
    """

    signal_number: int = signal.SIGINT


class ImageError(CaptionlibError):
    """An image cannot be read.

    Attributes:
        reason: short category under which the failure is counted, such as `NotFound` or `Truncated`.
        stage: step that failed: `fetch`, `decode`, or `image` if it is unknown.
    """

    stage: ClassVar[str] = "image"

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason

    def __reduce__(self) -> tuple[type["ImageError"], tuple[str, str]]:
        return type(self), (self.reason, str(self))


class FetchError(ImageError):
    """The bytes of an image cannot be fetched."""

    stage = "fetch"


class DecodeError(ImageError):
    """The bytes cannot be decoded as an image."""

    stage = "decode"


def suggest(name: str, known: Iterable[str]) -> str:
    """Returns ` (did you mean ...?)` with the most similar known name, or an empty string if none is similar."""
    nearest = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean {nearest[0]}?)" if nearest else ""
