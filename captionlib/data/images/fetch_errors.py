"""A short reason to count the failures of fetching by, from the errors of any file system."""

from captionlib.errors import FetchError
from captionlib.storage.remote_errors import get_http_status, is_connection_error, is_timeout_error

__all__ = ["to_fetch_error"]


def to_fetch_error(error: BaseException) -> FetchError:
    """The failure of an image, with a reason that is the same for all that failed alike."""
    message = str(error) or type(error).__name__
    if isinstance(error, (FileNotFoundError, PermissionError)):
        return FetchError(type(error).__name__, message)
    if (status := get_http_status(error)) is not None:
        return FetchError(f"HTTP {status}", message)
    if is_timeout_error(error):
        return FetchError("Timeout", str(error) or "the bytes did not come in time")
    return FetchError("ConnectionError" if is_connection_error(error) else type(error).__name__, message)
