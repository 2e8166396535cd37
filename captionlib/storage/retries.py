"""Retries for requests to a file system that fail for a temporary reason.

The clients of object stores retry for a second or two. The retries here outlast longer disturbances: an endpoint that
restarts, or a bucket that answers SlowDown to a thousand workers at once.
"""

from collections.abc import Callable
from typing import TypeVar

from tenacity import RetryError, Retrying, retry_if_exception, stop_after_delay, wait_exponential, wait_random

from captionlib.errors import StorageError
from captionlib.storage.remote_errors import is_temporary_error

__all__ = ["call_with_retries"]

Result = TypeVar("Result")

_MAX_SECONDS = 120.0
_FIRST_WAIT_SECONDS = 0.5
_MAX_WAIT_SECONDS = 15.0

_retrying = Retrying(
    retry=retry_if_exception(is_temporary_error),
    stop=stop_after_delay(_MAX_SECONDS),
    # The random part spreads out workers that failed at the same moment.
    wait=wait_exponential(_FIRST_WAIT_SECONDS, max=_MAX_WAIT_SECONDS) + wait_random(0, _FIRST_WAIT_SECONDS),
)


def call_with_retries(address: str, action: Callable[[], Result]) -> Result:
    """Calls a function and retries it with backoff while it fails with temporary errors.

    Args:
        address: the file or folder, for error messages.
        action: a read, or a write that replaces everything an earlier call wrote.

    Raises:
        StorageError: every attempt within two minutes failed with a temporary error.
    """
    try:
        return _retrying(action)
    except RetryError as error:
        reason = error.last_attempt.exception()
        raise StorageError(
            f"{address}: the storage failed for {_MAX_SECONDS:.0f} seconds, most recently with "
            f"{type(reason).__name__}: {reason}; run the same command again later, it resumes where it stopped"
        ) from reason
