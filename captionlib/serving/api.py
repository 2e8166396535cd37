"""HTTP routes of the JSON API and of the thumbnails."""

from functools import partial
from typing import Annotated, Any, BinaryIO, Literal

from fastapi import APIRouter, Depends, File, HTTPException, Path as PathParameter, Query, Request, Response, UploadFile
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.concurrency import run_in_threadpool

from captionlib import __version__
from captionlib.errors import ImageError
from captionlib.search.filters import Filter
from captionlib.search.text_index import Sort
from captionlib.serving.fair_thread_pool import FairThreadPool
from captionlib.serving.monitoring import format_metrics
from captionlib.serving.problems import describe_problems, make_problem, render_problem
from captionlib.serving.responses import (
    CaptionCandidate,
    CaptionedImage,
    CaptionResponse,
    FailuresResponse,
    HealthResponse,
    ImageResponse,
    ImageSearchResponse,
    SearchMode,
    SearchResponse,
)
from captionlib.serving.service import MAX_QUERY_CHARACTERS, MAX_RESULTS, Search, SearchService, read_cursor
from captionlib.serving.thumbnails import Thumbnails, ThumbnailSize
from captionlib.serving.uploads import process_upload

__all__ = ["API", "DATE_PATTERN", "ImageId", "Service", "ThumbnailStore", "UploadPool", "read_state", "router"]

API = "/api/v1"
"""Path prefix of the API. A change that breaks clients gets a new prefix."""

DATE_PATTERN = "^([0-9]{4}(-[0-9]{2})?)?$"
"""Pattern of a date filter: a year or a month, or empty for any date."""

_MAX_CAPTIONED_IMAGES = 16
_THUMBNAIL_HEADERS = {"Cache-Control": "private, max-age=86400"}

_PLACEHOLDER_SVG = """<svg xmlns="http://www.w3.org/2000/svg" width="256" height="256" viewBox="0 0 256 256">
<path d="M98 110h60v40H98zM90 158l76-60" fill="none" stroke="#888" stroke-width="3"/></svg>"""


def read_state(name: str) -> Any:
    """Returns a FastAPI dependency that reads an attribute of the application's state."""

    async def read(request: Request) -> Any:  # FastAPI would run a plain function in a thread
        return getattr(request.app.state, name)

    return Depends(read)


async def _take_snapshot(request: Request) -> SearchService:
    """Returns a service that uses the same version of the index for the whole request."""
    service: SearchService = request.app.state.service
    return service.snapshot()


Service = Annotated[SearchService, Depends(_take_snapshot)]
ThumbnailStore = Annotated[Thumbnails, read_state("thumbnails")]
UploadPool = Annotated[FairThreadPool, read_state("uploads")]
ImageId = Annotated[
    str, Query(alias="id", description="Id of the image, as in a search result.", examples=["1000268201_693b08cb0e"])
]

SourceName = Annotated[
    str | None,
    Query(max_length=300, description="Return only images of this captions dataset.", examples=["captions"]),
]

router = APIRouter()


@router.get("/health", summary="Report the state of the server", tags=["Monitoring"])
async def get_health(service: Service) -> HealthResponse:
    description = service.index.description
    return HealthResponse(
        version=__version__,
        index=description.fingerprint,
        captions=description.captions_count,
        vectors=description.vectors_count,
    )


@router.get(
    "/metrics",
    summary="Report metrics in the text format of Prometheus",
    tags=["Monitoring"],
    response_class=Response,
    responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
)
def get_metrics() -> Response:
    return Response(format_metrics(), media_type=CONTENT_TYPE_LATEST)


@router.get(
    f"{API}/search",
    summary="Search images by the words of their captions, by a description, or by both",
    tags=["Search"],
    responses=describe_problems(400, 422),
)
def search_images(
    service: Service,
    q: Annotated[
        str,
        Query(
            max_length=MAX_QUERY_CHARACTERS,
            description='Words and "phrases". Put + before a word or phrase to require it, or - to exclude it. '
            "With mode=sentence, a description of the images in plain words.",
            examples=['dog +frisbee "on the beach" -cat'],
        ),
    ],
    mode: Annotated[
        SearchMode,
        Query(
            description="What to compare the query with: the captions (text), the images themselves (sentence), or "
            "both (hybrid).",
            examples=["text"],
        ),
    ] = "text",
    cursor: Annotated[
        str | None,
        Query(
            max_length=100,
            description="The next_cursor of the previous page of the same search. Leave it out for the first page.",
            examples=["20-5d1b4e01"],
        ),
    ] = None,
    limit: Annotated[
        int, Query(ge=1, le=MAX_RESULTS, description="Maximum number of results on a page.", examples=[20])
    ] = 20,
    split: Annotated[
        str | None, Query(max_length=100, description="Return only images in this split.", examples=["val"])
    ] = None,
    source: SourceName = None,
    date: Annotated[
        str | None,
        Query(
            pattern=DATE_PATTERN,
            description="Return only images whose file was last modified in this year or month, in UTC. If the index "
            "has very many sources and splits, mode=text may only accept years.",
            examples=["2026-03"],
        ),
    ] = None,
    duplicates: Annotated[
        Literal["include", "exclude"],
        Query(
            description="Use exclude to leave out images that are marked as duplicates of another image.",
            examples=["include"],
        ),
    ] = "include",
    min_log_prob: Annotated[
        float | None,
        Query(
            le=0,
            allow_inf_nan=False,
            description="Return only images whose caption has at least this log-probability.",
            examples=[-10],
        ),
    ] = None,
    sort: Annotated[
        Sort,
        Query(
            description="Order of the results with mode=text: match with the query (relevance), probability of the "
            "caption (log_prob), or similarity of caption and image (image_text_score). The best result is first.",
            examples=["relevance"],
        ),
    ] = "relevance",
) -> SearchResponse:
    if mode not in service.modes:
        raise HTTPException(400, f"mode {mode} is not available; expected {' or '.join(service.modes)}")
    where = Filter(None, split or None, min_log_prob, source or None, date or None, duplicates == "exclude")
    search = Search(q, mode, where, sort)
    return service.search(search, read_cursor(cursor, search), limit)


