"""Assembles the web application from routes, limits and error handlers."""

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from importlib.resources import files
from pathlib import Path

from anyio.to_thread import current_default_thread_limiter
from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect
from starlette.staticfiles import StaticFiles

from captionlib import __version__
from captionlib.errors import BusyError, ImageError, QueryError
from captionlib.serving import api, pages
from captionlib.serving.exports import Exports
from captionlib.serving.middleware import RequestLimits, SecurityHeaders
from captionlib.serving.monitoring import CLIENT_CLOSED_REQUEST, Monitoring
from captionlib.serving.problems import add_problem_type, make_problem, render_problem
from captionlib.serving.responses import InvalidParameter, Problem
from captionlib.serving.service import CursorError, SearchService
from captionlib.serving.thumbnails import Thumbnails
from captionlib.serving.uploads import create_upload_pool

__all__ = ["create_app"]

_PAGE_THREADS = 8
_RETRY_SECONDS = "5"
_FORM_BYTES = 2**16  # maximum size of the parts of an upload that are not images


def create_app(service: SearchService, thumbnail_folder: Path) -> FastAPI:
    """Creates the web application, which stores thumbnails in `thumbnail_folder`."""
    config = service.config
    thumbnails = Thumbnails(thumbnail_folder, config)
    uploads = create_upload_pool(config)

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        # Pages and searches are CPU-bound, so more threads would only delay each other and `/health`.
        current_default_thread_limiter().total_tokens = _PAGE_THREADS
        with service, thumbnails, uploads:
            yield

    app = FastAPI(
        title="captionlib",
        version=__version__,
        summary="Search images by the words of their captions, by a description and by an image; caption images.",
        openapi_tags=[{"name": name} for name in ("Search", "Caption", "Monitoring")],  # their order at /docs
        docs_url=None,  # FastAPI's documentation pages load scripts from other hosts
        redoc_url=None,
        lifespan=lifespan,
    )
    add_problem_type(app)
    app.state.service = service
    app.state.thumbnails = thumbnails
    app.state.uploads = uploads
    app.state.exports = Exports(config)
    app.state.pages = pages.Pages(service)
    app.include_router(api.router)
    app.include_router(pages.router)
    app.mount("/static/swagger", StaticFiles(packages=[("fastapi_swagger", "resources")]), name="swagger")
    app.mount("/static", StaticFiles(directory=str(files("captionlib.serving") / "static")), name="static")
    _add_error_handlers(app)
    app.add_middleware(
        RequestLimits,
        config=config,
        max_body_bytes=config.max_upload_bytes + _FORM_BYTES,
        too_large_message=f"expected images of at most {config.max_upload_bytes / 2**20:.3g} MB in total",
        make_error=lambda request, status, detail, headers: _render_error(
            request, make_problem(status, detail), headers
        ),
    )
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(config.allowed_hosts), www_redirect=False)
    app.add_middleware(SecurityHeaders)
    app.add_middleware(Monitoring, log_requests=config.log_requests)
    return app


def _add_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(StarletteHTTPException)
    async def handle_http_error(request: Request, error: HTTPException) -> Response:
        detail = str(error.detail)
        if detail == "Not Found":
            detail = f"{request.url.path} does not exist"
        return _render_error(request, make_problem(error.status_code, detail), error.headers)

    @app.exception_handler(QueryError)
    async def handle_query_error(request: Request, error: QueryError) -> Response:
        return _render_error(request, make_problem(400 if isinstance(error, CursorError) else 404, str(error)))

    @app.exception_handler(ImageError)
    async def handle_image_error(request: Request, error: ImageError) -> Response:
        return _render_error(request, make_problem(400, str(error), reason=error.reason))

    @app.exception_handler(BusyError)
    async def handle_busy_error(request: Request, error: BusyError) -> Response:
        return _render_error(request, make_problem(503, str(error)), {"Retry-After": _RETRY_SECONDS})

    @app.exception_handler(Exception)
    async def handle_failure(request: Request, _error: Exception) -> Response:
        return _render_error(request, make_problem(500, "the server failed; see its log for the reason"))

    @app.exception_handler(ClientDisconnect)
    async def handle_disconnect(_request: Request, _error: ClientDisconnect) -> Response:
        return Response(status_code=CLIENT_CLOSED_REQUEST)

    @app.exception_handler(RequestValidationError)
    async def handle_validation_error(request: Request, error: RequestValidationError) -> Response:
        # Omits the rejected values, which may be files or binary data.
        errors = [InvalidParameter(name=str(each["loc"][-1]), detail=each["msg"]) for each in error.errors()]
        detail = "; ".join(f"{each.name}: {each.detail}" for each in errors)
        return _render_error(request, make_problem(422, detail, errors=errors))


def _render_error(request: Request, problem: Problem, headers: Mapping[str, str] | None = None) -> Response:
    """Returns a page to browsers and problem details to other clients."""
    if "text/html" in request.headers.get("accept", ""):
        response: Response = request.app.state.pages.render_error(problem)
    else:
        response = render_problem(problem)
    response.headers.update(headers or {})
    return response
