"""The command `captionlib serve`."""

import copy
import gc
import json
import os
import resource
import signal
import socket
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    import uvicorn

from captionlib.errors import DatasetError
from jobs.options import config_options, device_option, weights_option

__all__ = ["command"]

_APP_CONFIG = "CAPTIONLIB_APP_CONFIG"
_METRICS_FOLDER = "PROMETHEUS_MULTIPROC_DIR"  # prometheus_client reads this variable on import
_MAX_OPEN_FILES = 4096  # connections, images and pipes; many systems allow only 1024 by default


@click.command()
@click.argument("index", metavar="INDEX|COLLECTION")
@click.option("--ranker", "-r", metavar="FOLDER", help="Ranker (dual encoder) that computed the embeddings.")
@click.option("--captioner", "-c", metavar="FOLDER", help="A captioner for uploaded images.")
@weights_option
@click.option("--sentences", metavar="FILE", help="Sentences, one per line, to compare uploaded images with.")
@click.option(
    "--host", default="127.0.0.1", show_default=True, help="The address to listen on; 0.0.0.0 for all interfaces."
)
@click.option("--port", type=click.IntRange(1, 65535), default=8000, show_default=True, help="The port to listen on.")
@click.option("--name", "names", multiple=True, metavar="HOST", help="Additional host name of this server. Repeatable.")
@click.option("--workers", type=click.IntRange(min=1), default=1, show_default=True, help="Number of server processes.")
@click.option("--thumbnails", metavar="FOLDER", help="The folder for thumbnails.  [default: in the user's cache]")
@click.option(
    "--max-upload",
    type=click.IntRange(min=1),
    default=16,
    show_default=True,
    metavar="MB",
    help="Maximum size of the uploaded images of a request.",
)
@click.option(
    "--allow-private-hosts",
    is_flag=True,
    help="Also fetch images from URLs on loopback, link-local and private networks.",
)
@click.option("--log-requests", is_flag=True, help="Write a line of JSON to standard error for each request.")
@config_options
@device_option
def command(
    index: str,
    ranker: str | None,
    captioner: str | None,
    weights: str | None,
    sentences: str | None,
    host: str,
    port: int,
    names: tuple[str, ...],
    workers: int,
    thumbnails: str | None,
    max_upload: int,
    allow_private_hosts: bool,
    log_requests: bool,
    config: str | None,
    overrides: tuple[str, ...],
    device: str,
) -> None:
    """Serve an index, or the index of a collection, as a web application with a JSON API.

    A collection is a folder that `captionlib init` created. By default, only this machine can connect. There is no
    authentication: anyone who can connect can view every image in the index, and save its original file. To restrict
    access, put a proxy with authentication in front of the server. The server shows only images in the index, and does
    not accept SQL. It downloads images only from public hosts, unless --allow-private-hosts is set. /docs describes the
    API, /health reports the state, and /metrics provides metrics for Prometheus.

    \b
    Examples:
      captionlib serve index
      captionlib serve holidays
      captionlib serve index --ranker ranker --captioner captioner --set decoding.beam_width=10
      captionlib serve s3://bucket/index --workers 4 --port 9000
      captionlib serve index --host 0.0.0.0 --name images.example.org
    """
    from captionlib.collection import is_collection, open_collection
    from captionlib.config import to_dict
    from captionlib.models.checkpoints.encoder_file import require_checkpoint_files
    from captionlib.search.index_folder import INDEX_FILE, user_cache_folder
    from captionlib.serving.config import ServingConfig
    from captionlib.serving.server import listen
    from captionlib.serving.startup import AppConfig
    from captionlib.storage.folders import Folder

    defaults: dict[str, Any] = {}
    if is_collection(index):
        collection = open_collection(index)
        settings = collection.config
        if not Folder(collection.index).exists(INDEX_FILE):
            raise DatasetError(f"{index} has no index yet; run `captionlib update {index}`")
        index, weights = collection.index, weights or settings.weights
        defaults = settings.generation if captioner is None and config is None else {}
        ranker, captioner = ranker or settings.ranker, captioner or settings.captioner
    if not Folder(index).exists(INDEX_FILE):
        raise DatasetError(
            f"{index} is not an index: expected a folder with {INDEX_FILE}; see `captionlib build-index`"
        )
    for checkpoint in filter(None, (captioner, ranker)):
        require_checkpoint_files(checkpoint, weights)
    url_host = f"[{host}]" if ":" in host else host
    serving = ServingConfig(
        allowed_hosts=_list_host_names(host, url_host, names),
        max_upload_bytes=max_upload * 2**20,
        allow_private_hosts=allow_private_hosts,
        log_requests=log_requests,
    )
    folder = thumbnails or str(user_cache_folder() / "thumbnails")
    generation = _load_generation(captioner, config, overrides, defaults)
    app_config = AppConfig(index, folder, ranker, captioner, weights, sentences, generation, device, serving)
    os.environ[_APP_CONFIG] = json.dumps(to_dict(app_config))
    _raise_file_limit()
    with listen(host, port) as server_socket, _shared_metrics(workers):
        _run_server(server_socket, workers, f"Serving {index} at http://{url_host}:{port}/. Press Ctrl-C to stop.")


