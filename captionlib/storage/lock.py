"""Locks a folder on any file system, so that only one process at a time changes it.

The lock is a file. The process that holds the lock rewrites the file every 20 seconds. A lock is stale if its file has
not been rewritten for two minutes, or if its process ran on this machine and has ended. Any process can take over a
stale lock.
"""

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from captionlib.errors import LockError, StorageError
from captionlib.storage.folders import Folder

__all__ = ["LOCK_FILE", "lock_folder"]

LOCK_FILE = "_lock"
_RENEW_SECONDS = 20.0
_STALE_SECONDS = 120.0


@contextmanager
def lock_folder(folder: Folder, command: str) -> Iterator[None]:
    """Holds the lock of a folder until the block ends.

    Args:
        folder: folder to lock.
        command: the name of this command, for the error messages of other processes that need the folder.

    Raises:
        LockError: another process holds the lock.
    """
    lock_id = uuid.uuid4().hex
    holder = {"owner": lock_id, "command": command, "host": socket.gethostname(), "process": os.getpid()}
    _acquire(folder, holder)
    stop = threading.Event()

    def renew() -> None:
        while not stop.wait(_RENEW_SECONDS):
            with suppress(StorageError):  # the next attempt may succeed before the lock is stale
                if _decode(_read(folder)).get("owner") == lock_id:
                    folder.write(LOCK_FILE, _encode(holder))

    thread = threading.Thread(target=renew, name="lock", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        if _decode(_read(folder)).get("owner") == lock_id:
            folder.remove_file(LOCK_FILE)


def _acquire(folder: Folder, holder: Mapping[str, Any]) -> None:
    while (content := _read(folder)) is not None:
        current = _decode(content)
        if not _is_stale(current):
            raise _locked_error(folder, current)
        folder.remove_equal_file(LOCK_FILE, content)  # does nothing if another process has replaced the file
    created = folder.create(LOCK_FILE, _encode(holder))
    winner = _decode(_read(folder))
    if not created or winner.get("owner") != holder["owner"]:  # on some object stores, the last writer wins
        raise _locked_error(folder, winner)


def _is_stale(holder: Mapping[str, Any]) -> bool:
    if holder.get("host") == socket.gethostname() and not _is_running(holder.get("process")):
        return True
    renewed = holder.get("renewed")
    return not (isinstance(renewed, int | float) and time.time() - renewed <= _STALE_SECONDS)


def _is_running(process: Any) -> bool:
    try:
        os.kill(int(process), 0)
    except PermissionError:  # a process of a different user
        return True
    except (ProcessLookupError, TypeError, ValueError, OverflowError):
        return False
    return True


def _read(folder: Folder) -> bytes | None:
    """Returns the content of the lock file, or None if there is no lock."""
    try:
        return folder.read(LOCK_FILE)
    except (FileNotFoundError, NotADirectoryError):
        return None


def _decode(content: bytes | None) -> dict[str, Any]:
    """Returns the description of the holder in a lock file; empty if the file is missing or damaged."""
    try:
        holder = json.loads(content or b"{}")
    except (ValueError, RecursionError):
        return {}
    return holder if isinstance(holder, dict) else {}


def _encode(holder: Mapping[str, Any]) -> bytes:
    return json.dumps({**holder, "renewed": time.time()}).encode()


def _locked_error(folder: Folder, holder: Mapping[str, Any]) -> LockError:
    if not holder:
        return LockError(f"{folder.uri}: another process removed the lock file just now; run the same command again")
    return LockError(
        f"{folder.uri} is in use by `{holder.get('command')}` (process {holder.get('process')} on "
        f"{holder.get('host')}); wait until it has finished. A lock whose process has ended is released "
        f"automatically, after at most {_STALE_SECONDS / 60:.0f} minutes"
    )
