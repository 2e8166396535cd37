"""Pages for people: they work without scripts, and with them answer while one types."""

import base64
import math
from typing import Annotated
from urllib.parse import urlencode

from fastapi import APIRouter, File, HTTPException, Query, Request, Response, UploadFile
from fastapi.responses import HTMLResponse, JSONResponse, RedirectResponse
from jinja2 import Environment, PackageLoader, StrictUndefined
from starlette.concurrency import run_in_threadpool

from captionlib.errors import BusyError, ImageError, QueryError
from captionlib.serving.api import Problem, ask_photo
from captionlib.serving.config import ServingConfig
from captionlib.serving.service import Library
from captionlib.serving.thumbnails import Size, Thumbnails

__all__ = ["Pages", "page_routes", "picture_routes"]

_PAGE_ROWS = 24
_PICTURE_HEADERS = {"Cache-Control": "private, max-age=86400"}


_NO_PICTURE = """<svg xmlns="http://www.w3.org/2000/svg" width="256" height="256" viewBox="0 0 256 256">
<path d="M98 110h60v40H98zM90 158l76-60" fill="none" stroke="#888" stroke-width="3"/></svg>"""


class Pages:
    """Fills templates; all that is put into them is escaped."""

    def __init__(self, library: Library) -> None:
        self._library = library
        self._environment = Environment(
            loader=PackageLoader("captionlib.serving"),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        self._environment.filters["percent"] = _percent
        self._environment.filters["query"] = lambda values: urlencode({k: v for k, v in values.items() if v})

    def render(self, template: str, status: int = 200, **values: object) -> HTMLResponse:
        """A page; every template knows the library."""
        html = self._environment.get_template(template).render(library=self._library, **values)
        return HTMLResponse(html, status)

    def problem(self, status: int, detail: str) -> HTMLResponse:
        """A page that says why there is no other."""
        return self.render("error.html", status, detail=detail, heading=_HEADINGS.get(status, "That did not work"))


_HEADINGS = {404: "Nothing here", 413: "Too large", 422: "That cannot be asked", 503: "Too busy"}


def page_routes(library: Library, config: ServingConfig, pages: Pages, thumbnails: Thumbnails) -> APIRouter:
    """The pages, and the pictures on them."""
    routes = APIRouter(include_in_schema=False)
    last = config.max_offset // _PAGE_ROWS + 1

    @routes.get("/")
    def search(
        q: Annotated[str, Query(max_length=config.max_question_characters)] = "",
        mode: str = "text",
        page: Annotated[int, Query(ge=1)] = 1,
        split: Annotated[str, Query(max_length=100)] = "",
        fragment: bool = False,
    ) -> HTMLResponse:
        chosen = mode if mode in library.modes else "text"
        page = min(page, last)
        answer = library.search(q, chosen, (page - 1) * _PAGE_ROWS, _PAGE_ROWS, split or None, None)
        return pages.render(
            "results.html" if fragment else "search.html",
            answer=answer,
            page=page,
            pages=min(last, math.ceil((answer.total or 0) / _PAGE_ROWS)),
            split=split,
            examples=[] if q.strip() else library.sample(_PAGE_ROWS),
        )

    @routes.get("/image")
    def image(id: Annotated[str, Query(max_length=4096)]) -> HTMLResponse:
        try:
            return pages.render("image.html", image=library.image(id))
        except QueryError as error:
            return pages.problem(404, str(error))

    @routes.get("/photo")
    def no_photo() -> Response:
        return RedirectResponse("/")  # who comes back to the page of a photograph, which is not kept

    @routes.post("/photo")
    async def photo(photo: Annotated[UploadFile, File()]) -> HTMLResponse:
        content = await photo.read()
        try:
            found = await run_in_threadpool(ask_photo, library, content)
            picture = await run_in_threadpool(thumbnails.shrink, content, "large")
        except HTTPException as error:
            return pages.problem(error.status_code, str(error.detail))
        shown = f"data:image/jpeg;base64,{base64.b64encode(picture).decode()}"
        return pages.render("image_search.html", found=found, picture=shown, name=photo.filename or "your photograph")

    return routes


def picture_routes(library: Library, thumbnails: Thumbnails) -> APIRouter:
    """Pictures of the images that the index names, and of no others."""
    routes = APIRouter()

    @routes.get(
        "/picture/{size}",
        summary="A picture of an image of the index",
        response_class=Response,
        responses={
            200: {"content": {"image/jpeg": {"schema": {"type": "string", "format": "binary"}}}},
            404: {"model": Problem, "content": {"image/svg+xml": {"schema": {"type": "string"}}}},
            503: {"model": Problem},
        },
    )
    def picture(
        request: Request, size: Size, id: Annotated[str, Query(max_length=4096, description="Of the image.")]
    ) -> Response:
        try:
            return Response(thumbnails.get(library.uri(id), size), media_type="image/jpeg", headers=_PICTURE_HEADERS)
        except QueryError as error:
            raise HTTPException(404, str(error)) from error
        except ImageError as error:  # its message may name the place where it lies
            if request.headers.get("accept", "").startswith("image/"):  # a browser that puts it on a page
                return Response(_NO_PICTURE, 404, media_type="image/svg+xml")
            raise HTTPException(404, f"the image of {id} cannot be had: {error.reason}") from error
        except BusyError as error:
            return JSONResponse({"detail": str(error)}, 503, {"Retry-After": "2"})

    return routes


def _percent(log_prob: float) -> str:
    """A probability with two digits that count, unless it is hardly one: those of long captions are small."""
    percent = 100 * math.exp(min(0.0, log_prob))
    if percent < 1e-6:
        return "< 0.000001%"
    return f"{percent:.{max(0, 1 - math.floor(math.log10(percent)))}f}%"
