"""Asks a file system again, a little later each time, for what it could not give a moment ago.

The clients of object stores try again by themselves, for a second or two. This outlasts what takes longer: an endpoint
that restarts, a bucket that answers SlowDown to a thousand workers at once.
"""

from collections.abc import Callable
from typing import TypeVar

from tenacity import RetryError, Retrying, retry_if_exception, stop_after_delay, wait_exponential, wait_random

from captionlib.errors import StorageError
from captionlib.storage.remote_errors import is_temporary_error

__all__ = ["call_with_retries"]

Result = TypeVar("Result")

_PATIENCE_SECONDS = 120.0
_FIRST_WAIT_SECONDS = 0.5
_LONGEST_WAIT_SECONDS = 15.0

_retrying = Retrying(
    retry=retry_if_exception(is_temporary_error),
    stop=stop_after_delay(_PATIENCE_SECONDS),
    # A random part keeps workers that failed together from coming back together.
    wait=wait_exponential(_FIRST_WAIT_SECONDS, max=_LONGEST_WAIT_SECONDS) + wait_random(0, _FIRST_WAIT_SECONDS),
)


def call_with_retries(address: str, action: Callable[[], Result]) -> Result:
    """What an action gives, which may be run several times.

    Args:
        address: what it is about, for the error.
        action: a read, or a write that replaces the whole of what it wrote before.

    Raises:
        StorageError: it failed for two minutes, always for reasons that pass.
    """
    try:
        return _retrying(action)
    except RetryError as error:
        reason = error.last_attempt.exception()
        raise StorageError(
            f"{address}: the storage did not do its part for {_PATIENCE_SECONDS:.0f} seconds, the last answer was "
            f"{type(reason).__name__}: {reason}; run the same command again when it does, it goes on where it stopped"
        ) from reason
