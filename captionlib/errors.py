"""The exceptions that captionlib raises on purpose.

CaptionlibError
├── ConfigError            an option or a configuration file is wrong; nothing was started
├── DatasetError           a folder is not a dataset of the expected kind
│   ├── FingerprintError   the folder holds a dataset with a different fingerprint (hash of its configuration)
│   ├── DuplicateIdError   two images in a dataset have the same id
│   └── FailureRatioError  more images failed than the run allows
├── StorageError           files cannot be read or written
├── CheckpointError        a folder is not a checkpoint, or the checkpoint was trained with a different encoder
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
    "TrainingDiverged",
    "TrainingInterrupted",
]


class CaptionlibError(Exception):
    """Base class of all exceptions that captionlib raises on purpose."""


class ConfigError(CaptionlibError):
    """An option or a configuration file is wrong; nothing was started."""


class DatasetError(CaptionlibError):
    """A folder is not a dataset of the expected kind."""


class FingerprintError(DatasetError):
    """A folder holds a dataset with a different fingerprint (hash of its configuration)."""


class DuplicateIdError(DatasetError):
    """Two images in a dataset have the same id."""


class FailureRatioError(DatasetError):
    """More images failed than the run allows."""


class StorageError(CaptionlibError):
    """Files cannot be read or written."""


class CheckpointError(CaptionlibError):
    """A folder is not a checkpoint, or the checkpoint was trained with a different encoder."""


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


class TrainingInterrupted(CaptionlibError):  # noqa: N818 - the user asked for it, so it is not an error
    """Training stopped on Ctrl-C or SIGTERM, after saving its state. The same command resumes it."""


class ImageError(CaptionlibError):
    """An image cannot be read.

    Attributes:
        reason: short category under which the failure is counted, such as `HTTP 404` or `Truncated`.
        stage: step that failed: `fetch` or `decode`, or `image` if the subclass does not define one.
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
