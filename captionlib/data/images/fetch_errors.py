"""A short reason to count the failures of fetching by, from the errors of any file system."""

import http
import os
from typing import Any

from captionlib.errors import FetchError
from captionlib.storage.remote_errors import get_http_status, is_connection_error, is_timeout_error

__all__ = ["to_fetch_error"]


def to_fetch_error(error: BaseException) -> FetchError:
    """The failure of an image, with a reason that is the same for all that failed alike.

    Messages of clients are dropped: they quote what a server sent, such as the first line of another protocol, the
    target of a redirect or the body of an error. The message has the system's own words for the number of the error.
    """
    if isinstance(error, FileNotFoundError):
        return FetchError("FileNotFoundError", "expected a file, got none at this address; check the address")
    if isinstance(error, PermissionError):
        return FetchError("PermissionError", "expected a file that may be read; check its permissions or credentials")
    if (status := get_http_status(error)) is not None:
        return FetchError(f"HTTP {status}", f"expected the image, got HTTP status {status}{_phrase(status)}")
    if is_timeout_error(error):
        return FetchError("Timeout", "the bytes did not arrive in time; raise loading.fetch.timeout_seconds")
    if is_connection_error(error):
        return FetchError("ConnectionError", f"the connection failed or was cut{_explain(error)}")
    return FetchError(type(error).__name__, f"the file cannot be read: {type(error).__name__}{_explain(error)}")


def _phrase(status: int) -> str:
    try:
        return f" ({http.HTTPStatus(status).phrase})"
    except ValueError:
        return ""


def _explain(error: BaseException) -> str:
    """The system's words for an error's number, where it has one that the system knows."""
    numbers: list[Any] = [getattr(one, "errno", None) for one in (error, getattr(error, "os_error", None))]
    known = [number for number in numbers if isinstance(number, int) and number > 0]
    return f": {os.strerror(known[0])}" if known else ""
