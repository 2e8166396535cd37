import errno
import pickle
import shutil
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from uuid import uuid4

import fsspec
import pytest
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem
from tenacity import stop_after_attempt

from captionlib.errors import ConfigError, StorageError
from captionlib.storage import retries
from captionlib.storage.folders import TEMPORARY_FOLDER, Folder, resolve_address, scratch_folder, stage_file, write_file
from captionlib.storage.retries import find_file_type


class RenamingFileSystem(DirFileSystem):
    """A file system that is not local and has no atomic PUT, so files are published by renaming."""

    protocol = "renaming"

    def __init__(self, **_options: object) -> None:
        super().__init__("/", LocalFileSystem())


fsspec.register_implementation("renaming", RenamingFileSystem)


@pytest.fixture(params=["local", "memory", "renaming"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Folder:
    addresses = {
        "local": str(tmp_path / "folder"),
        "memory": f"memory://{uuid4().hex}",
        "renaming": f"renaming:/{tmp_path}/folder",
    }
    return Folder(addresses[request.param])


def test_files_are_written_read_listed_and_removed(folder: Folder) -> None:
    folder.write("a.json", b"1")
    folder.write("sub/b.json", b"2")
    folder.write("sub/c.json", b"3")
    assert folder.read("a.json") == b"1"
    assert list(folder.read_many(["a.json", "never was", "sub/c.json"])) == [b"1", b"3"]
    assert list(folder.read_many(["never was"])) == []
    assert list(folder.read_many([])) == []
    assert set(folder.list()) - {TEMPORARY_FOLDER} == {"a.json", "sub"}
    assert folder.list("sub") == ["b.json", "c.json"]
    assert folder.list("nowhere") == []
    folder.remove("sub")
    folder.remove("never was")
    folder.remove_file("never was")
    assert folder.list("sub") == []
    assert folder.exists("a.json")
    assert not folder.exists("sub/b.json")
    folder.remove_file("a.json")
    assert not folder.exists("a.json")


def test_write_replaces_an_existing_file(folder: Folder) -> None:
    folder.write("a", b"old")
    folder.write("a", b"new")
    assert folder.read("a") == b"new"


def test_write_succeeds_if_another_process_removes_the_temporary_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder is removed after `mkdir` has found it and before `mkdir` has checked that it is a folder."""
    is_dir = Path.is_dir
    (tmp_path / TEMPORARY_FOLDER).mkdir()

    def remove_first(path: Path) -> bool:
        if is_dir(path) and path.name == TEMPORARY_FOLDER:
            path.rmdir()
        return is_dir(path)

    monkeypatch.setattr(Path, "is_dir", remove_first)
    Folder(tmp_path).write("a.json", b"content")
    assert (tmp_path / "a.json").read_bytes() == b"content"


def test_file_in_place_of_the_temporary_folder_is_an_error(tmp_path: Path) -> None:
    (tmp_path / TEMPORARY_FOLDER).touch()
    with pytest.raises(StorageError, match="__temporary cannot be accessed: File exists"):
        Folder(tmp_path).write("a.json", b"content")


def test_stage_publishes_nothing_if_the_block_raises(folder: Folder) -> None:
    with pytest.raises(RuntimeError, match="died"), folder.stage("a") as path:
        path.write_bytes(b"half")
        raise RuntimeError("died")
    assert not folder.exists("a")
    assert folder.list(TEMPORARY_FOLDER) == []


def test_folder_pickles_as_its_address(folder: Folder) -> None:
    folder.write("a", b"1")
    assert pickle.loads(pickle.dumps(folder)).read("a") == b"1"


def test_pickled_relative_folder_is_independent_of_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Folder("data").write("a", b"1")
    pickled = pickle.dumps(Folder("data"))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert pickle.loads(pickled).read("a") == b"1"


@pytest.mark.parametrize("address", ["memory://bucket/data", "https://host/a.safetensors"])
def test_resolve_address_keeps_remote_addresses(address: str) -> None:
    assert resolve_address(address) == address


def test_read_raises_file_not_found(folder: Folder) -> None:
    with pytest.raises(FileNotFoundError):
        folder.read("none")


@pytest.mark.parametrize("address", ["{tmp_path}/new/scores.parquet", "memory://{tmp_path}/scores.parquet"])
def test_write_file_leaves_no_temporary_files(tmp_path: Path, address: str) -> None:
    address = address.format(tmp_path=tmp_path)
    for content in (b"first", b"second"):
        write_file(address, content)
    folder = Folder(address.rpartition("/")[0])
    assert folder.list() == ["scores.parquet"]
    assert folder.read("scores.parquet") == b"second"


@pytest.mark.parametrize("address", ["{tmp_path}/scores.csv", "memory://{tmp_path}/scores.csv"])
def test_stage_file_leaves_nothing_if_the_block_raises(tmp_path: Path, address: str) -> None:
    address = address.format(tmp_path=tmp_path)
    with pytest.raises(RuntimeError, match="died"), stage_file(address) as path:
        path.write_bytes(b"half")
        raise RuntimeError("died")
    assert Folder(address.rpartition("/")[0]).list() == []


def test_file_of_a_killed_process_is_used_again(tmp_path: Path) -> None:
    destination = tmp_path / "scores.csv"
    with stage_file(destination) as path:
        path.write_bytes(b"first")
    path.write_bytes(b"half")  # the process was killed here
    with stage_file(destination) as staged:
        staged.write_bytes(b"second")
    assert [file.name for file in tmp_path.iterdir()] == ["scores.csv"]
    assert destination.read_bytes() == b"second"


def test_two_writers_of_a_file_do_not_mix(tmp_path: Path) -> None:
    destination = tmp_path / "scores.csv"
    with stage_file(destination) as one, stage_file(destination) as other:
        one.write_bytes(b"one")
        other.write_bytes(b"other")
    assert [file.name for file in tmp_path.iterdir()] == ["scores.csv"]
    assert destination.read_bytes() == b"one"


def test_write_file_reports_an_unwritable_address(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match=r"file/scores\.parquet cannot be written: "):
        write_file(tmp_path / "file" / "scores.parquet", b"")


@pytest.mark.parametrize(
    "address",
    [
        "reference::http://127.0.0.1:9/refs.json",
        "reference://a::http://127.0.0.1:9/refs.json",
        "simplecache::s3://bucket/folder",
        "zip://inside::/tmp/a.zip",
        "s3://bucket/a::zip://b",
        "reference://a",
        "ZIP://a",
    ],
)
def test_chains_and_unsafe_protocols_are_rejected(address: str) -> None:
    for refuse in (lambda: Folder(address).list(), lambda: resolve_address(address), lambda: write_file(address, b"")):
        with pytest.raises(ConfigError, match="download or unpack the file first"):
            refuse()


def test_unknown_protocol_is_rejected() -> None:
    with pytest.raises(ConfigError, match="nonsense://folder cannot be opened"):
        Folder("nonsense://folder").list()


def test_a_file_that_cannot_be_checked_is_not_missing(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert not Folder(tmp_path / "file").exists("a")
    assert not Folder(tmp_path).exists("a" * 300)
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(StorageError, match=r"loop cannot be accessed: Too many levels of symbolic links"):
        Folder(tmp_path).exists("loop")


@pytest.fixture
def web_server() -> Iterator[str]:
    """The URL of a web server whose responses have the status that the path contains."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            status = int(self.path.rpartition("/")[2])
            content = b'<a href="200">link</a>' if self.path.startswith("/links/") else b""
            self.send_response(status)
            self.send_header("Content-Type", "text/html" if content else "image/jpeg")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content if self.command == "GET" else b"")

        do_HEAD = do_GET  # noqa: N815 - the name that the server calls

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_failure_of_a_web_server_does_not_mean_that_a_file_is_missing(
    web_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retries._retrying, "stop", stop_after_attempt(1))
    folder = Folder(web_server)
    assert folder.exists("200")
    assert not folder.exists("404")
    assert not folder.exists("410")
    assert not folder.exists("403")  # a public bucket that cannot be listed answers 403 for a missing file
    with pytest.raises(StorageError, match=r"/403 cannot be accessed: 403, message='Forbidden'"):
        find_file_type(folder.fs, folder.path("403"))
    with pytest.raises(StorageError, match=r"/401 cannot be accessed: 401, message='Unauthorized'"):
        folder.exists("401")
    with pytest.raises(StorageError, match=r"/500: the storage failed .* 500, message='Internal Server Error'"):
        folder.exists("500")
    with pytest.raises(StorageError, match=r"http://127\.0\.0\.1:1/a: the storage failed"):
        Folder("http://127.0.0.1:1").exists("a")
    with pytest.raises(StorageError, match=r"/403 cannot be accessed"):
        folder.open("403")
    with pytest.raises(StorageError, match=r"/403 cannot be accessed"):
        folder.read("403")


def test_unknown_host_is_reported_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    with pytest.raises(StorageError, match=r"http://typo\.example/a cannot be accessed: Name or service not known"):
        Folder("http://typo.example").exists("a")


@pytest.mark.parametrize("name", ["a\0b", "\ud800"])
def test_file_with_an_impossible_name_does_not_exist(tmp_path: Path, name: str) -> None:
    assert not Folder(tmp_path).exists(name)


def test_web_page_with_links_is_a_directory(web_server: str) -> None:
    fs = Folder(web_server).fs
    assert find_file_type(fs, f"{web_server}/links/200") == "directory"
    assert find_file_type(fs, f"{web_server}/200") == "file"


@pytest.mark.parametrize("address", ["", Path("x\udce9")])
def test_empty_addresses_and_names_that_are_not_unicode_are_rejected(address: str | Path) -> None:
    for call in (lambda: Folder(address).list(), lambda: Folder(address).write("a", b"")):
        with pytest.raises(ConfigError, match=r"got an empty string|'x\\udce9': expected a name in UTF-8"):
            call()


def test_root_folder_keeps_its_address() -> None:
    assert (Folder("/").uri, Folder("//").uri, Folder("/tmp/").uri) == ("/", "/", "/tmp")


def test_local_path_may_contain_double_colons(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Folder(tmp_path / "zip::a").write("b::c", b"1")
    assert Folder(tmp_path / "zip::a").read("b::c") == b"1"
    monkeypatch.chdir(tmp_path)
    Folder("run::1").write("a", b"2")
    assert (tmp_path / "run::1" / "a").read_bytes() == b"2"


@pytest.mark.parametrize("removed", ["", TEMPORARY_FOLDER])
def test_folder_that_is_removed_while_a_file_is_written_is_named(tmp_path: Path, removed: str) -> None:
    message = "folder was removed or moved while part was being written; run the same command again"
    with pytest.raises(StorageError, match=message), Folder(tmp_path / "folder").stage("part") as path:
        path.write_bytes(b"1")
        shutil.rmtree(tmp_path / "folder" / removed)


def test_missing_file_of_the_writer_is_not_blamed_on_the_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), Folder(tmp_path / "folder").stage("part"):
        (tmp_path / "image.jpg").read_bytes()


def test_move_ignores_a_file_that_was_moved_but_no_other_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Folder(tmp_path)
    folder.move("missing", "new")
    folder.write("old", b"1")

    def fail(*_: object) -> None:
        raise FileNotFoundError

    with monkeypatch.context() as patch, pytest.raises(FileNotFoundError):
        patch.setattr(Path, "replace", fail)
        folder.move("old", "new")
    assert folder.read("old") == b"1"


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
def test_full_disk_of_temporary_files_is_named(code: int) -> None:
    with pytest.raises(StorageError, match=r"captionlib-\S+ cannot be accessed"), scratch_folder() as scratch:
        raise OSError(code, "disk")
    assert not scratch.exists()
