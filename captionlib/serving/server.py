"""Opens the socket of a server and configures uvicorn."""

import socket
from typing import TYPE_CHECKING, Any

from captionlib.errors import ConfigError

if TYPE_CHECKING:
    import uvicorn

__all__ = ["configure_server", "listen"]

_MAX_HEADER_BYTES = 2**17  # an image id in a URL can be long
_SHUTDOWN_SECONDS = 5


def listen(host: str, port: int) -> socket.socket:
    """Opens the socket that all server processes share, before any process loads an index.

    Raises:
        ConfigError: the port is in use, or the address does not belong to this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # Specifying the protocol makes asyncio disable Nagle's algorithm, which would delay responses by 40 ms.
    server_socket = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    server_socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        server_socket.bind((host, port))
    except OSError as error:
        server_socket.close()
        raise ConfigError(f"cannot listen on {host}:{port}: {error.strerror}; choose another --port") from error
    return server_socket


def configure_server(app: Any, **options: Any) -> "uvicorn.Config":
    """Configures uvicorn with connection limits and no access log. `app` is an ASGI application or its import path."""
    import uvicorn

    from captionlib.serving.connections import LimitedConnection

    return uvicorn.Config(
        app,
        server_header=False,
        http=LimitedConnection,
        ws="none",
        h11_max_incomplete_event_size=_MAX_HEADER_BYTES,
        timeout_graceful_shutdown=_SHUTDOWN_SECONDS,
        log_level="warning",
        access_log=False,
        **options,
    )
