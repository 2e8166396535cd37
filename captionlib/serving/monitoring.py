"""Counts and times requests, thumbnails and models for Prometheus, and logs requests."""

import json
import os
import sys
import time
from datetime import datetime, timezone

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

__all__ = ["CLIENT_CLOSED_REQUEST", "MODEL_SECONDS", "THUMBNAILS", "Monitoring", "format_metrics"]

THUMBNAILS = Counter("captionlib_thumbnails", "Thumbnails that were requested", ["result"])
MODEL_SECONDS = Histogram(
    "captionlib_model_seconds", "Time that a model takes to process an image or sentence", ["task"]
)

_REQUESTS = Counter("captionlib_requests", "Requests that have ended", ["method", "endpoint", "status"])
_REQUEST_SECONDS = Histogram(
    "captionlib_request_seconds", "Time from a request to the end of its response", ["endpoint"]
)

_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH"})
CLIENT_CLOSED_REQUEST = 499
"""Status code that nginx logs when a client disconnects. It is recorded, but not sent."""


def format_metrics() -> bytes:
    """Returns the metrics of all server processes in the text format of Prometheus."""
    if "PROMETHEUS_MULTIPROC_DIR" not in os.environ:  # set by `captionlib serve` for several processes
        return generate_latest(REGISTRY)
    registry = CollectorRegistry()
    MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
    return generate_latest(registry)


class Monitoring:
    """ASGI middleware that counts and times requests. With `log_requests`, it also logs each one as JSON."""

    def __init__(self, app: ASGIApp, log_requests: bool) -> None:
        self._app = app
        self._log_requests = log_requests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status, started = 0, time.perf_counter()

        async def send_and_record_status(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            await self._app(scope, receive, send_and_record_status)
        except Exception:
            status = 500
            raise
        finally:
            self._record(scope, status or CLIENT_CLOSED_REQUEST, time.perf_counter() - started)

    def _record(self, scope: Scope, status: int, seconds: float) -> None:
        method = scope["method"] if scope["method"] in _METHODS else "other"
        # The path of the route, not of the request: a client could create any number of labels by requesting new paths.
        endpoint = getattr(scope.get("route"), "path", "other")
        _REQUESTS.labels(method, endpoint, status).inc()
        _REQUEST_SECONDS.labels(endpoint).observe(seconds)
        if self._log_requests:
            entry = {
                "time": datetime.now(timezone.utc).isoformat(timespec="milliseconds"),
                "client": (scope.get("client") or ("",))[0],
                "method": method,
                "path": scope["path"],  # without the query, which may be private
                "status": status,
                "seconds": round(seconds, 4),
            }
            print(json.dumps(entry), file=sys.stderr, flush=True)
