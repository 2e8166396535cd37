"""Locks a folder on any file system, so that only one process at a time changes it.

The lock is a file, which its owner (the process that holds the lock) rewrites every 20 seconds. The lock is stale if
the file has not been rewritten for two minutes, or if the owner ran on this machine and has ended. Any process can take
over a stale lock.
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

_HELD_LOCKS: set[str] = set()  # ids of the locks that this process holds


@contextmanager
def lock_folder(folder: Folder, command: str) -> Iterator[None]:
    """Holds the lock of a folder until the block ends. Errors of other processes show the name of the command.

    Raises:
        LockError: another process holds the lock.
    """
    lock_id = uuid.uuid4().hex
    owner = {"lock_id": lock_id, "command": command, "host": socket.gethostname(), "process": os.getpid()}
    _HELD_LOCKS.add(lock_id)
    try:
        _acquire(folder, owner)
    except BaseException:
        _HELD_LOCKS.discard(lock_id)
        raise
    stop = threading.Event()

    def renew() -> None:
        while not stop.wait(_RENEW_SECONDS):
            with suppress(StorageError):  # the next attempt may succeed before the lock is stale
                if _decode(_read(folder)).get("lock_id") == lock_id:
                    folder.write(LOCK_FILE, _encode(owner))

    thread = threading.Thread(target=renew, name="lock", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        _HELD_LOCKS.discard(lock_id)
        if _decode(_read(folder)).get("lock_id") == lock_id:
            folder.remove_file(LOCK_FILE)


def _acquire(folder: Folder, owner: Mapping[str, Any]) -> None:
    while (content := _read(folder)) is not None:
        current = _decode(content)
        if not _is_stale(current):
            raise _locked_error(folder, current)
        folder.remove_if_equal(LOCK_FILE, content)  # does nothing if another process has replaced the file
    created = folder.create(LOCK_FILE, _encode(owner))
    winner = _decode(_read(folder))
    if not created or winner.get("lock_id") != owner["lock_id"]:  # on some object stores, the last writer wins
        raise _locked_error(folder, winner)


def _is_stale(owner: Mapping[str, Any]) -> bool:
    if owner.get("host") == socket.gethostname():
        process = owner.get("process")
        if not _is_running(process) or (process == os.getpid() and owner.get("lock_id") not in _HELD_LOCKS):
            return True
    renewed = owner.get("renewed")
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
    try:
        return folder.read(LOCK_FILE)
    except (FileNotFoundError, NotADirectoryError):
        return None


def _decode(content: bytes | None) -> dict[str, Any]:
    """Returns the description of the owner; empty if the lock file is missing or damaged."""
    try:
        owner = json.loads(content or b"{}")
    except (ValueError, RecursionError):
        return {}
    return owner if isinstance(owner, dict) else {}


def _encode(owner: Mapping[str, Any]) -> bytes:
    return json.dumps({**owner, "renewed": time.time()}).encode()


def _locked_error(folder: Folder, owner: Mapping[str, Any]) -> LockError:
    if not owner:
        return LockError(f"{folder.uri}: another process removed the lock file just now; run the same command again")
    return LockError(
        f"{folder.uri} is in use by `{owner.get('command')}` (process {owner.get('process')} on "
        f"{owner.get('host')}); wait until it has finished. A lock whose process has ended is released "
        f"automatically, after at most {_STALE_SECONDS / 60:.0f} minutes"
    )
