import asyncio
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

from captionlib.errors import CheckpointError, ConfigError, DatasetError
from jobs.cli import captionlib
from jobs.serve import listen
from tests.serving.example_site import make_site


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        port: int = found.getsockname()[1]
        return port


def ask(url: str) -> bytes:
    for _ in range(1200):
        try:
            with urllib.request.urlopen(url, timeout=10) as answer:
                content: bytes = answer.read()
                return content
        except urllib.error.HTTPError:
            raise
        except OSError:
            time.sleep(0.1)
    raise AssertionError(f"{url} does not answer")


@pytest.mark.parametrize("workers", [1, 2])
def test_an_index_is_served_on_this_machine_alone(tmp_path: Path, workers: int) -> None:
    make_site(tmp_path, 10, sees=False)
    port = free_port()
    command = [sys.executable, "-m", "jobs.cli", "serve", str(tmp_path / "index"), "--port", str(port)]
    command += ["--workers", str(workers), "--thumbnails", str(tmp_path / "thumbnails")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert json.loads(ask(f"http://127.0.0.1:{port}/health"))["captions"] == 10
            assert b"a dog and a cat" in ask(f"http://localhost:{port}/?q=dog")
            assert ask(f"http://127.0.0.1:{port}/picture/small?id=im0").startswith(b"\xff\xd8\xff")
            with pytest.raises(urllib.error.HTTPError, match="422"):
                ask(f"http://127.0.0.1:{port}/api/search?q=dog&limit=1000")
        finally:
            process.send_signal(signal.SIGINT)
            printed, complained = process.communicate(timeout=60)
    assert printed.startswith(f"http://127.0.0.1:{port}/ shows {tmp_path / 'index'}")
    assert "Traceback" not in complained


@pytest.mark.parametrize("workers", [1, 2])
def test_what_is_wrong_is_said_once(tmp_path: Path, workers: int) -> None:
    make_site(tmp_path, 10, sees=False)
    options = ["--port", str(free_port()), "--workers", str(workers), "--ranker", str(tmp_path / "nothing")]
    with pytest.raises(CheckpointError, match="is no checkpoint"):
        CliRunner().invoke(captionlib, ["serve", str(tmp_path / "index"), *options], catch_exceptions=False)


def test_answers_do_not_wait_for_acknowledgements() -> None:
    async def delays() -> bool:
        accepted: asyncio.Future[socket.socket] = asyncio.get_running_loop().create_future()

        def accept(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            accepted.set_result(writer.get_extra_info("socket"))

        port = free_port()
        with listen("127.0.0.1", port) as listening:
            async with await asyncio.start_server(accept, sock=listening):
                _, client = await asyncio.open_connection("127.0.0.1", port)
                nodelay = (await accepted).getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
                client.close()
        return not nodelay

    assert not asyncio.run(delays())


def test_a_port_that_is_taken_is_refused(tmp_path: Path) -> None:
    make_site(tmp_path, 10, sees=False)
    with socket.create_server(("127.0.0.1", 0)) as other:
        arguments = ["serve", str(tmp_path / "index"), "--port", str(other.getsockname()[1])]
        with pytest.raises(ConfigError, match="cannot be listened on: Address already in use; give another --port"):
            CliRunner().invoke(captionlib, arguments, catch_exceptions=False)


@pytest.mark.parametrize("allowed", [False, True])
def test_private_hosts_are_refused_unless_the_option_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, allowed: bool
) -> None:
    make_site(tmp_path, 10, sees=False)
    monkeypatch.setenv("CAPTIONLIB_SERVED", "")
    with socket.create_server(("127.0.0.1", 0)) as other:
        arguments = ["serve", str(tmp_path / "index"), "--port", str(other.getsockname()[1])]
        CliRunner().invoke(captionlib, [*arguments, *(["--allow-private-hosts"] if allowed else [])])
    assert json.loads(os.environ["CAPTIONLIB_SERVED"])["limits"]["allow_private_hosts"] == allowed


def test_what_is_no_index_is_not_served(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="is no index"):
        CliRunner().invoke(captionlib, ["serve", str(tmp_path)], catch_exceptions=False)
