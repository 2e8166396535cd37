"""Assembles the web application from routes, limits and error handlers."""

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from functools import partial
from importlib.resources import files
from pathlib import Path

from anyio.to_thread import current_default_thread_limiter
from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect
from starlette.staticfiles import StaticFiles

from captionlib import __version__
from captionlib.errors import BusyError, ImageError, QueryError
from captionlib.serving import api, pages
from captionlib.serving.middleware import RequestLimits, SecurityHeaders
from captionlib.serving.service import SearchService
from captionlib.serving.thumbnails import Thumbnails
from captionlib.serving.uploads import Uploads

__all__ = ["create_app"]

_CLIENT_CLOSED_REQUEST = 499  # nginx's status for clients that disconnect; nobody receives it
_PAGE_THREADS = 8
_RETRY_SECONDS = "5"
_FORM_BYTES = 2**16  # upper bound for the part of an upload that is not the image


def create_app(service: SearchService, thumbnail_folder: Path) -> FastAPI:
    """Creates the web application, which stores thumbnails in `thumbnail_folder`."""
    config = service.config
    thumbnails = Thumbnails(thumbnail_folder, config)
    uploads = Uploads(config)

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        # Pages and searches are CPU-bound, so more threads would only delay each other and `/health`.
        current_default_thread_limiter().total_tokens = _PAGE_THREADS
        with service, thumbnails, uploads:
            yield

    app = FastAPI(
        title="captionlib",
        version=__version__,
        summary="Search images by caption text, by sentence and by image.",
        docs_url=None,  # FastAPI's documentation pages load scripts from other hosts
        redoc_url=None,
        lifespan=lifespan,
    )
    app.state.service = service
    app.state.thumbnails = thumbnails
    app.state.uploads = uploads
    app.state.pages = pages.Pages(service)
    app.include_router(api.router)
    app.include_router(pages.router)
    app.mount("/static", StaticFiles(directory=str(files("captionlib.serving") / "static")), name="static")
    _add_error_handlers(app)
    app.add_middleware(
        RequestLimits,
        config=config,
        max_body_bytes=config.max_upload_bytes + _FORM_BYTES,
        too_large=f"expected an image of at most {config.max_upload_bytes / 2**20:.3g} MB",
        make_error=partial(_make_error_response, app),
    )
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(config.allowed_hosts), www_redirect=False)
    app.add_middleware(SecurityHeaders)
    return app


def _add_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(StarletteHTTPException)
    async def handle_http_error(request: Request, error: HTTPException) -> Response:
        detail = str(error.detail)
        if detail == "Not Found" and _accepts_html(request):
            detail = "nothing is at this address; search for images instead"
        return _make_error_response(app, request, error.status_code, detail, error.headers)

    @app.exception_handler(QueryError)
    async def handle_query_error(request: Request, error: QueryError) -> Response:
        return _make_error_response(app, request, 404, str(error))

    @app.exception_handler(ImageError)
    async def handle_image_error(request: Request, error: ImageError) -> Response:
        # The reason is a name such as `UnsupportedFormat`, which is for programs.
        detail = str(error) if _accepts_html(request) else f"{error.reason}: {error}"
        return _make_error_response(app, request, 400, detail)

    @app.exception_handler(BusyError)
    async def handle_busy_error(request: Request, error: BusyError) -> Response:
        return _make_error_response(app, request, 503, str(error), {"Retry-After": _RETRY_SECONDS})

    @app.exception_handler(ClientDisconnect)
    async def handle_disconnect(_request: Request, _error: ClientDisconnect) -> Response:
        return Response(status_code=_CLIENT_CLOSED_REQUEST)

    @app.exception_handler(RequestValidationError)
    async def handle_validation_error(request: Request, error: RequestValidationError) -> Response:
        # Omits the rejected values, which may be files or binary data.
        problems = [{name: problem[name] for name in ("type", "loc", "msg")} for problem in error.errors()]
        if _accepts_html(request):
            detail = "; ".join(f"{problem['loc'][-1]}: {problem['msg']}" for problem in problems)
            return _make_error_response(app, request, 422, detail)
        return JSONResponse({"detail": problems}, 422)


def _make_error_response(
    app: FastAPI, request: Request, status_code: int, detail: str, headers: Mapping[str, str] | None = None
) -> Response:
    """Returns a page to browsers and JSON to other clients."""
    if _accepts_html(request):
        response: Response = app.state.pages.render_error(status_code, detail)
    else:
        response = JSONResponse({"detail": detail}, status_code)
    response.headers.update(headers or {})
    return response


def _accepts_html(request: Request) -> bool:
    return "text/html" in request.headers.get("accept", "")
