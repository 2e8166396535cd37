"""A web page that shows the progress of a job, based on the dataset (Parquet files) that the job writes."""

import os
import threading
import time
from collections.abc import Sequence

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from captionlib.data.shards.inspection import inspect_dataset
from captionlib.errors import CaptionlibError
from captionlib.evaluation.dataset_page import render_dataset_page
from captionlib.evaluation.pages import read_asset, render_page
from captionlib.serving.middleware import SecurityHeaders

__all__ = ["create_job_app"]

_MIN_RENDER_INTERVAL_SECONDS = 2.0
_MAX_BUSY_FRACTION = 0.05  # maximum fraction of the time spent on reading the dataset, which can be slow
_ASSETS = {"page.css": "text/css", "failures.css": "text/css", "dataset.css": "text/css", "live.js": "text/javascript"}


def create_job_app(folder: str | os.PathLike[str], allowed_hosts: Sequence[str]) -> Starlette:
    """Creates a web application with one page, which describes the dataset in `folder` and updates itself."""
    page = _Page(folder)

    def show_page(_request: Request) -> Response:  # not async, so it runs in a thread while it waits for storage
        status, content = page.render()
        return Response(content, status, {"cache-control": "no-store"}, "text/html")

    def make_asset_route(name: str, media_type: str) -> Route:
        content = read_asset(name)
        return Route(f"/{name}", lambda _request: Response(content, media_type=media_type))

    return Starlette(
        routes=[Route("/", show_page), *(make_asset_route(*asset) for asset in _ASSETS.items())],
        middleware=[
            Middleware(TrustedHostMiddleware, allowed_hosts=list(allowed_hosts), www_redirect=False),
            Middleware(SecurityHeaders),
        ],
    )


class _Page:
    """Renders the page again only after 2 seconds, or later if reading the dataset takes long."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self._folder = folder
        self._lock = threading.Lock()
        self._rendered: tuple[int, bytes] = (503, b"")
        self._expires = 0.0

    def render(self) -> tuple[int, bytes]:
        """Returns the HTTP status and the content of the page."""
        with self._lock:
            started = time.monotonic()
            if started >= self._expires:
                try:
                    self._rendered = 200, render_dataset_page(inspect_dataset(self._folder), live=True)
                except (CaptionlibError, OSError) as error:
                    self._rendered = 503, render_page("dataset_error.html", message=str(error))
                seconds = time.monotonic() - started
                self._expires = started + max(_MIN_RENDER_INTERVAL_SECONDS, seconds / _MAX_BUSY_FRACTION)
            return self._rendered
