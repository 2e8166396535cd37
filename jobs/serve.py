"""`captionlib serve`."""

import json
import os
import socket
from pathlib import Path
from typing import Any

import click

from captionlib.config import build_config, to_dict
from captionlib.errors import ConfigError, DatasetError
from captionlib.search.index_folder import DESCRIPTION
from captionlib.serving.config import ServingConfig
from captionlib.storage.folders import Folder
from jobs.options import device_option

__all__ = ["command", "listen"]

_SERVED = "CAPTIONLIB_SERVED"
_LOOPBACK = ("127.0.0.1", "::1", "localhost")
_MOST_CONNECTIONS = 1000


@click.command()
@click.argument("index")
@click.option("--ranker", "-r", metavar="FOLDER", help="The ranker that made the embeddings, to ask for sentences.")
@click.option("--captioner", "-c", metavar="FOLDER", help="A captioner, to caption uploaded photographs.")
@click.option("--weights", metavar="FILE", help="The encoder's weights, where they are a file of your own.")
@click.option("--sentences", metavar="FILE", help="Sentences, one a line, that uploaded photographs are compared with.")
@click.option(
    "--host", default="127.0.0.1", show_default=True, help="The address to listen on; 0.0.0.0 is the whole network."
)
@click.option("--port", type=click.IntRange(1, 65535), default=8000, show_default=True, help="Where to listen.")
@click.option("--name", "names", multiple=True, metavar="HOST", help="A further name that it answers to. Repeatable.")
@click.option("--workers", type=click.IntRange(min=1), default=1, show_default=True, help="Processes.")
@click.option("--thumbnails", metavar="FOLDER", help="Where small pictures are kept; the user's cache, unless given.")
@click.option(
    "--max-upload",
    type=click.IntRange(min=1),
    default=ServingConfig.max_upload_bytes // 2**20,
    show_default=True,
    metavar="MB",
    help="The largest photograph that is taken.",
)
@click.option(
    "--allow-private-hosts",
    is_flag=True,
    help="Fetch images also from web addresses on loopback, link-local and private networks.",
)
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
    device: str,
) -> None:
    """Serve INDEX to a browser: a search box, a page an image, and the same as JSON.

    It listens on this machine alone unless told otherwise, knows no passwords, and shows every image of the index to
    whoever reaches it; put a server that does know them before it where that is not for everybody. It shows no image
    but those that the index names, and takes no SQL. Images at web addresses are fetched from public hosts alone,
    unless --allow-private-hosts is given. The API is described at /docs, and /health says that it runs.

    \b
    Examples:
      captionlib serve index
      captionlib serve index --ranker ranker --captioner captioner
      captionlib serve s3://bucket/index --workers 4 --port 9000
      captionlib serve index --host 0.0.0.0 --name photos.example.org
    """
    import uvicorn
    from uvicorn.supervisors import Multiprocess

    from captionlib.serving.startup import Served

    if not Folder(index).exists(DESCRIPTION):
        raise DatasetError(f"{index} is no index: expected a folder that holds {DESCRIPTION}; see build-index")
    in_url = f"[{host}]" if ":" in host else host
    own = [host, in_url] if host not in ("0.0.0.0", "::") else []
    limits = ServingConfig(
        hosts=tuple(dict.fromkeys([*ServingConfig.hosts, *own, *names])),
        max_upload_bytes=max_upload * 2**20,
        allow_private_hosts=allow_private_hosts,
    )
    folder = thumbnails or str(_cache() / "thumbnails")
    served = Served(index, folder, ranker, captioner, weights, sentences, device, limits)
    if host not in _LOOPBACK:
        click.echo(f"Listening on {host}: whoever reaches this machine can see the images of the index.", err=True)
        click.echo(f"It answers to {', '.join(limits.hosts)}; give --name for other names of this machine.", err=True)
    os.environ[_SERVED] = json.dumps(to_dict(served))
    with listen(host, port) as listening:
        app = create()  # also where other processes serve: what is wrong is said once, and a copy is made once
        config = uvicorn.Config(
            app if workers == 1 else "jobs.serve:create",
            factory=workers > 1,
            workers=workers,
            server_header=False,
            limit_concurrency=_MOST_CONNECTIONS,
            timeout_keep_alive=15,
            log_level="warning",
            access_log=False,
        )
        click.echo(f"http://{in_url}:{port}/ shows {index}; Ctrl-C ends it.")
        if workers == 1:
            uvicorn.Server(config).run([listening])
        else:
            del app
            Multiprocess(config, [listening]).run()


def listen(host: str, port: int) -> socket.socket:
    """A socket for all processes, bound before any of them loads an index."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # With the protocol named, asyncio turns Nagle's algorithm off: else an answer takes 40 ms longer.
    listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
    except OSError as error:
        listening.close()
        raise ConfigError(f"{host}:{port} cannot be listened on: {error.strerror}; give another --port") from error
    return listening


def create() -> Any:
    """The application, in the process that serves it."""
    from captionlib.serving.startup import Served, open_app

    return open_app(build_config(Served, json.loads(os.environ[_SERVED])))


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "captionlib"
