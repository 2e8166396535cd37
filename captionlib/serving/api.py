"""JSON for programs."""

from typing import Annotated, Any

from fastapi import APIRouter, File, HTTPException, Query, Request, UploadFile
from pydantic import BaseModel

from captionlib import __version__
from captionlib.errors import BusyError, ImageError, QueryError
from captionlib.serving.config import ServingConfig
from captionlib.serving.service import Answer, ImageAnswer, Library, Mode, PhotoAnswer

__all__ = ["Health", "Problem", "api_routes"]


class Problem(BaseModel):
    """Why there is no answer."""

    detail: str


class Health(BaseModel):
    """What is served, and that it is."""

    status: str
    version: str
    index: str
    captions: int
    vectors: int


def _problems(*codes: int) -> dict[int | str, dict[str, Any]]:
    return {code: {"model": Problem} for code in codes}


def api_routes(library: Library, config: ServingConfig) -> APIRouter:
    """The routes below /api, and /health."""
    routes = APIRouter()

    @routes.get("/health", summary="Whether the index can be asked", tags=["state"])
    def health() -> Health:
        description = library.index.description
        return Health(
            status="ok",
            version=__version__,
            index=description.fingerprint,
            captions=description.captions_count,
            vectors=description.vectors_count,
        )

    @routes.get("/api/search", summary="Images by words, by a sentence, or by both", responses=_problems(400))
    def search(
        q: Annotated[
            str, Query(max_length=config.max_question_characters, description='Words, "phrases", +must, -not.')
        ],
        mode: Annotated[Mode, Query(description="Words of captions, what a sentence describes, or both.")] = "text",
        offset: Annotated[int, Query(ge=0, le=config.max_offset, description="Images to pass over.")] = 0,
        limit: Annotated[int, Query(ge=1, le=config.max_rows, description="Images of one answer.")] = 20,
        split: Annotated[str | None, Query(max_length=100, description="That the images must be of.")] = None,
        min_log_prob: Annotated[
            float | None, Query(le=0, allow_inf_nan=False, description="That captions must have at least.")
        ] = None,
    ) -> Answer:
        if mode not in library.modes:
            raise HTTPException(400, f"{mode} cannot be asked here; there is {', '.join(library.modes)}")
        return library.search(q, mode, offset, limit, split, min_log_prob)

    @routes.get("/api/image", summary="One image of the index", responses=_problems(404))
    def image(id: Annotated[str, Query(max_length=4096, description="Of the image.")]) -> ImageAnswer:
        try:
            return library.image(id)
        except QueryError as error:
            raise HTTPException(404, str(error)) from error

    @routes.post(
        "/api/photo", summary="Captions, sentences and images for a photograph", responses=_problems(400, 404, 413, 503)
    )
    async def photo(request: Request, photo: Annotated[UploadFile, File(description="An image file.")]) -> PhotoAnswer:
        from starlette.concurrency import run_in_threadpool

        content = await photo.read()
        return await run_in_threadpool(ask_photo, library, content)

    return routes


def ask_photo(library: Library, content: bytes) -> PhotoAnswer:
    """What is found for a photograph, or the answer to one that cannot be had."""
    try:
        return library.photo(content)
    except ImageError as error:
        raise HTTPException(400, f"{error.reason}: {error}") from error
    except BusyError as error:
        raise HTTPException(503, str(error), {"Retry-After": "2"}) from error
    except QueryError as error:
        raise HTTPException(404, str(error)) from error
