"""What the errors of file systems mean: whether trying again can help.

Clients of object stores are optional, so their errors are known by name, wherever in their ancestry it stands.
"""

import asyncio
import concurrent.futures
import errno
import ssl
from collections.abc import Mapping
from typing import Any

from captionlib.errors import FetchError

__all__ = ["get_http_status", "is_connection_error", "is_temporary_error", "is_timeout_error"]

_TIMEOUTS = (TimeoutError, asyncio.TimeoutError, concurrent.futures.TimeoutError)  # one class from Python 3.11 on
_FINAL = (FetchError, FileNotFoundError, PermissionError, ssl.SSLCertVerificationError)

_TIMEOUT_NAMES = {"ReadTimeoutError", "ConnectTimeoutError", "Timeout"}  # botocore and requests
_CONNECTION_NAMES = {
    "ClientConnectionError",  # aiohttp
    "ClientPayloadError",
    "ConnectionError",  # botocore and requests, and Python's own
    "HTTPClientError",  # botocore
    "IncompleteReadError",
    "IncompleteRead",  # http.client
    "gaierror",  # socket: a name that cannot be resolved, now
}
_TEMPORARY_STATUS = {408, 425, 429, 500, 502, 503, 504}
_TEMPORARY_ERRNO = {  # what remains of an object store's answer, and of a network file system's trouble
    errno.EAGAIN,
    errno.EBUSY,
    errno.EHOSTUNREACH,
    errno.EIO,
    errno.EMFILE,
    errno.ENETUNREACH,
    errno.ESTALE,
    errno.ETIMEDOUT,
    getattr(errno, "EREMOTEIO", errno.EIO),
}


def is_temporary_error(error: BaseException) -> bool:
    """Whether the same request may work a little later."""
    if isinstance(error, _FINAL):
        return False
    status = get_http_status(error)
    if status is not None:
        return status in _TEMPORARY_STATUS
    return is_timeout_error(error) or is_connection_error(error) or getattr(error, "errno", None) in _TEMPORARY_ERRNO


def get_http_status(error: BaseException) -> int | None:
    """The status that a server answered with, from the error of any client; None if it is about something else."""
    for each in (error, error.__cause__):
        response: Any = getattr(each, "response", None)
        if isinstance(response, Mapping):  # botocore
            statuses = [response.get("ResponseMetadata", {}).get("HTTPStatusCode")]
        else:
            statuses = [getattr(each, "status", None), getattr(each, "status_code", None)]  # aiohttp; Azure
            statuses.append(getattr(response, "status_code", None))  # requests
            if type(each).__name__ == "HttpError":  # gcsfs
                statuses.append(getattr(each, "code", None))
        for status in statuses:
            if isinstance(status, int) and status >= 400:
                return status
    return None


def is_timeout_error(error: BaseException) -> bool:
    return isinstance(error, _TIMEOUTS) or _is_named(error, _TIMEOUT_NAMES)


def is_connection_error(error: BaseException) -> bool:
    return isinstance(error, ConnectionError) or _is_named(error, _CONNECTION_NAMES)


def _is_named(error: BaseException, names: set[str]) -> bool:
    return any(ancestor.__name__ in names for ancestor in type(error).__mro__)
