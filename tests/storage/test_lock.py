import json
import os
import subprocess
import sys
import threading
from contextlib import ExitStack
from pathlib import Path
from uuid import uuid4

import pytest

from captionlib.errors import LockError
from captionlib.storage import lock
from captionlib.storage.folders import Folder
from captionlib.storage.lock import LOCK_FILE, lock_folder


@pytest.fixture(params=["local", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Folder:
    return Folder(tmp_path / "folder" if request.param == "local" else f"memory://{uuid4().hex}")


def test_second_holder_is_refused_until_the_first_has_finished(folder: Folder) -> None:
    refused = pytest.raises(LockError, match=r"in use by `update` \(process \d+ on")
    with lock_folder(folder, "update"), refused, lock_folder(folder, "remove"):
        pass
    with lock_folder(folder, "remove"):
        assert folder.exists(LOCK_FILE)
    assert not folder.exists(LOCK_FILE)


def test_lock_is_released_after_an_error(folder: Folder) -> None:
    with pytest.raises(ZeroDivisionError), lock_folder(folder, "update"):
        raise ZeroDivisionError
    assert not folder.exists(LOCK_FILE)


def test_lock_of_a_process_that_has_ended_is_taken_over(folder: Folder) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    with lock_folder(folder, "update"):
        held = json.loads(folder.read(LOCK_FILE))
    folder.write(LOCK_FILE, json.dumps({**held, "process": ended.pid}).encode())
    with lock_folder(folder, "update"):
        assert json.loads(folder.read(LOCK_FILE))["process"] == os.getpid()


def test_lock_of_another_machine_is_taken_over_once_it_is_no_longer_renewed(folder: Folder) -> None:
    with lock_folder(folder, "update"):
        held = {**json.loads(folder.read(LOCK_FILE)), "host": "another"}
    folder.write(LOCK_FILE, json.dumps(held).encode())
    with pytest.raises(LockError, match="on another"), lock_folder(folder, "update"):
        pass
    folder.write(LOCK_FILE, json.dumps({**held, "renewed": held["renewed"] - 1000}).encode())
    with lock_folder(folder, "update"):
        pass


DAMAGED = [
    *(b"", b"\xff{", b"[1]", b"[" * 100_000, b"{}"),
    *(b'{"renewed": "today"}', b'{"renewed": null, "process": 1e99}', b'{"renewed": NaN}'),
]


@pytest.mark.parametrize("content", DAMAGED)
def test_damaged_lock_is_replaced(folder: Folder, content: bytes) -> None:
    folder.write(LOCK_FILE, content)
    with lock_folder(folder, "update"):
        assert json.loads(folder.read(LOCK_FILE))["command"] == "update"


def test_lock_is_renewed(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "_RENEW_SECONDS", 0.01)
    with lock_folder(folder, "update"):
        first = json.loads(folder.read(LOCK_FILE))["renewed"]
        for _ in range(500):
            if json.loads(folder.read(LOCK_FILE))["renewed"] > first:
                return
            threading.Event().wait(0.01)
    pytest.fail("the lock was not renewed")


def test_lock_that_another_process_took_over_meanwhile_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, is_stale = Folder(tmp_path), lock._is_stale
    folder.write(LOCK_FILE, b"{}")

    def take_over(holder: dict[str, object]) -> bool:
        result = is_stale(holder)
        monkeypatch.setattr(lock, "_is_stale", is_stale)
        stack.enter_context(lock_folder(folder, "first"))
        return result

    monkeypatch.setattr(lock, "_is_stale", take_over)
    with ExitStack() as stack, pytest.raises(LockError, match="in use by `first`"), lock_folder(folder, "second"):
        pass


def count_holders(folder: Folder) -> int:
    """Returns how many of eight threads that lock a folder at once succeed."""
    start, end = threading.Barrier(8), threading.Barrier(8)
    results: list[bool] = []

    def hold() -> None:
        start.wait()
        try:
            with lock_folder(folder, "update"):
                results.append(True)
                end.wait(10)
        except LockError:
            results.append(False)
            end.wait(10)

    threads = [threading.Thread(target=hold) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(results)


def test_only_one_of_many_concurrent_holders_succeeds(folder: Folder) -> None:
    assert count_holders(folder) == 1


def test_only_one_of_many_concurrent_holders_takes_a_stale_lock_over(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    for _ in range(20):
        folder.write(LOCK_FILE, b"{}")
        assert count_holders(folder) == 1


def test_lock_that_is_removed_at_once_is_an_error_without_a_holder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Folder, "create", lambda *_: True)  # as if the folder had been removed afterwards
    with (
        pytest.raises(LockError, match="another process removed the lock file just now; run the same"),
        lock_folder(Folder(tmp_path), "a"),
    ):
        pass
