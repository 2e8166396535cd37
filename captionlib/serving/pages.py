"""HTTP routes of the HTML pages, which work without JavaScript. With JavaScript, results appear as the user types."""

import base64
import math
from typing import Annotated
from urllib.parse import urlencode

from fastapi import APIRouter, File, Query, Request, Response, UploadFile
from fastapi.responses import HTMLResponse, RedirectResponse

from captionlib.data.images.decoding import list_decodable_formats
from captionlib.evaluation.pages import create_environment
from captionlib.serving.api import ImageId, Service, ThumbnailStore, UploadQueue, read_state
from captionlib.serving.responses import Problem, SearchMode
from captionlib.serving.service import MAX_OFFSET, MAX_QUERY_CHARACTERS, SearchService, make_cursor

__all__ = ["Pages", "router"]

_PAGE_RESULTS = 24
_LAST_PAGE = MAX_OFFSET // _PAGE_RESULTS + 1
_ERROR_HEADINGS = {
    404: "Not found",
    408: "Too slow",
    413: "Too large",
    422: "Invalid request",
    429: "Too busy",
    503: "Too busy",
}


class Pages:
    """Renders templates; all values are escaped."""

    def __init__(self, service: SearchService) -> None:
        self._environment = create_environment("captionlib.serving")
        formats = list_decodable_formats()
        self._environment.globals.update(
            service=service,
            max_query_characters=MAX_QUERY_CHARACTERS,
            image_formats=[image_format.name for image_format in formats],
            image_extensions=[extension for image_format in formats for extension in image_format.extensions],
        )
        self._environment.filters["percent"] = _format_percent
        self._environment.filters["query"] = lambda values: urlencode({k: v for k, v in values.items() if v})

    def render(self, template: str, status_code: int = 200, **values: object) -> HTMLResponse:
        return HTMLResponse(self._environment.get_template(template).render(**values), status_code)

    def render_error(self, problem: Problem) -> HTMLResponse:
        heading = _ERROR_HEADINGS.get(problem.status, "Request failed")
        return self.render("error.html", problem.status, detail=problem.detail, heading=heading)


PageRenderer = Annotated[Pages, read_state("pages")]

router = APIRouter(include_in_schema=False)


@router.get("/")
def show_search(
    service: Service,
    pages: PageRenderer,
    q: Annotated[str, Query(max_length=MAX_QUERY_CHARACTERS)] = "",
    mode: str = "text",
    page: Annotated[int, Query(ge=1)] = 1,
    split: Annotated[str, Query(max_length=100)] = "",
    fragment: bool = False,
) -> HTMLResponse:
    # A script requests only the results (`fragment`) while the user types.
    available_mode: SearchMode = next((available for available in service.modes if available == mode), "text")
    page = min(page, _LAST_PAGE)
    cursor = make_cursor((page - 1) * _PAGE_RESULTS, (q, available_mode, split or None, None))
    response = service.search(q, available_mode, cursor, _PAGE_RESULTS, split)
    return pages.render(
        "results.html" if fragment else "search.html",
        service=service,
        response=response,
        page=page,
        last_page=min(_LAST_PAGE, math.ceil((response.total or 0) / _PAGE_RESULTS)),
        split=split,
        examples=[] if q.strip() else service.sample(_PAGE_RESULTS),
    )


@router.get("/image")
def show_image(service: Service, pages: PageRenderer, image_id: ImageId) -> HTMLResponse:
    return pages.render("image.html", service=service, image=service.get_image(image_id))


@router.get("/image-search")
def redirect_to_search() -> Response:
    return RedirectResponse("/")  # the uploaded image is not stored, so results cannot be shown again


@router.post("/image-search")
async def show_image_search(
    request: Request,
    service: Service,
    pages: PageRenderer,
    thumbnails: ThumbnailStore,
    uploads: UploadQueue,
    image: Annotated[UploadFile, File()],
) -> HTMLResponse:
    def search() -> HTMLResponse:
        content = image.file.read()
        response = service.search_by_image(content)
        preview = base64.b64encode(thumbnails.make(content, "large")).decode()
        return pages.render(
            "image_search.html",
            service=service,
            response=response,
            preview_url=f"data:image/jpeg;base64,{preview}",
            name=image.filename or "Uploaded image",
        )

    return await uploads.process(request, search)


@router.get("/docs")
def show_docs(pages: PageRenderer) -> HTMLResponse:
    return pages.render("docs.html")


def _format_percent(log_prob: float) -> str:
    """Formats a probability as a percentage with two significant digits, because it can be very small."""
    percent = 100 * math.exp(min(0.0, log_prob))
    if percent < 1e-6:
        return "< 0.000001%"
    return f"{percent:.{max(0, 1 - math.floor(math.log10(percent)))}f}%"