@router.get(
    f"{API}/failures",
    summary="List the images that could not be captioned, with the reasons",
    tags=["Search"],
    responses=describe_problems(400, 422),
)
def list_failures(
    service: Service,
    reason: Annotated[
        str | None,
        Query(max_length=100, description="Return only images that failed for this reason.", examples=["Truncated"]),
    ] = None,
    source: SourceName = None,
    cursor: Annotated[
        str | None,
        Query(max_length=100, description="The next_cursor of the previous page.", examples=["100-5d1b4e01"]),
    ] = None,
    limit: Annotated[
        int, Query(ge=1, le=MAX_RESULTS, description="Maximum number of images on a page.", examples=[100])
    ] = 100,
) -> FailuresResponse:
    reason, source = reason or None, source or None
    return service.find_failures(reason, source, read_cursor(cursor, (reason, source)), limit)


@router.get(
    f"{API}/image",
    summary="Get an image of the index, with its captions and similar images",
    tags=["Search"],
    responses=describe_problems(404, 422),
)
def get_image(service: Service, image_id: ImageId) -> ImageResponse:
    return service.get_image(image_id)


@router.post(
    f"{API}/image-search",
    summary="Caption an uploaded image, and find similar images and sentences",
    tags=["Search"],
    responses=describe_problems(400, 404, 408, 413, 422, 503),
)
async def search_by_image(
    request: Request,
    service: Service,
    uploads: UploadPool,
    image: Annotated[UploadFile, File(description="An image file.")],
) -> ImageSearchResponse:
    return await process_upload(uploads, request, lambda: service.search_by_image(image.file.read()))


@router.post(
    f"{API}/caption",
    summary="Caption one or more uploaded images",
    tags=["Caption"],
    responses=describe_problems(400, 404, 408, 413, 422, 503),
)
async def caption(
    request: Request,
    service: Service,
    uploads: UploadPool,
    images: Annotated[
        list[UploadFile],
        File(
            min_length=1,
            max_length=_MAX_CAPTIONED_IMAGES,
            description="Image files. Repeat the field to upload several.",
        ),
    ],
) -> CaptionResponse:
    captioned = []
    for image in images:
        result = CaptionedImage(name=image.filename or "", captions=[], problem=None)
        try:
            result.captions = await process_upload(uploads, request, partial(_caption_file, service, image.file))
        except ImageError as error:
            result.problem = make_problem(400, str(error), reason=error.reason)
        captioned.append(result)
    return CaptionResponse(images=captioned)


def _caption_file(service: SearchService, file: BinaryIO) -> list[CaptionCandidate]:
    return service.caption(file.read())


@router.get(
    "/thumbnail/{size}",
    summary="Get a thumbnail of an image in the index",
    tags=["Search"],
    response_class=Response,
    responses={
        200: {"content": {"image/jpeg": {"schema": {"type": "string", "format": "binary"}}}},
        **describe_problems(404, 422, 503),
    },
)
async def get_thumbnail(
    request: Request,
    service: Service,
    thumbnails: ThumbnailStore,
    size: Annotated[
        ThumbnailSize,
        PathParameter(description="small: up to 400 pixels wide or high; large: up to 1280.", examples=["small"]),
    ],
    image_id: ImageId,
) -> Response:
    try:
        uri = await run_in_threadpool(service.get_image_uri, image_id)
        content = await thumbnails.get(uri, size)
    except ImageError as error:  # its message is not shown, because it may contain the private URI of the image
        if request.headers.get("accept", "").startswith("image/"):  # an <img> element
            return Response(_PLACEHOLDER_SVG, 404, media_type="image/svg+xml")
        return render_problem(make_problem(404, f"image {image_id} cannot be read", reason=error.reason))
    return Response(content, media_type="image/jpeg", headers=_THUMBNAIL_HEADERS)
