"""HTTP routes of the JSON API and of the thumbnails."""

from typing import Annotated, Any

from fastapi import APIRouter, Depends, File, HTTPException, Path as PathParameter, Query, Request, Response, UploadFile
from starlette.concurrency import run_in_threadpool

from captionlib import __version__
from captionlib.errors import ImageError
from captionlib.serving.responses import (
    ErrorResponse,
    HealthResponse,
    ImageResponse,
    ImageSearchResponse,
    SearchMode,
    SearchResponse,
)
from captionlib.serving.service import MAX_OFFSET, MAX_QUERY_CHARACTERS, MAX_RESULTS, SearchService
from captionlib.serving.thumbnails import Thumbnails, ThumbnailSize
from captionlib.serving.uploads import Uploads

__all__ = ["ImageId", "Service", "ThumbnailStore", "UploadQueue", "read_state", "router"]

_THUMBNAIL_HEADERS = {"Cache-Control": "private, max-age=86400"}

_PLACEHOLDER_SVG = """<svg xmlns="http://www.w3.org/2000/svg" width="256" height="256" viewBox="0 0 256 256">
<path d="M98 110h60v40H98zM90 158l76-60" fill="none" stroke="#888" stroke-width="3"/></svg>"""


def read_state(name: str) -> Any:
    """Returns a FastAPI dependency that reads an attribute of the application's state."""

    async def read(request: Request) -> Any:  # FastAPI would run a plain function in a thread
        return getattr(request.app.state, name)

    return Depends(read)


async def _take_snapshot(request: Request) -> SearchService:
    """Returns a service for one request, which uses one version of the index."""
    service: SearchService = request.app.state.service
    return service.snapshot()


Service = Annotated[SearchService, Depends(_take_snapshot)]
ThumbnailStore = Annotated[Thumbnails, read_state("thumbnails")]
UploadQueue = Annotated[Uploads, read_state("uploads")]
ImageId = Annotated[str, Query(alias="id", description="Id of the image; must match exactly.")]

router = APIRouter()


def _describe_errors(*status_codes: int) -> dict[int | str, dict[str, Any]]:
    return {status_code: {"model": ErrorResponse} for status_code in status_codes}


@router.get("/health", summary="Report the state of the application")
async def get_health(service: Service) -> HealthResponse:
    description = service.index.description
    return HealthResponse(
        version=__version__,
        index=description.fingerprint,
        captions=description.captions_count,
        vectors=description.vectors_count,
    )


@router.get(
    "/api/search",
    summary="Search images by the words of their captions, by a sentence, or by both",
    responses=_describe_errors(400),
)
def search(
    service: Service,
    q: Annotated[
        str,
        Query(
            max_length=MAX_QUERY_CHARACTERS,
            description='Words and "phrases"; prefix + to require one, - to exclude one. In sentence mode, a sentence.',
        ),
    ],
    mode: Annotated[
        SearchMode,
        Query(description="Search captions (text), image embeddings (sentence), or both (hybrid)."),
    ] = "text",
    offset: Annotated[int, Query(ge=0, le=MAX_OFFSET, description="Number of results to skip.")] = 0,
    limit: Annotated[int, Query(ge=1, le=MAX_RESULTS, description="Number of results to return.")] = 20,
    split: Annotated[str | None, Query(max_length=100, description="Return only images in this dataset split.")] = None,
    min_log_prob: Annotated[
        float | None,
        Query(le=0, allow_inf_nan=False, description="Return only captions with at least this log-probability."),
    ] = None,
) -> SearchResponse:
    if mode not in service.modes:
        raise HTTPException(400, f"mode {mode} is not available; expected {' or '.join(service.modes)}")
    return service.search(q, mode, offset, limit, split, min_log_prob)


@router.get("/api/image", summary="Get an image in the index", responses=_describe_errors(404))
def get_image(service: Service, image_id: ImageId) -> ImageResponse:
    return service.get_image(image_id)


@router.post(
    "/api/image-search",
    summary="Caption an uploaded image, rank the configured sentences for it, and find similar images",
    responses=_describe_errors(400, 404, 408, 413, 503),
)
async def search_by_image(
    request: Request,
    service: Service,
    uploads: UploadQueue,
    image: Annotated[UploadFile, File(description="An image file.")],
) -> ImageSearchResponse:
    return await uploads.process(request, lambda: service.search_by_image(image.file.read()))


@router.get(
    "/thumbnail/{size}",
    summary="Get a thumbnail of an image in the index",
    response_class=Response,
    responses={
        200: {"content": {"image/jpeg": {"schema": {"type": "string", "format": "binary"}}}},
        404: {"model": ErrorResponse, "content": {"image/svg+xml": {"schema": {"type": "string"}}}},
        503: {"model": ErrorResponse},
    },
)
async def get_thumbnail(
    request: Request,
    service: Service,
    thumbnails: ThumbnailStore,
    size: Annotated[
        ThumbnailSize, PathParameter(description="small: 256 x 256 crop; large: the whole image, of up to 1280 pixels.")
    ],
    image_id: ImageId,
) -> Response:
    try:
        uri = await run_in_threadpool(service.get_image_uri, image_id)
        content = await thumbnails.get(uri, size)
    except ImageError as error:  # its message may contain the URI of the image, which is private
        if request.headers.get("accept", "").startswith("image/"):  # an <img> element
            return Response(_PLACEHOLDER_SVG, 404, media_type="image/svg+xml")
        raise HTTPException(404, f"image {image_id} cannot be read: {error.reason}") from error
    return Response(content, media_type="image/jpeg", headers=_THUMBNAIL_HEADERS)
