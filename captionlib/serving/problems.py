"""Error responses in the format of RFC 9457 (problem details), and their description in the OpenAPI schema."""

from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI
from fastapi.responses import JSONResponse

from captionlib.serving.responses import InvalidParameter, Problem

__all__ = ["PROBLEM_TYPE", "add_problem_type", "describe_problems", "make_problem", "render_problem"]

PROBLEM_TYPE = "application/problem+json"

_DESCRIPTIONS = {
    400: "The request cannot be executed, or the image cannot be read.",
    404: "The image is not in the index, or the server has not loaded the model that the request needs.",
    408: "The body of the request arrived too slowly.",
    413: "The uploaded images are too large.",
    422: "A parameter is missing or is not valid.",
    503: "The server is busy. The header Retry-After has the number of seconds to wait.",
}


def make_problem(
    status: int, detail: str, reason: str | None = None, errors: list[InvalidParameter] | None = None
) -> Problem:
    """Returns a problem whose title is the phrase of its HTTP status, such as `Not Found`."""
    title = HTTPStatus(status).phrase
    return Problem(type="about:blank", title=title, status=status, detail=detail, reason=reason, errors=errors or [])


def render_problem(problem: Problem) -> JSONResponse:
    """Returns the response for an error, without the fields that are null."""
    return JSONResponse(problem.model_dump(exclude_none=True), problem.status, media_type=PROBLEM_TYPE)


def describe_problems(*status_codes: int) -> dict[int | str, dict[str, Any]]:
    """Returns descriptions of the error responses of a route, as FastAPI expects them."""
    return {code: {"model": Problem, "description": _DESCRIPTIONS[code]} for code in status_codes}


def add_problem_type(app: FastAPI) -> None:
    """Sets the media type of errors in the OpenAPI schema. By default, FastAPI describes them as application/json."""
    make_schema = app.openapi

    def make_schema_with_type() -> Mapping[str, Any]:
        schema = make_schema()  # FastAPI caches it
        for operation in (each for methods in schema["paths"].values() for each in methods.values()):
            for code, response in operation["responses"].items():
                if code >= "400":
                    response["content"] = {PROBLEM_TYPE: next(iter(response["content"].values()))}
        return schema

    app.openapi = make_schema_with_type  # type: ignore[method-assign, assignment]
