"""A short reason to count the failures of fetching by, from the errors of any file system."""

from captionlib.errors import FetchError
from captionlib.storage.remote_errors import http_status, is_connection, is_timeout

__all__ = ["to_fetch_error"]


def to_fetch_error(error: BaseException) -> FetchError:
    """The failure of an image, with a reason that is the same for all that failed alike."""
    message = str(error) or type(error).__name__
    if isinstance(error, (FileNotFoundError, PermissionError)):
        return FetchError(type(error).__name__, message)
    if (status := http_status(error)) is not None:
        return FetchError(f"HTTP {status}", message)
    if is_timeout(error):
        return FetchError("Timeout", str(error) or "the bytes did not come in time")
    return FetchError("ConnectionError" if is_connection(error) else type(error).__name__, message)
