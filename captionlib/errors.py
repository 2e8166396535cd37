"""The errors that captionlib raises on purpose.

CaptionlibError
├── ConfigError            an option or a configuration file is wrong; nothing was started
├── DatasetError           a folder is not the dataset that a stage expects
│   ├── FingerprintError   the folder holds the output of another configuration
│   ├── DuplicateIdError   two images of a dataset have the same id
│   └── FailureRatioError  more images failed than the run allows
├── StorageError           files cannot be read or written
├── CheckpointError        a folder is not a checkpoint, or its encoder does not match
├── QueryError             a query cannot be executed
├── BusyError              too many requests at once
├── RunnerError            a Beam runner failed or cannot be reached
├── SubprocessError        a helper process, such as Java or an image decoder, failed
├── TrainingInterrupted    training stopped on request, after saving its state
└── ImageError             an image cannot be read; it becomes a failure row and the run continues
    ├── FetchError         its bytes cannot be fetched
    └── DecodeError        its bytes are not a supported image

A message says what happened, what was expected, what was found instead, and what to do.
"""

from typing import ClassVar

__all__ = [
    "BusyError",
    "CaptionlibError",
    "CheckpointError",
    "ConfigError",
    "DatasetError",
    "DecodeError",
    "DuplicateIdError",
    "FailureRatioError",
    "FetchError",
    "FingerprintError",
    "ImageError",
    "QueryError",
    "RunnerError",
    "StorageError",
    "SubprocessError",
    "TrainingInterrupted",
]


class CaptionlibError(Exception):
    """Base class of all errors that captionlib raises on purpose."""


class ConfigError(CaptionlibError):
    """An option or a configuration file is wrong; nothing was started."""


class DatasetError(CaptionlibError):
    """A folder is not the dataset that a stage expects."""


class FingerprintError(DatasetError):
    """A folder holds the output of another configuration."""


class DuplicateIdError(DatasetError):
    """Two images of a dataset have the same id."""


class FailureRatioError(DatasetError):
    """More images failed than the run allows."""


class StorageError(CaptionlibError):
    """Files cannot be read or written."""


class CheckpointError(CaptionlibError):
    """A folder is not a checkpoint, or the checkpoint belongs to another encoder."""


class QueryError(CaptionlibError):
    """A query cannot be executed."""


class BusyError(CaptionlibError):
    """The server is processing as many requests as it accepts at once."""


class RunnerError(CaptionlibError):
    """A Beam runner failed or cannot be reached; finished shards are kept."""


class SubprocessError(CaptionlibError):
    """A helper process, such as Java or an image decoder, cannot be started or failed."""


class TrainingInterrupted(CaptionlibError):  # noqa: N818 - the user requested it
    """Training stopped on Ctrl-C or SIGTERM, after saving its state; the same command resumes it."""


class ImageError(CaptionlibError):
    """An image cannot be read.

    Attributes:
        reason: a short class of the error by which failures are counted, such as `HTTP 404` or `Truncated`.
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
    """The bytes of an image are not a supported image."""

    stage = "decode"
