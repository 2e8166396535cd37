"""Classifies the exceptions that file systems raise.

Object store clients are optional dependencies, so their exceptions are recognized by class name.
"""

import asyncio
import concurrent.futures
import errno
import ssl
import time
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from typing import Any

from captionlib.errors import FetchError

__all__ = ["get_http_status", "get_retry_after", "is_connection_error", "is_temporary_error", "is_timeout_error"]

_CONNECTION_ERROR_NAMES = {
    "ClientConnectionError",  # aiohttp
    "ClientPayloadError",
    "ConnectionError",  # botocore, requests and Python
    "HTTPClientError",  # botocore
    "IncompleteReadError",
    "IncompleteRead",  # http.client
    "gaierror",  # socket: name resolution failed
}
_TEMPORARY_STATUS = {408, 425, 429, 500, 502, 503, 504}
_TEMPORARY_ERRNO = {  # raised by network file systems, and by object store clients that report only an errno
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
    """Returns whether the same request may succeed later. A FetchError is permanent: it is raised after retries."""
    if isinstance(error, FetchError | FileNotFoundError | PermissionError | ssl.SSLCertVerificationError):
        return False
    status = get_http_status(error)
    if status is not None:
        return status in _TEMPORARY_STATUS
    return is_timeout_error(error) or is_connection_error(error) or getattr(error, "errno", None) in _TEMPORARY_ERRNO


def get_http_status(error: BaseException) -> int | None:
    """Returns the HTTP error status (400 or more) that caused an exception, or None if the cause is different."""
    for exception in (error, error.__cause__):
        response: Any = getattr(exception, "response", None)
        if isinstance(response, Mapping):  # botocore
            statuses = [response.get("ResponseMetadata", {}).get("HTTPStatusCode")]
        else:
            statuses = [getattr(exception, "status", None), getattr(exception, "status_code", None)]  # aiohttp; Azure
            statuses.append(getattr(response, "status_code", None))  # requests
            if type(exception).__name__ == "HttpError":  # gcsfs
                statuses.append(getattr(exception, "code", None))
        for status in statuses:
            if isinstance(status, int) and status >= 400:
                return status
    return None


def get_retry_after(error: BaseException) -> float | None:
    """Returns the seconds to wait according to the header `Retry-After`, or None if it is missing or invalid."""
    for exception in (error, error.__cause__):
        response: Any = getattr(exception, "response", None)
        if isinstance(response, Mapping):  # botocore
            headers = response.get("ResponseMetadata", {}).get("HTTPHeaders")
        else:
            headers = getattr(exception, "headers", None) or getattr(response, "headers", None)  # aiohttp; requests
        values = [value for name, value in dict(headers or {}).items() if str(name).lower() == "retry-after"]
        for value in map(str, values):
            if value.strip().isdecimal():
                return float(value)
            try:  # a date instead of a number of seconds
                return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
            except ValueError:
                continue
    return None


def is_timeout_error(error: BaseException) -> bool:
    timeouts = (TimeoutError, asyncio.TimeoutError, concurrent.futures.TimeoutError)  # one class since Python 3.11
    return isinstance(error, timeouts) or _has_ancestor(error, {"ReadTimeoutError", "ConnectTimeoutError", "Timeout"})


def is_connection_error(error: BaseException) -> bool:
    return isinstance(error, ConnectionError) or _has_ancestor(error, _CONNECTION_ERROR_NAMES)


def _has_ancestor(error: BaseException, names: set[str]) -> bool:
    return any(ancestor.__name__ in names for ancestor in type(error).__mro__)
