"""The application: routes, limits and errors put together."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from importlib.resources import files
from pathlib import Path

from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.staticfiles import StaticFiles

from captionlib import __version__
from captionlib.serving.api import api_routes
from captionlib.serving.middleware import LimitBody, SafeHeaders
from captionlib.serving.pages import Pages, page_routes, picture_routes
from captionlib.serving.service import Library
from captionlib.serving.thumbnails import Thumbnails

__all__ = ["create_app"]

_FORM_BYTES = 2**16  # what a form has around the photograph


def create_app(library: Library, thumbnails: Path) -> FastAPI:
    """The web application over a library.

    Args:
        library: what is asked.
        thumbnails: the folder where they are kept.
    """
    config = library.config
    pictures = Thumbnails(thumbnails, config)
    pages = Pages(library)

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        with pictures, library:
            yield

    app = FastAPI(
        title="captionlib",
        version=__version__,
        summary="Images by their captions, by sentences and by other images.",
        docs_url=None,  # these load scripts from elsewhere
        redoc_url=None,
        lifespan=lifespan,
    )
    app.include_router(api_routes(library, config))
    app.include_router(picture_routes(library, pictures))
    app.include_router(page_routes(library, config, pages, pictures))
    app.mount("/static", StaticFiles(directory=str(files("captionlib.serving") / "static")), name="static")
    _add_docs(app, pages)
    _add_errors(app, pages)
    app.add_middleware(
        LimitBody, max_bytes=config.max_upload_bytes + _FORM_BYTES, refuse=_too_large(pages, config.max_upload_bytes)
    )
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(config.hosts), www_redirect=False)
    app.add_middleware(SafeHeaders)
    return app


def _add_docs(app: FastAPI, pages: Pages) -> None:
    @app.get("/docs", include_in_schema=False)
    def docs() -> HTMLResponse:
        return pages.render("docs.html", schema=app.openapi())


def _add_errors(app: FastAPI, pages: Pages) -> None:
    """Programs get JSON, and people pages."""

    @app.exception_handler(StarletteHTTPException)
    async def answer(request: Request, error: HTTPException) -> Response:
        if _is_person(request):
            return pages.problem(error.status_code, str(error.detail))
        return JSONResponse({"detail": error.detail}, error.status_code, error.headers)

    @app.exception_handler(RequestValidationError)
    async def refuse(request: Request, error: RequestValidationError) -> Response:
        # What was sent is not sent back: it may be a file, or no text at all.
        problems = [{name: problem[name] for name in ("type", "loc", "msg")} for problem in error.errors()]
        if _is_person(request):
            return pages.problem(422, "; ".join(f"{problem['loc'][-1]}: {problem['msg']}" for problem in problems))
        return JSONResponse({"detail": problems}, 422)


def _too_large(pages: Pages, max_bytes: int) -> Callable[[Request], Response]:
    def refuse(request: Request) -> Response:
        detail = f"expected a photograph of at most {max_bytes / 2**20:.3g} MB"
        return pages.problem(413, detail) if _is_person(request) else JSONResponse({"detail": detail}, 413)

    return refuse


def _is_person(request: Request) -> bool:
    return "text/html" in request.headers.get("accept", "")