@contextmanager
def _shared_metrics(workers: int) -> Iterator[None]:
    """Creates a folder through which several server processes share their metrics."""
    if workers == 1:
        yield
        return
    with tempfile.TemporaryDirectory(prefix="captionlib-metrics-") as folder:
        os.environ[_METRICS_FOLDER] = folder
        try:
            yield
        finally:
            del os.environ[_METRICS_FOLDER]


def _list_host_names(host: str, url_host: str, names: tuple[str, ...]) -> tuple[str, ...]:
    """Returns the host names to accept, and prints them if other machines can connect."""
    from captionlib.serving.config import ServingConfig

    own = [host, url_host] if host not in ("0.0.0.0", "::") else []
    accepted = tuple(dict.fromkeys([*ServingConfig.allowed_hosts, *own, *names]))
    if host not in ("127.0.0.1", "::1", "localhost"):
        click.echo(f"Listening on {host}: anyone who can connect can view the images in the index.", err=True)
        click.echo(f"Host names: {', '.join(accepted)}. Add others with --name.", err=True)
    return accepted


def _run_server(server_socket: socket.socket, workers: int, message: str) -> None:
    import uvicorn

    from captionlib.serving.server import configure_server

    # With several workers, this copy of the application does not serve requests. It is loaded first, so errors are
    # reported only once, and a remote index is copied only once.
    app = create()
    click.echo(message)
    server = configure_server(app if workers == 1 else "jobs.serve:create", factory=workers > 1, workers=workers)
    if workers == 1:
        uvicorn.Server(server).run([server_socket])
    else:
        del app
        _run_processes(server, server_socket)


def _run_processes(server: "uvicorn.Config", server_socket: socket.socket) -> None:
    """Runs server processes until a signal stops them, and then raises it again, as uvicorn does for one process."""
    from uvicorn.supervisors import Multiprocess

    received: list[int] = []
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    supervisor = Multiprocess(server, [server_socket])  # replaces the signal handlers

    def stop(number: int, _frame: object) -> None:
        received.append(number)
        supervisor.should_exit.set()

    for number in previous:
        signal.signal(number, stop)
    supervisor.run()
    for number, handler in previous.items():
        signal.signal(number, handler)
    if received:
        signal.raise_signal(received[0])


def _load_generation(
    captioner: str | None, config: str | None, overrides: tuple[str, ...], defaults: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns the configuration for captioning uploaded images, or an empty mapping without a captioner.

    `defaults` are the settings of a collection. They apply if `config` is None.
    """
    from captionlib.config import apply_overrides, build_config, load_config, to_dict

    if captioner is None:
        if config is not None or overrides:
            raise click.UsageError("--config and --set configure the captions of uploaded images; add --captioner.")
        return {}
    from captionlib.models.inference.captioning import GenerationConfig  # imports torch, which takes seconds

    if config is not None:
        return to_dict(load_config(GenerationConfig, config, overrides))
    values = copy.deepcopy(dict(defaults))
    apply_overrides(values, overrides)
    return to_dict(build_config(GenerationConfig, values, "options"))


def _raise_file_limit() -> None:
    limit, maximum = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit != resource.RLIM_INFINITY and limit < _MAX_OPEN_FILES:
        allowed = _MAX_OPEN_FILES if maximum == resource.RLIM_INFINITY else min(_MAX_OPEN_FILES, maximum)
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, maximum))


def create() -> Any:
    """Creates the application in a server process; uvicorn calls this function by name."""
    from captionlib.config import build_config
    from captionlib.serving.startup import AppConfig, load_app

    app = load_app(build_config(AppConfig, json.loads(os.environ[_APP_CONFIG])))
    gc.collect()
    gc.freeze()  # otherwise, full garbage collections would pause requests for 0.2 s to scan PyTorch's objects
    return app
