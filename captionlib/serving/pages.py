"""HTTP routes of the HTML pages, which work without JavaScript. With JavaScript, results appear as the user types."""

import base64
import io
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Annotated, Any, Literal, get_args
from urllib.parse import urlencode

from fastapi import APIRouter, Depends, File, Form, HTTPException, Query, Request, Response, UploadFile
from fastapi.responses import HTMLResponse, RedirectResponse, StreamingResponse
from markupsafe import Markup, escape

from captionlib.data.images.decoding import list_decodable_formats
from captionlib.evaluation.pages import create_environment
from captionlib.search.filters import Filter
from captionlib.search.output import write_output
from captionlib.search.text_index import Sort, find_unclosed_phrase
from captionlib.serving.api import DATE_PATTERN, ImageId, Service, ThumbnailStore, UploadPool, read_state
from captionlib.serving.exports import Exports
from captionlib.serving.responses import FacetsResponse, Problem, SearchResult
from captionlib.serving.service import MAX_OFFSET, MAX_QUERY_CHARACTERS, MAX_RESULTS, Search, SearchService
from captionlib.serving.uploads import process_upload

__all__ = ["Pages", "router"]

_PAGE_RESULTS = 48
_EXAMPLES = 12  # example images on a page without results
_TALLEST, _WIDEST = 0.5, 2.5  # limits of the aspect ratio of a search result; see page.css
_DEFAULTS = {"mode": "text", "sort": "relevance", "duplicates": "include"}
_MAX_MONTHS = 24  # with more months, the date filter lists years
_MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "June", "July", "Aug", "Sept", "Oct", "Nov", "Dec")
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
# Descriptions of the reasons why an image has no caption.
_REASONS = {
    "BadAddress": "the address is not valid",
    "BadCertificate": "the certificate of the server is not valid",
    "ConnectionFailed": "the server did not answer",
    "Corrupt": "the file is damaged",
    "DecoderDied": "decoding failed",
    "Empty": "the file is empty",
    "Forbidden": "access is denied",
    "ForbiddenHost": "fetching images from private hosts is not allowed",
    "MissingPackage": "a package needed to read the address is not installed",
    "NotAnImage": "the file is not an image",
    "NotAFile": "the address is not a file",
    "NotFound": "the image was not found",
    "OutOfMemory": "decoding needs too much memory",
    "Timeout": "fetching or decoding took too long",
    "TooLarge": "the file is too large",
    "TooManyPixels": "the image has too many pixels",
    "TooManyRedirects": "the server redirected too often",
    "TooManyScans": "the file would take too long to decode",
    "Truncated": "the file is incomplete",
    "Unreadable": "the file cannot be read",
    "UnsupportedFormat": "the format is not supported",
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
            address=_format_search,
            reason=lambda reason: _REASONS.get(reason, f"another reason ({reason})"),
            highlight=_highlight,
            percent=_format_percent,
            ratio=_format_ratio,
        )

        for name in self._environment.list_templates():
            self._environment.get_template(name)  # compiled now, so that the first visitor does not wait

    def render(self, template: str, status_code: int = 200, **values: object) -> HTMLResponse:
        return HTMLResponse(self._environment.get_template(template).render(**values), status_code)

    def render_error(self, problem: Problem) -> HTMLResponse:
        heading = _ERROR_HEADINGS.get(problem.status, "Request failed")
        return self.render("error.html", problem.status, problem=problem, heading=heading)


PageRenderer = Annotated[Pages, read_state("pages")]
ExportQueue = Annotated[Exports, read_state("exports")]

router = APIRouter(include_in_schema=False)


