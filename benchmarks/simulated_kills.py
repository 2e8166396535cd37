"""Simulates that a process is killed. Benchmarks and tests use it."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

from captionlib.storage.folders import Folder

__all__ = ["WRITES", "Killed", "kill_after"]

WRITES = ("_publish_local", "remove", "remove_file", "remove_if_equal", "move")
"""The methods of `Folder` that change files."""


class Killed(BaseException):
    """The process is killed. Later storage calls fail as well, so no cleanup reaches the storage."""


@contextmanager
def kill_after(calls: int, methods: Sequence[str] = (*WRITES, "read", "remove_temporary_files")) -> Iterator[None]:
    """Kills the process before a storage call, after `calls` calls of these methods of `Folder`."""
    left = calls

    def wrap(original: Any) -> Any:
        def call(*arguments: Any) -> Any:
            nonlocal left
            left -= 1
            if left < 0:
                raise Killed
            return original(*arguments)

        return call

    with ExitStack() as stack:
        for name in methods:
            stack.enter_context(mock.patch.object(Folder, name, wrap(getattr(Folder, name))))
        yield
