import asyncio
import gc
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from click.testing import CliRunner

from captionlib.config import to_dict
from captionlib.errors import CheckpointError, ConfigError, DatasetError
from captionlib.serving.server import listen
from captionlib.serving.startup import AppConfig
from jobs import serve
from jobs.cli import captionlib
from tests.serving.example_site import make_site


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server_socket:
        port: int = server_socket.getsockname()[1]
        return port


def get(url: str) -> bytes:
    for _ in range(1200):
        try:
            with urllib.request.urlopen(url, timeout=10) as response:
                content: bytes = response.read()
                return content
        except urllib.error.HTTPError:
            raise
        except OSError:
            time.sleep(0.1)
    raise AssertionError(f"{url} does not respond")


def wait_for_end(session: int) -> None:
    """Waits until no process of a session is left."""
    for _ in range(100):
        try:
            os.killpg(session, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    raise AssertionError("a process is left")


@pytest.mark.parametrize(("workers", "number"), [(1, signal.SIGINT), (2, signal.SIGTERM)])
def test_index_is_served_on_loopback(tmp_path: Path, workers: int, number: signal.Signals) -> None:
    make_site(tmp_path, 10, with_models=False)
    port = free_port()
    command = [sys.executable, "-m", "captionlib", "serve", str(tmp_path / "index"), "--port", str(port)]
    command += ["--workers", str(workers), "--thumbnails", str(tmp_path / "thumbnails")]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        try:
            assert json.loads(get(f"http://127.0.0.1:{port}/health"))["captions"] == 10
            assert b"a dog and a cat" in get(f"http://localhost:{port}/?q=dog")
            assert get(f"http://127.0.0.1:{port}/thumbnail/small?id=im0").startswith(b"\xff\xd8\xff")
            with pytest.raises(urllib.error.HTTPError, match="422"):
                get(f"http://127.0.0.1:{port}/api/v1/search?q=dog&limit=1000")
        finally:
            process.send_signal(number)
            stdout, stderr = process.communicate(timeout=60)
    wait_for_end(process.pid)
    assert stdout.startswith(f"Serving {tmp_path / 'index'} at http://127.0.0.1:{port}/.")
    assert (process.returncode, stderr) == (128 + number, "Stopped.\n")


@pytest.mark.parametrize("workers", [1, 2])
def test_startup_errors_are_raised_in_the_parent(tmp_path: Path, workers: int) -> None:
    make_site(tmp_path, 10, with_models=False)
    options = ["--port", str(free_port()), "--workers", str(workers), "--ranker", str(tmp_path / "nothing")]
    with pytest.raises(CheckpointError, match="is not a checkpoint"):
        CliRunner().invoke(captionlib, ["serve", str(tmp_path / "index"), *options], catch_exceptions=False)


def test_nagle_algorithm_is_disabled() -> None:
    async def delays() -> bool:
        accepted: asyncio.Future[socket.socket] = asyncio.get_running_loop().create_future()

        def accept(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            accepted.set_result(writer.get_extra_info("socket"))

        port = free_port()
        with listen("127.0.0.1", port) as server_socket:
            async with await asyncio.start_server(accept, sock=server_socket):
                _, client = await asyncio.open_connection("127.0.0.1", port)
                nodelay = (await accepted).getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
                client.close()
        return not nodelay

    assert not asyncio.run(delays())


def test_port_in_use_is_rejected(tmp_path: Path) -> None:
    make_site(tmp_path, 10, with_models=False)
    with socket.create_server(("127.0.0.1", 0)) as other:
        arguments = ["serve", str(tmp_path / "index"), "--port", str(other.getsockname()[1])]
        with pytest.raises(ConfigError, match=r"cannot listen on .*: Address already in use; choose another --port"):
            CliRunner().invoke(captionlib, arguments, catch_exceptions=False)


@pytest.mark.parametrize("allowed", [False, True])
def test_private_hosts_are_allowed_only_with_the_option(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, allowed: bool
) -> None:
    make_site(tmp_path, 10, with_models=False)
    monkeypatch.setenv("CAPTIONLIB_APP_CONFIG", "")
    with socket.create_server(("127.0.0.1", 0)) as other:
        arguments = ["serve", str(tmp_path / "index"), "--port", str(other.getsockname()[1])]
        CliRunner().invoke(captionlib, [*arguments, *(["--allow-private-hosts"] if allowed else [])])
    assert json.loads(os.environ["CAPTIONLIB_APP_CONFIG"])["serving"]["allow_private_hosts"] == allowed


def test_folder_that_is_not_an_index_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="is not an index"):
        CliRunner().invoke(captionlib, ["serve", str(tmp_path)], catch_exceptions=False)


def test_settings_of_captions_need_a_captioner(tmp_path: Path) -> None:
    make_site(tmp_path, 10, with_models=False)
    result = CliRunner().invoke(captionlib, ["serve", str(tmp_path / "index"), "--set", "decoding.beam_width=3"])
    assert result.exit_code == 2
    assert "--config and --set configure the captions of uploaded images; add --captioner." in result.output


def test_garbage_collections_skip_the_objects_of_the_startup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_site(tmp_path, 10, with_models=False)
    config = AppConfig(index=str(tmp_path / "index"), thumbnails=str(tmp_path / "thumbnails"))
    monkeypatch.setenv("CAPTIONLIB_APP_CONFIG", json.dumps(to_dict(config)))
    try:
        serve.create()
        assert len(gc.get_objects()) < 0.01 * gc.get_freeze_count()
    finally:
        gc.unfreeze()
