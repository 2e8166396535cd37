"""Every error that captionlib raises on purpose.

CaptionlibError
├── ConfigError            an option or a configuration file is wrong: nothing was started
├── DatasetError           a folder is not the dataset that was expected
│   ├── FingerprintError   the folder holds the output of another configuration
│   ├── DuplicateIdError   two images of one dataset have the same id
│   └── FailureRatioError  more images failed than the run allows
├── StorageError         files cannot be read or written for longer than anyone waits
├── CheckpointError        a folder is not a checkpoint, or is one of another encoder
├── QueryError             a query that cannot be answered
├── RunnerError            a cluster gave a pipeline up, or cannot be reached
└── ImageError             one image cannot be had: it becomes a failure row, never the end of a run
    ├── FetchError         its bytes cannot be read
    └── DecodeError        its bytes are no image, or one that is not allowed

A message says what, expected, got, and what to do.
"""

from typing import ClassVar

__all__ = [
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
]


class CaptionlibError(Exception):
    """Base of all errors that captionlib raises on purpose."""


class ConfigError(CaptionlibError):
    """An option or a configuration file is wrong."""


class DatasetError(CaptionlibError):
    """A folder is not the dataset that was expected."""


class FingerprintError(DatasetError):
    """A folder holds the output of another configuration."""


class DuplicateIdError(DatasetError):
    """Two images of one dataset have the same id."""


class FailureRatioError(DatasetError):
    """More images failed than the run allows."""


class StorageError(CaptionlibError):
    """Files cannot be read or written, for longer than anyone waits."""


class CheckpointError(CaptionlibError):
    """A folder is not a checkpoint, or not one for these features."""


class QueryError(CaptionlibError):
    """A query that cannot be answered."""


class RunnerError(CaptionlibError):
    """A cluster gave a pipeline up, or cannot be reached; the shards that are done are kept."""


class ImageError(CaptionlibError):
    """One image cannot be had.

    Attributes:
        reason: a short class of the error to count failures by, such as `HTTPError 404` or `UnidentifiedImageError`.
    """

    stage: ClassVar[str] = "image"

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason

    def __reduce__(self) -> tuple[type["ImageError"], tuple[str, str]]:
        return type(self), (self.reason, str(self))


class FetchError(ImageError):
    """The bytes of an image cannot be read."""

    stage = "fetch"


class DecodeError(ImageError):
    """The bytes of an image are no image, or one that is not allowed."""

    stage = "decode"
