"""HTTP routes of the HTML pages, which work without JavaScript. With JavaScript, results appear as the user types."""

import base64
import io
import math
from collections.abc import Sequence
from typing import Annotated, Any, Literal, get_args
from urllib.parse import urlencode

from fastapi import APIRouter, Depends, File, Form, Query, Request, Response, UploadFile
from fastapi.responses import HTMLResponse, RedirectResponse
from markupsafe import Markup, escape

from captionlib.data.images.decoding import list_decodable_formats
from captionlib.evaluation.pages import create_environment
from captionlib.search.output import write_output
from captionlib.search.text_index import Sort
from captionlib.serving.api import ImageId, Service, ThumbnailStore, UploadQueue, read_state
from captionlib.serving.responses import Problem, SearchResult
from captionlib.serving.service import MAX_OFFSET, MAX_QUERY_CHARACTERS, Search, SearchService, make_cursor

__all__ = ["Pages", "router"]

_PAGE_RESULTS = 48
_TALLEST, _WIDEST = 0.5, 2.5  # aspect ratios; see page.css
_DEFAULTS = {"mode": "text", "sort": "relevance"}
_EXPORT_TYPES = {"csv": "text/csv; charset=utf-8", "parquet": "application/vnd.apache.parquet"}
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
    """Renders HTML templates. All values are escaped."""

    def __init__(self, service: SearchService) -> None:
        self._environment = create_environment("captionlib.serving")
        formats = list_decodable_formats()
        self._environment.globals.update(
            service=service,
            max_query_characters=MAX_QUERY_CHARACTERS,
            image_formats=[image_format.name for image_format in formats],
            image_extensions=[extension for image_format in formats for extension in image_format.extensions],
            mode_labels={"text": "Words", "sentence": "Description", "hybrid": "Both"},
        )
        self._environment.filters.update(
            address=_format_search, highlight=_highlight, percent=_format_percent, ratio=_format_ratio
        )

    def render(self, template: str, status_code: int = 200, **values: object) -> HTMLResponse:
        return HTMLResponse(self._environment.get_template(template).render(**values), status_code)

    def render_error(self, problem: Problem) -> HTMLResponse:
        heading = _ERROR_HEADINGS.get(problem.status, "Request failed")
        return self.render("error.html", problem.status, problem=problem, heading=heading)


PageRenderer = Annotated[Pages, read_state("pages")]

router = APIRouter(include_in_schema=False)


def _read_search(
    service: Service,
    q: Annotated[str, Query(max_length=MAX_QUERY_CHARACTERS)] = "",
    mode: str = "text",
    split: Annotated[str, Query(max_length=100)] = "",
    sort: str = "relevance",
    like: str = "",
) -> Search:
    """Reads a search from the parameters of a URL. An unknown or unavailable value is replaced by the default."""
    return Search(
        query=q,
        mode=next((available for available in service.modes if available == mode), "text"),
        split=split or None,
        sort=next((known for known in get_args(Sort) if known == sort), "relevance"),
        like=None if q.strip() else like or None,
    )


CurrentSearch = Annotated[Search, Depends(_read_search)]


@router.get("/")
def show_search(
    service: Service,
    pages: PageRenderer,
    search: CurrentSearch,
    page: Annotated[int, Query(ge=1)] = 1,
    fragment: bool = False,
) -> HTMLResponse:
    # While the user types, a script requests only the results: `fragment` is true.
    page = min(page, _LAST_PAGE)
    first = (page - 1) * _PAGE_RESULTS
    response = service.search(search, make_cursor(first, search), _PAGE_RESULTS)
    is_home = not search.query.strip() and search.like is None
    shown = service.sample(_PAGE_RESULTS) if is_home else response.results
    captions = [result.caption for result in shown]
    return pages.render(
        "results.html" if fragment else "search.html",
        service=service,
        search=search,
        response=response,
        shown=shown,
        words=service.index.find_words(search.query, captions) if search.mode != "sentence" else [[]] * len(shown),
        is_home=is_home,
        page=page,
        first=first,
        last_page=min(_LAST_PAGE, math.ceil((response.total or 0) / _PAGE_RESULTS)),
        splits=service.count_splits(search),
    )


@router.get("/image")
def show_image(
    service: Service,
    pages: PageRenderer,
    search: CurrentSearch,
    image_id: ImageId,
    position: Annotated[int, Query(alias="at", ge=-1)] = -1,
) -> HTMLResponse:
    is_result = 0 <= position <= MAX_OFFSET and (search.query.strip() or search.like)
    previous, following = service.find_adjacent(search, position, image_id) if is_result else (None, None)
    image = service.get_image(image_id)
    return pages.render(
        "image.html", service=service, search=search, image=image, at=position, previous=previous, following=following
    )


@router.post("/export")
def export_selection(
    service: Service,
    image_ids: Annotated[list[str], Form(alias="id", max_length=MAX_OFFSET)],
    export_format: Annotated[Literal["csv", "parquet"], Form(alias="format")],
) -> Response:
    table = service.get_rows(image_ids)
    content = io.BytesIO()
    write_output(table.to_reader(), content, export_format)
    headers = {"Content-Disposition": f'attachment; filename="captions.{export_format}"'}
    return Response(content.getvalue(), media_type=_EXPORT_TYPES[export_format], headers=headers)


@router.get("/image-search")
def redirect_to_search() -> Response:
    return RedirectResponse("/")  # uploaded images are not stored, so the results cannot be shown again


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
            search=Search(),
            response=response,
            preview_url=f"data:image/jpeg;base64,{preview}",
            name=image.filename or "Uploaded image",
        )

    return await uploads.process(request, search)


@router.get("/docs")
def show_docs(pages: PageRenderer) -> HTMLResponse:
    return pages.render("docs.html")


def _format_percent(probability: float) -> str:
    """Formats a probability as a percentage. Small percentages have two significant digits."""
    percent = 100 * probability
    return f"{percent:.0f}%" if percent >= 9.5 else f"{percent:.2g}%"


def _format_ratio(image: SearchResult) -> str:
    """Returns the CSS class for an aspect ratio; see page.css. The security policy does not allow inline styles."""
    if not image.width or not image.height:
        return ""
    return f"r{5 * round(20 * min(_WIDEST, max(_TALLEST, image.width / image.height)))}"


def _highlight(caption: str, words: Sequence[tuple[int, int]]) -> Markup:
    """Marks words of a caption. `words` are their start and end positions."""
    parts, end = [], 0
    for start, stop in words:
        parts.append(escape(caption[end:start]) + Markup("<mark>{}</mark>").format(caption[start:stop]))
        end = stop
    return Markup("").join([*parts, escape(caption[end:])])


def _format_search(search: Search, path: str = "/", **changes: Any) -> str:
    """Returns the URL of a search after changing some parameters. Parameters with default values are omitted."""
    values = {"q": search.query, "mode": search.mode, "split": search.split, "sort": search.sort, "like": search.like}
    parameters = {
        name: value for name, value in (values | changes).items() if value not in (_DEFAULTS.get(name), None, "")
    }
    return f"{path}?{urlencode(parameters)}" if parameters else path