def _read_search(
    service: Service,
    q: Annotated[str, Query(max_length=MAX_QUERY_CHARACTERS)] = "",
    mode: str = "text",
    split: Annotated[str, Query(max_length=100)] = "",
    sort: str = "relevance",
    source: Annotated[str, Query(max_length=300)] = "",
    date: str = "",
    duplicates: str = "include",
    similar_to: str = "",
) -> Search:
    """Reads a search from the parameters of a URL. An unknown or unavailable value is replaced by the default."""
    return Search(
        query=q,
        mode=next((available for available in service.modes if available == mode), "text"),
        where=Filter(
            split=split or None,
            source=source or None,
            date=date if date and re.fullmatch(DATE_PATTERN, date) else None,
            exclude_duplicates=duplicates == "exclude",
        ),
        sort=next((known for known in get_args(Sort) if known == sort), "relevance"),
        similar_to=None if q.strip() else similar_to or None,
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
    # While the user types, a script requests only the results and sets `fragment`.
    page = min(page, _LAST_PAGE)
    first = (page - 1) * _PAGE_RESULTS
    response = service.search(search, first, _PAGE_RESULTS)
    is_home = search.is_empty
    shown = service.sample(_PAGE_RESULTS, search.where) if is_home else response.results
    examples = [] if shown or is_home or page > 1 else service.sample(_EXAMPLES, Filter())
    captions = [result.caption for result in shown]
    return pages.render(
        "results.html" if fragment else "search.html",
        service=service,
        search=search,
        response=response,
        shown=shown,
        examples=examples,
        words=service.index.find_words(search.query, captions) if search.mode != "sentence" else [[]] * len(shown),
        is_home=is_home,
        page=page,
        first=first,
        last_page=min(_LAST_PAGE, math.ceil((response.total or 0) / _PAGE_RESULTS)),
        facets=_list_facets(service, search, response.facets),
        unclosed_phrase=find_unclosed_phrase(search.query) if search.mode != "sentence" else None,
    )


@router.get("/image")
def show_image(
    service: Service,
    pages: PageRenderer,
    search: CurrentSearch,
    image_id: ImageId,
    position: Annotated[int, Query(alias="at", ge=-1)] = -1,
) -> HTMLResponse:
    is_result = 0 <= position <= MAX_OFFSET and (search.query.strip() or search.similar_to)
    previous, following = service.find_adjacent(search, position, image_id) if is_result else (None, None)
    image = service.get_image(image_id)
    return pages.render(
        "image.html", service=service, search=search, image=image, at=position, previous=previous, following=following
    )


@router.get("/failures")
def show_failures(
    service: Service,
    pages: PageRenderer,
    reason: Annotated[str, Query(max_length=100)] = "",
    source: Annotated[str, Query(max_length=300)] = "",
    page: Annotated[int, Query(ge=1)] = 1,
) -> HTMLResponse:
    page = min(page, MAX_OFFSET // MAX_RESULTS)
    response = service.find_failures(reason or None, source or None, (page - 1) * MAX_RESULTS, MAX_RESULTS)
    return pages.render("failures.html", service=service, response=response, reason=reason, source=source, page=page)


@router.get("/static/attention_maps.js")
def get_attention_script() -> Response:
    """Returns the script that shows attention maps. The HTML report contains the same script."""
    script = files("captionlib.evaluation") / "templates" / "attention_maps.js"
    return Response(script.read_bytes(), media_type="text/javascript")


@router.post("/export")
def export_selection(
    service: Service,
    thumbnails: ThumbnailStore,
    exports: ExportQueue,
    image_ids: Annotated[list[str], Form(alias="id")],
    export_format: Annotated[Literal["csv", "parquet", "webdataset"], Form(alias="format")],
) -> Response:
    limit = service.config.max_exported_images
    if len(image_ids) > limit:
        raise HTTPException(
            422, f"expected at most {limit} selected images, got {len(image_ids)}; save fewer at a time"
        )
    table = service.get_rows(image_ids)
    if export_format == "webdataset":
        headers = {"Content-Disposition": 'attachment; filename="selection.tar"'}
        parts = exports.start(table.to_pylist(), thumbnails.fetch)
        return StreamingResponse(parts, media_type="application/x-tar", headers=headers)
    content = io.BytesIO()
    write_output(table.drop_columns(["uri"]).to_reader(), content, export_format)
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
    uploads: UploadPool,
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

    return await process_upload(uploads, request, search)


@router.get("/docs")
def show_docs(pages: PageRenderer) -> HTMLResponse:
    return pages.render("docs.html")


@dataclass(frozen=True)
class _Facet:
    parameter: str  # in the URL
    label: str
    unset_label: str  # of the choice that does not restrict the search
    selected: str  # value; empty if none
    options: Sequence[tuple[str, str, int | None]]  # value, label, and number of images if known


def _list_facets(service: SearchService, search: Search, counts: FacetsResponse | None) -> list[_Facet]:
    """Returns the facets with several values, or with a selected value, so that a visitor can remove the selection."""
    splits, sources, dates = (counts.splits, counts.sources, counts.dates) if counts else ({}, {}, {})
    where = search.where
    facets = [
        _Facet("split", "Split", "All splits", where.split or "", _list_values(splits)),
        _Facet("source", "Source", "All sources", where.source or "", _list_values(sources)),
        _Facet("date", "File modified", "Any date", where.date or "", _list_dates(dates)),
    ]
    shown = [facet for facet in facets if facet.selected or len(facet.options) > 1]
    if service.index.count_facets().duplicates:
        options = [("exclude", "Without duplicates", counts.non_duplicates if counts else None)]
        selected = "exclude" if where.exclude_duplicates else ""
        shown.append(_Facet("duplicates", "Duplicates", "With duplicates", selected, options))
    return shown


def _list_values(counts: Mapping[str, int]) -> list[tuple[str, str, int]]:
    return [(value, value, count) for value, count in counts.items() if value]


def _list_dates(months: Mapping[str, int]) -> list[tuple[str, str, int]]:
    """Returns the months, latest first, or the years if there are many months or some dates are only years."""
    years = Counter[str]()
    for month, count in months.items():
        years[month[:4]] += count
    if len(months) > _MAX_MONTHS or any(len(month) == len("2026") for month in months):
        return [(year, year, years[year]) for year in sorted(years, reverse=True)]
    return [
        (month, f"{_MONTHS[int(month[5:]) - 1]} {month[:4]}", months[month]) for month in sorted(months, reverse=True)
    ]


def _format_percent(probability: float) -> str:
    """Formats a probability as a percentage. Small percentages have two significant digits."""
    percent = 100 * probability
    return f"{percent:.0f}%" if percent >= 9.5 else f"{percent:.2g}%"


def _format_ratio(image: SearchResult) -> str:
    """Returns the CSS class for an aspect ratio; see page.css. The Content Security Policy forbids inline styles."""
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
    values = {
        "q": search.query,
        "mode": search.mode,
        "split": search.where.split,
        "source": search.where.source,
        "date": search.where.date,
        "duplicates": "exclude" if search.where.exclude_duplicates else "include",
        "sort": search.sort,
        "similar_to": search.similar_to,
    }
    parameters = {
        name: value for name, value in (values | changes).items() if value not in (_DEFAULTS.get(name), None, "")
    }
    return f"{path}?{urlencode(parameters)}" if parameters else path
