from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import schemathesis
from fastapi import FastAPI
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from schemathesis.specs.openapi.checks import positive_data_acceptance

from .example_site import make_site

OPERATIONS = ["GET /health", "GET /api/search", "GET /api/image", "POST /api/photo", "GET /picture/{size}"]
MODES = [schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE]


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The description of an application that is open all the while; schemathesis would open and end it at each call."""
    app = make_site(tmp_path_factory.mktemp("fuzz"), 20)
    with TestClient(app):
        app.router.lifespan_context = _leave_open
        yield schemathesis.openapi.from_asgi("/openapi.json", app)


@asynccontextmanager
async def _leave_open(_app: FastAPI) -> AsyncIterator[None]:
    yield


def test_all_of_the_api_is_fuzzed(api: Any) -> None:
    assert [operation.ok().label for operation in api.get_all_operations()] == OPERATIONS


@pytest.mark.parametrize(
    ("label", "mode"),
    [(label, mode) for label in OPERATIONS for mode in MODES if (label, mode) != ("GET /health", MODES[1])],
)
def test_the_api_keeps_its_own_description(api: Any, label: str, mode: Any) -> None:
    (operation,) = (found.ok() for found in api.get_all_operations() if found.ok().label == label)

    @settings(max_examples=30, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(case=operation.as_strategy(generation_mode=mode))
    def ask(case: Any) -> None:
        # A photograph of random bytes is refused, and an image that is not there not found, as the description says.
        case.call_and_validate(excluded_checks=[positive_data_acceptance])

    ask()
